# SPDX-License-Identifier: Apache-2.0
"""What a run prints and leaves behind: tables and `lord_report.json`. All of them read plain values."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from lord_quant.calibration import TokenWindows
from lord_quant.checkpoint import format_version
from lord_quant.config import FLOAT_BITS, LordConfig
from lord_quant.outcomes import StackRecord
from lord_quant.plan import LayerPlan, Plan
from lord_quant.remedies import gathered, raised_damping, remedies_table
from lord_quant.version import __version__


if TYPE_CHECKING:
    from lord_quant.backends.gptq import GptqRecord
    from lord_quant.engine import DecompositionRecord

MEASURES = ("rel_output_error", "rel_stacked_error", "effective_rank", "largest_coefficient")
"""What a layer's record may say of it, besides its cost."""
PACKAGES = ("torch", "transformers", "optimum", "gptqmodel", "safetensors", "accelerate", "numba")


def human_bytes(count: float) -> str:
    """Renders bytes in decimal units, as file managers do: 10.9 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < (999.5 if unit == "B" else 999.95):  # what rounds to 1000 belongs to the next unit
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def human_seconds(seconds: float) -> str:
    """Renders a duration: 42 s, 3 min 10 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def both_text(down: int | None, up: int | None) -> str:
    """Renders a layer's bits or group size; of factors that differ, that of `down` and that of `up`: 4/3."""
    if down is None:
        return "-"
    return str(down) if down == up else f"{down}/{up}"


def form_text(form: str, name: str, leader: str) -> str:
    """Renders a layer's form; of a grouped layer that uses the `down` of another, also whose: grouped (q_proj)."""
    return form if leader in ("", name) else f"{form} ({leader.rpartition('.')[2]})"


def packing_text(layers: Sequence[dict[str, Any]]) -> str:
    """Renders bits and group sizes, all that occur."""
    bits, sizes = (
        sorted({layer[key] for layer in layers for key in (what, f"up_{what}")}) for what in ("bits", "group_size")
    )
    return f"{', '.join(map(str, bits))} bits, group size {', '.join(map(str, sizes))}"


def plan_table(plan: Plan) -> str:
    """Renders every layer's shape, rank, bytes and bits per weight, its packing where that differs, and the totals."""
    rows = [
        [
            layer.name,
            layer.shape,
            layer.rank or "dense",
            *([form_text(layer.form, layer.name, layer.leader) if layer.rank else "-"] if plan.form_pattern else []),
            *(
                [both_text(layer.bits, layer.up_bits), both_text(layer.group_size, layer.up_group_size)]
                if plan.mixed
                else []
            ),
            f"{layer.weights / layer.dense_weights:.2f}",
            human_bytes(layer.weight_bytes + layer.bias_bytes),
            f"{layer.bpw:.2f}",
            layer.note,
        ]
        for layer in plan.layers
    ]
    form = ["form"] if plan.form_pattern else []
    headers = [
        "layer",
        "out x in",
        "rank",
        *form,
        *(["bits", "group"] if plan.mixed else []),
        "kept",
        "bytes",
        "bpw",
        "note",
    ]
    if not any(layer.note for layer in plan.layers):
        headers, rows = headers[:-1], [row[:-1] for row in rows]
    sides = ["right" if header not in ("layer", "form", "note") else "left" for header in headers]
    body = tabulate(rows, headers, disable_numparse=True, colalign=sides)
    return f"{body}\n\n{plan_summary(plan)}"


def frontier_table(points: Iterable[tuple[float, float, float]]) -> str:
    """Renders budgets with what the best plans for them take and are predicted to lose."""
    rows = [[f"{limit:g}", f"{bpw:.3f}", f"{loss:.4f}"] for limit, bpw, loss in points]
    return tabulate(rows, ["at most", "bits per weight", "predicted loss"], disable_numparse=True)


def plan_summary(plan: Plan) -> str:
    """Renders the totals of a plan in three lines."""
    linear = sum(layer.weight_bytes + layer.bias_bytes for layer in plan.layers)
    packing = "float" if plan.bits == FLOAT_BITS else packing_text([_layer_dict(layer) for layer in plan.layers])
    return (
        f"scheme        {plan.scheme} ({packing}); {len(plan.rank_pattern)} of {len(plan.layers)} layers decomposed\n"
        f"linear layers {human_bytes(linear)}, {plan.bpw:.3f} bits per weight all in, "
        f"{plan.param_ratio:.3f} of weights kept\n"
        f"checkpoint    {human_bytes(plan.tensor_bytes)} of tensors, {human_bytes(plan.other_bytes)} of them "
        "embeddings, norms and head"
    )


def plan_dict(plan: Plan) -> dict[str, Any]:
    """Returns a plan as plain values."""
    return {
        "scheme": plan.scheme,
        "bits": plan.bits,
        "group_size": plan.group_size,
        "mean_correction": plan.mean_correction,
        "rank_pattern": plan.rank_pattern,
        "form_pattern": plan.form_pattern,
        "group_pattern": plan.group_pattern,
        "bits_pattern": plan.bits_pattern,
        "group_size_pattern": plan.group_size_pattern,
        "totals": _totals(plan),
        "layers": [_layer_dict(layer) for layer in plan.layers],
    }


def build_report(
    config: LordConfig,
    plan: Plan,
    windows: TokenWindows,
    decomposed: Sequence[DecompositionRecord] | Sequence[StackRecord],
    quantized: Sequence[GptqRecord],
    seconds: dict[str, float],
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """Collects everything known about a run into plain values."""
    lowrank = {record.name: record for record in decomposed}
    solved = {record.name: record for record in quantized}
    layers = []
    for layer in plan.layers:
        entry = _layer_dict(layer)
        record = lowrank.get(layer.name)
        if record is not None:
            known = {key: getattr(record, key, None) for key in MEASURES}
            entry |= {key: value for key, value in known.items() if value is not None}
            entry |= {"decompose_seconds": round(record.seconds, 4), "remedies": list(record.remedies)}
        parts = {suffix: solved.get(layer.name + suffix) for suffix in layer.factor_shapes()}
        entry["gptq"] = {
            suffix.removeprefix(".") or "weight": {
                "loss": part.loss if part.loss is not None and math.isfinite(part.loss) else None,
                "damp_percent": part.damp_percent,
                "seconds": round(part.seconds, 4),
            }
            for suffix, part in parts.items()
            if part is not None
        }
        entry["remedies"] = [*entry.get("remedies", ()), *raised_damping(entry["gptq"], config.gptq.damp_percent)]
        layers.append(entry)
    return {
        "format_version": format_version(plan),
        "lord_quant_version": __version__,
        "base_model": _public_name(config.model),
        "scheme": plan.scheme,
        "config": _public_config(config),
        "calibration": {
            "source": windows.source,
            "sha256": windows.sha256,
            "num_samples": windows.input_ids.shape[0],
            "seq_len": windows.input_ids.shape[1],
            "num_tokens": windows.num_tokens,
            "seed": config.calibration.seed,
        },
        "totals": _totals(plan),
        "seconds": seconds | {"total": round(sum(seconds.values()), 3)},
        "warnings": list(warnings),
        "remedies": gathered(layers),
        "layers": layers,
        "versions": package_versions(),
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def report_table(report: dict[str, Any], longest: int = 64) -> str:
    """Renders a run's results: one line per layer, or per kind of layer when there are more than `longest`."""
    rows = report["layers"] if len(report["layers"]) <= longest else list(_by_kind(report["layers"]))
    table = []
    for row in rows:
        losses = [part["loss"] for part in row["gptq"].values()]
        damps = [part["damp_percent"] for part in row["gptq"].values()]
        table.append(
            [
                row["name"],
                f"{row['out_features']}x{row['in_features']}",
                row["rank"] or "dense",
                _number(row.get("rel_output_error")),
                _number(row.get("rel_stacked_error")),
                " / ".join(_number(loss) for loss in losses) or "-",
                _number(max(damps)) if damps else "-",
                f"{row['bpw']:.2f}",
                f"{row.get('decompose_seconds', 0) + sum(part['seconds'] for part in row['gptq'].values()):.2f}",
            ]
        )
    headers = ["layer", "out x in", "rank", "truncation", "all in", "GPTQ loss (down / up)", "damp", "bpw", "s"]
    if all(row[4] == "-" for row in table):  # the naive stack does not measure what rounding adds
        headers, table = headers[:4] + headers[5:], [row[:4] + row[5:] for row in table]
    totals, seconds = report["totals"], report["seconds"]
    on_disk = totals.get("file_bytes_on_disk")
    return (
        tabulate(table, headers, disable_numparse=True, colalign=("left", *["right"] * (len(headers) - 1)))
        + "\ntruncation, all in: share of a layer's output energy (of what counts for the loss, with fisher) lost to "
        "decomposition; with rounding\n"
        + f"\nscheme {report['scheme']}: {totals['bpw']:.3f} bits per weight all in, "
        + f"{totals['param_ratio']:.3f} of weights kept{f', {human_bytes(on_disk)} on disk' if on_disk else ''}; "
        + ", ".join(f"{name} {human_seconds(value)}" for name, value in seconds.items())
        + "".join(
            f"\nprocess {rank}: {own['tokens']} tokens, {own['layers']} layers in {human_seconds(own['seconds'])}"
            for rank, own in enumerate(report.get("processes", []))
        )
        + _largest_coefficient(report["layers"])
        + f"\n\n{remedies_table(report['remedies'])}"
    )


def to_json(values: Any) -> str:
    """Renders JSON with a final newline; refuses NaN, which is no JSON."""
    return json.dumps(values, indent=2, allow_nan=False) + "\n"


def package_versions(names: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Returns the installed versions of packages; those not installed are left out."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _layer_dict(layer: LayerPlan) -> dict[str, Any]:
    return {
        "name": layer.name,
        "block": layer.block,
        "out_features": layer.out_features,
        "in_features": layer.in_features,
        "rank": layer.rank,
        "form": layer.form if layer.rank is not None else "dense",
        "bits": layer.bits,
        "up_bits": layer.up_bits,
        "group_size": layer.group_size,
        "up_group_size": layer.up_group_size,
        "leader": layer.leader,
        "weights": layer.weights,
        "bytes": layer.weight_bytes + layer.bias_bytes,
        "bpw": layer.bpw,
        "adds_bias": layer.adds_bias,
        "note": layer.note,
    }


def _totals(plan: Plan) -> dict[str, Any]:
    return {
        "layers": len(plan.layers),
        "decomposed_layers": len(plan.rank_pattern),
        "group_size": plan.group_size,
        "param_ratio": plan.param_ratio,
        "bpw": plan.bpw,
        "linear_bytes": plan.tensor_bytes - plan.other_bytes,
        "tensor_bytes": plan.tensor_bytes,
    }


def _by_kind(layers: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Averages layers of the same name over blocks; seconds are summed."""
    kinds: dict[tuple[str, bool], list[dict[str, Any]]] = {}  # dense layers apart: they have other parts and no truncation
    for layer in layers:
        kind = layer["name"].split(f".{layer['block']}.", 1)[1]
        kinds.setdefault((kind, layer["rank"] is None), []).append(layer)
    for (kind, _), members in kinds.items():
        ranks = {member["rank"] for member in members}
        merged = dict(members[0], name=f"{kind} (x{len(members)})")
        merged["rank"] = ranks.pop() if len(ranks) == 1 else "mixed"
        merged["bpw"] = sum(member["bpw"] for member in members) / len(members)
        for measure in ("rel_output_error", "rel_stacked_error"):
            errors = [member[measure] for member in members if measure in member]
            if errors:
                merged[measure] = sum(errors) / len(errors)
        if any("decompose_seconds" in member for member in members):
            merged["decompose_seconds"] = sum(member.get("decompose_seconds", 0) for member in members)
        merged["gptq"] = {}
        parts = dict.fromkeys(part for member in members for part in member["gptq"])  # a layer that stayed float has none
        for part in parts:
            found = [member["gptq"][part] for member in members if part in member["gptq"]]
            losses = [item["loss"] for item in found if item["loss"] is not None]
            merged["gptq"][part] = {
                "loss": sum(losses) / len(losses) if losses else None,
                "damp_percent": max(item["damp_percent"] for item in found),
                "seconds": sum(item["seconds"] for item in found),
            }
        yield merged


def _largest_coefficient(layers: list[dict[str, Any]]) -> str:
    """Renders the largest coefficient of pivoted layers, if there are any."""
    coefficients = {layer["name"]: layer["largest_coefficient"] for layer in layers if "largest_coefficient" in layer}
    if not coefficients:
        return ""
    name = max(coefficients, key=coefficients.__getitem__)
    return f"\nlargest coefficient of a pivoted layer's predictor, before rounding: {coefficients[name]:.2f} ({name})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _public_name(model: str) -> str:
    """Reduces a local path to its last part, also of a folder that is gone: reports are published with checkpoints."""
    path = Path(model).expanduser()
    local = path.exists() or path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1
    return path.resolve().name if local else model


def _public_config(config: LordConfig) -> dict[str, Any]:
    values = config.to_dict()
    values["model"] = _public_name(config.model)
    values.pop("output")
    values["calibration"]["dataset"] = _public_name(config.calibration.dataset)
    return values
