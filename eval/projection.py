# SPDX-License-Identifier: Apache-2.0
"""A projection, not a measurement: what a joint run of a large model would compute and move, and the time that implies.

Operations and bytes of every phase are counted from shapes (`lord_quant/runs/operations.py`) and divided by the published
speeds of a GPU, of which a share is taken to be reached. Passes through the model run in bfloat16, all algebra in float32
without TF32. Solvers hand a few columns at a time to loops on the host's processor, so what starts kernels and copies is
counted, and what the loops take. Rotations are drawn and weights are packed on the CPU as well. Phases are added up as if
nothing overlapped.

    python eval/projection.py --output projection.json                       # StarCoder-15.5B on an H100
    python eval/projection.py --gpu a100 --efficiency 0.4 --output projection.json

The tables lie beside the JSON as Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from provenance import revision
from tables import grid
from variants import write_json


class Gpu(NamedTuple):
    """Published peak speeds of a GPU.

    Attributes:
        half_flops: bfloat16 operations per second, tensor cores, without sparsity.
        single_flops: float32 operations per second, without tensor cores.
        bandwidth: Bytes per second of its memory.
        source: Where the figures come from.
    """

    half_flops: float
    single_flops: float
    bandwidth: float
    source: str


GPUS = {
    "h100": Gpu(989e12, 67e12, 3.35e12, "NVIDIA H100 datasheet, SXM; bfloat16: half of the one with sparsity"),
    "a100": Gpu(312e12, 19.5e12, 2.039e12, "NVIDIA A100 datasheet, 80GB SXM"),
}
STARCODER = {"width": 6144, "inner": 24576, "blocks": 40, "head": 128, "vocabulary": 49152, "positions": 8192}
"""The shape of bigcode/starcoder, from its configuration: 15.5 billion parameters, one key and value head, tied head."""
TURN_KERNELS = 25
"""Kernels and copies started each time that a few columns are handed to the loops: what prepares them, feedback behind
them, a share of what comes once per group or sweep."""
LOOP_BYTES = 24
"""Copied per weight that loops go over, of those `operations.Work.looped` counts: columns there, codes and errors back."""
ITEMSIZE = 2
NOTE = (
    "A projection from operation counts and published speeds, **not a measurement**. Efficiencies, starts, loops and "
    "the speeds of disk, copies and CPU are assumptions, see the JSON."
)


def main() -> None:
    """Counts, divides, prints the table, writes JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("width", "inner", "blocks", "vocabulary", "positions"):
        parser.add_argument(
            f"--{name}", type=int, default=STARCODER[name], help=f"of the model (default: {STARCODER[name]})"
        )
    parser.add_argument("--rank-ratio", type=float, default=0.75, help="forced on all layers (default: 0.75)")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--num-samples", type=int, default=128, help="calibration windows (default: 128)")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens per window (default: 2048)")
    parser.add_argument("--fisher-samples", type=int, default=8, help="windows of the backward pass (default: 8)")
    parser.add_argument(
        "--gpu", choices=list(GPUS), default="h100", help="whose published speeds are taken (default: h100)"
    )
    parser.add_argument("--half-tflops", type=float, help="bfloat16 speed instead of the published one")
    parser.add_argument("--single-tflops", type=float, help="float32 speed instead")
    parser.add_argument("--bandwidth", type=float, metavar="TB/S", help="memory bandwidth instead")
    parser.add_argument("--efficiency", type=float, default=0.5, help="share of them that is reached (default: 0.5)")
    parser.add_argument("--eigen-efficiency", type=float, default=0.05, help="that of eigendecompositions (default: 0.05)")
    parser.add_argument("--kernel-us", type=float, default=6.0, help="microseconds to start a kernel (default: 6)")
    parser.add_argument("--loop-ns", type=float, default=7.5, help="nanoseconds a loop takes for a weight (default: 7.5)")
    parser.add_argument(
        "--copies", type=float, default=10.0, metavar="GB/S", help="speed to and from the host (default: 10)"
    )
    parser.add_argument("--cpu-gflops", type=float, default=200.0, help="float64 speed of the host (default: 200)")
    parser.add_argument("--pack-rate", type=float, default=1e8, help="weights packed per second on the host (default: 1e8)")
    parser.add_argument("--disk", type=float, default=2.0, metavar="GB/S", help="speed of files (default: 2)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    args = parser.parse_args()
    _check(args)
    run, sensing, made = project(args)
    machine = speeds(args)
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    settings |= {"speeds": machine._asdict(), "revision": revision()}
    found = {"phases": run.phases, "total": run.total | made, "sensitivity_pass": sensing._asdict()}
    write_json(args.output, {"projection": True, "note": NOTE, "settings": settings} | found)
    text = f"{markdown(run, sensing, made, args)}\n\n{NOTE}"
    args.output.with_suffix(".md").write_text(f"{text}\n", encoding="utf-8")
    print(f"{text}\n\nwritten to {args.output} and {args.output.with_suffix('.md')}")


def speeds(args: argparse.Namespace) -> Gpu:
    """Returns the speeds to divide by, without efficiency: published ones where flags give no others."""
    chosen = GPUS[args.gpu]
    given = {"half_flops": args.half_tflops, "single_flops": args.single_tflops, "bandwidth": args.bandwidth}
    own = {name: value * 1e12 for name, value in given.items() if value is not None}
    return chosen._replace(**own, source=f"{chosen.source}; by flags: {', '.join(own)}") if own else chosen


class Projected(NamedTuple):
    """Phases, each with its counts and seconds, and their sums."""

    phases: list[dict[str, Any]]
    total: dict[str, Any]

    @classmethod
    def of(cls, work: Mapping[str, Any], args: argparse.Namespace) -> Projected:
        """Turns counts into seconds."""
        from lord_quant.runs.operations import total

        rows: list[dict[str, Any]] = [
            {"phase": name, "work": asdict(done), "seconds": seconds_of(done, args)} for name, done in work.items()
        ]
        seconds = {part: sum(row["seconds"][part] for row in rows) for part in rows[0]["seconds"]}
        return cls(rows, {"work": asdict(total(work.values())), "seconds": seconds})


def project(args: argparse.Namespace) -> tuple[Projected, Projected, dict[str, Any]]:
    """Returns the run, the sensitivity pass of a budget, which comes before it, and what the run makes."""
    from lord_quant.errors import LordError
    from lord_quant.losses.probe_work import count_sensing
    from lord_quant.losses.sensing import SENSED_TOKENS
    from lord_quant.runs.operations import Workload, count_phases

    try:
        plan = make_plan(args)
    except LordError as error:
        raise SystemExit(str(error)) from error
    tokens, head = args.num_samples * args.seq_len, args.vocabulary * args.width
    few = min(args.fisher_samples, args.num_samples) * args.seq_len
    load = Workload(tokens, ITEMSIZE, True, args.seq_len, few, head)
    sensing = count_sensing(plan, load._replace(fisher_tokens=min(SENSED_TOKENS, tokens)))
    made = {
        "parameters": sum(layer.dense_weights for layer in plan.layers) + head,
        "tensor_bytes": plan.tensor_bytes,
        "bpw": plan.bpw,
    }
    return Projected.of(count_phases(plan, load), args), Projected.of(sensing, args), made


def make_plan(args: argparse.Namespace) -> Any:
    """Plans the run from shapes: multi-query attention with one head of keys and values, an MLP, biases everywhere."""
    from lord_quant.config import GptqConfig, LowrankConfig
    from lord_quant.plan import build_plan
    from lord_quant.targets import LinearSite

    width, inner = args.width, args.inner
    shapes = {
        "attn.c_attn": (width, width + 2 * STARCODER["head"]),
        "attn.c_proj": (width, width),
        "mlp.c_fc": (width, inner),
        "mlp.c_proj": (inner, width),
    }
    sites = [
        LinearSite(f"transformer.h.{block}.{name}", block, inputs, outputs, True)
        for block in range(args.blocks)
        for name, (inputs, outputs) in shapes.items()
    ]
    others = ITEMSIZE * width * (args.vocabulary + args.positions + 4 * args.blocks + 2)  # embeddings, norms; tied head
    lowrank = LowrankConfig(rank_ratio=args.rank_ratio, force_rank=True)
    gptq = GptqConfig(bits=args.bits, group_size=args.group_size)
    return build_plan(sites, lowrank, gptq, itemsize=ITEMSIZE, other_bytes=others)


def seconds_of(work: Any, args: argparse.Namespace) -> dict[str, float]:
    """Returns the seconds that work implies, by what they are spent on, and their sum."""
    gpu = speeds(args)
    single = gpu.single_flops * args.efficiency
    parts = {
        "passes": work.passes / (gpu.half_flops * args.efficiency),
        "products": (work.products + work.solves) / single,
        "eigen": work.eigen / (gpu.single_flops * args.eigen_efficiency),
        "memory": work.moved / (gpu.bandwidth * args.efficiency),
        "starts": work.turns * TURN_KERNELS * args.kernel_us * 1e-6,
        "loops": work.looped * (args.loop_ns * 1e-9 + LOOP_BYTES / (args.copies * 1e9)),
        "cpu": work.rotations / (args.cpu_gflops * 1e9) + work.packed / args.pack_rate,
        "files": work.files / (args.disk * 1e9),
    }
    return parts | {"total": sum(parts.values())}


def markdown(run: Projected, sensing: Projected, made: dict[str, Any], args: argparse.Namespace) -> str:
    """Renders counts and seconds per phase."""
    title = (
        f"Projection: {made['parameters'] / 1e9:.1f}B parameters ({args.blocks} blocks, width {args.width}), "
        f"{args.num_samples} x {args.seq_len} tokens, {args.bits} bits, rank ratio {args.rank_ratio}, "
        f"{args.gpu.upper()} at {args.efficiency:.0%} of its published speeds"
    )
    before = "The sensitivity pass of a budget, before such a run and once for all budgets:"
    return f"{title}\n\n{table(run)}\n\n{before}\n\n{table(sensing)}"


def table(projected: Projected) -> str:
    """Renders phases and their sums."""
    headers = [
        "phase", "bf16 TFLOP", "fp32 TFLOP", "eigen TFLOP", "turns", "looped, G", "GB of files", "GPU, s", "starts, s",
        "loops, s", "CPU, s", "files, s", "projected, s",
    ]  # fmt: skip
    cells = [_cells(row["phase"], row["work"], row["seconds"]) for row in projected.phases]
    cells.append(_cells("total", projected.total["work"], projected.total["seconds"]))
    return grid(headers, cells)


def _cells(phase: str, work: dict[str, float], seconds: dict[str, float]) -> list[str]:
    counts = [work["passes"] / 1e12, (work["products"] + work["solves"]) / 1e12, work["eigen"] / 1e12, work["turns"]]
    counts += [work["looped"] / 1e9, work["files"] / 1e9]
    gpu = sum(seconds[part] for part in ("passes", "products", "eigen", "memory"))
    times = [gpu, *(seconds[part] for part in ("starts", "loops", "cpu", "files", "total"))]
    return [phase, *(f"{value:,.0f}" for value in [*counts, *times])]


def _check(args: argparse.Namespace) -> None:
    """Ends the program if a share or a speed cannot be meant."""
    for name in ("efficiency", "eigen_efficiency"):
        if not 0 < getattr(args, name) <= 1:
            raise SystemExit(f"--{name.replace('_', '-')} is {getattr(args, name)}; wanted a share above 0, at most 1")
    for name in ("half_tflops", "single_tflops", "bandwidth", "copies", "cpu_gflops", "pack_rate", "disk"):
        if (value := getattr(args, name)) is not None and value <= 0:
            raise SystemExit(f"--{name.replace('_', '-')} is {value}; wanted a speed above 0")
    for name in ("width", "inner", "blocks", "vocabulary", "positions", "num_samples", "seq_len"):
        if getattr(args, name) < 1:
            raise SystemExit(f"--{name.replace('_', '-')} is {getattr(args, name)}; wanted 1 at least")


if __name__ == "__main__":
    main()
