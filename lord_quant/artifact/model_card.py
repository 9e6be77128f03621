# SPDX-License-Identifier: Apache-2.0
"""The README of a checkpoint: how to load it, what was done, what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tabulate import tabulate

from lord_quant.config import FLOAT_BITS
from lord_quant.outcomes import KEPT
from lord_quant.report import human_bytes, packing_text


INSTALL_LINE = "pip install lord-quant"


def model_card(report: dict[str, Any]) -> str:
    """Renders the README of a checkpoint: how to load it, what was done, what was measured."""
    totals, calibration = report["totals"], report["calibration"]
    packed = report["config"]["gptq"]["bits"] != FLOAT_BITS
    errors = [layer["rel_output_error"] for layer in report["layers"] if "rel_output_error" in layer]
    rows = [
        ["bits per weight, all in (weights, scales, zeros, indices, added biases)", f"{totals['bpw']:.3f}"],
        ["linear weights kept", f"{totals['param_ratio']:.3f}"],
        ["layers decomposed", f"{totals['decomposed_layers']} of {totals['layers']}"],
        ["weights on disk", human_bytes(totals.get("file_bytes_on_disk", totals["tensor_bytes"]))],
        [f"seconds to compress{_but_resumed(report)}", f"{report['seconds']['total']:.0f}"],
    ]
    if report.get("planned", {}).get("fisher_samples"):
        rows.append(["loss the plan predicted, nats per token", f"{report['planned']['predicted_loss']:.4f}"])
    if errors:
        label = "share of output energy (of what counts for the loss, with fisher) lost to truncation, mean (worst layer)"
        rows.append([label, f"{sum(errors) / len(errors):.4f} ({max(errors):.4f})"])
    kept = sum(layer["note"] == KEPT for layer in report["layers"])
    if kept:
        rows.append(["layers that could not be compressed and stayed as they were", str(kept)])
    steps = ["LoRD low-rank decomposition (arXiv 2309.14021)"] if totals["decomposed_layers"] else []
    steps += [f"GPTQ to {packing_text(report['layers'])}"] if packed else []
    return f"""---
library_name: transformers
pipeline_tag: text-generation
base_model: {report["base_model"]}
tags: [lord-quant, low-rank{", gptq" if packed else ""}]
---

# {report["base_model"]}, {report["scheme"]}

```
{INSTALL_LINE}
```

Then it loads like any model: `AutoModelForCausalLM.from_pretrained("this folder")`. Without that line transformers only
warns and returns **random weights**.

**What was done:** {", then ".join(steps)}; stack `{report["config"]["stack"]}`.
Calibrated on {calibration["num_samples"]} x {calibration["seq_len"]} tokens of {calibration["source"]}
(seed {calibration["seed"]}, sha256 `{calibration["sha256"][:16]}`).

{tabulate(rows, ["measured", ""], tablefmt="github", disable_numparse=True)}

Figures per layer, settings and versions are in `lord_report.json`. Quality was not measured here; measure it with
`optimum-cli lord eval --model DIR --tasks lord_code_ppl --perplexity`.
"""


def _but_resumed(report: Mapping[str, Any]) -> str:
    """Says that a run which went on did not do everything in its seconds."""
    resumed = report.get("blocks_resumed", 0)
    return f", without {resumed} blocks that were finished before the run was cut off" if resumed else ""
