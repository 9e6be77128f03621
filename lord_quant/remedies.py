# SPDX-License-Identifier: Apache-2.0
"""What the numerics of a run needed, layer by layer, gathered for its end: no remedy goes unsaid."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tabulate import tabulate


RANK_NOISE = "numerical rank below the rank kept: some kept directions are rounding noise"
UNREACHED = "wanted more text; with --bits 16, --ignore leaves layers out"
"""What can be done about layers that no calibration token reached."""
SHOWN = 100
"""Characters of a remedy that the table shows."""


def raised_damping(parts: Mapping[str, Mapping[str, Any]], asked: float) -> list[str]:
    """Tells of the solves of one layer, by what they were of, that ended with more damping than was asked for."""
    raised = {part: item["damp_percent"] for part, item in parts.items() if item["damp_percent"] > 1.001 * asked}
    return [f"GPTQ of {part}: damping raised from {asked:g} to {found:g}" for part, found in raised.items()]


def gathered(layers: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns every remedy of a report's layers, with the layers that needed it.

    Args:
        layers: The report's entries: `name`, `rank`, perhaps `effective_rank` and `remedies`.
    """
    found: dict[str, list[str]] = {}
    for layer in layers:
        noisy = layer["rank"] and layer.get("effective_rank", layer["rank"]) < layer["rank"]
        for remedy in (*layer.get("remedies", ()), *[RANK_NOISE] * bool(noisy)):
            found.setdefault(remedy, []).append(layer["name"])
    return [{"remedy": remedy, "layers": names} for remedy, names in found.items()]


def remedies_table(remedies: Sequence[Mapping[str, Any]]) -> str:
    """Renders what `gathered` returns, a line per remedy; one line says so if nothing was needed."""
    if not remedies:
        return "remedies      none: the numerics needed nothing"
    rows = []
    for item in remedies:
        text = " ".join(item["remedy"].split())
        shown = text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
        rows.append([shown, len(item["layers"]), item["layers"][0]])
    return tabulate(rows, ["remedy", "layers", "such as"], disable_numparse=True, colalign=("left", "right", "left"))
