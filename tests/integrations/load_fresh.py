# SPDX-License-Identifier: Apache-2.0
"""Loads checkpoint folders with plain transformers, in a process of its own. Never imports the package under test.

Usage: load_fresh.py OUTPUT FOLDER…

Writes one mapping to OUTPUT: per folder the logits, or the exception's type and text.
"""

import gc
import sys
import traceback

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    output, *folders = sys.argv[1:]
    tokens = torch.randint(1, 4096, (2, 24), generator=torch.Generator().manual_seed(11))
    results = {}
    for folder in folders:
        try:
            model = AutoModelForCausalLM.from_pretrained(folder)
            with torch.no_grad():
                logits = model(input_ids=tokens).logits
            packed = [name for name, module in model.named_modules() if hasattr(module, "qweight")]
            results[folder] = {"logits": logits, "packed": packed, "training": model.training}
        except Exception as error:
            results[folder] = {"error": type(error).__name__, "message": str(error), "trace": traceback.format_exc()}
        gc.freeze()  # the host collects garbage after every load
    results["modules"] = sorted(name for name in sys.modules if name.startswith("lord_quant"))
    torch.save(results, output)


main()
