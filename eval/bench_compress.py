# SPDX-License-Identifier: Apache-2.0
"""What compressing costs: our joint run against the GPTQ of the libraries it stands on, and of its algebra alone.

Whole runs. Each is a process of its own, from the folder of the dense model to that of the compressed one, on the same
calibration windows: ours is the real command line, which streams; Optimum's `GPTQQuantizer.quantize_model` and GPTQModel's
`quantize` of the dense model are unmodified and at their defaults but for bits and group size (`plain.py`). Seconds are
those of loading, compressing and writing; wall seconds are the whole process's. Memory is peak resident memory above that
of a process that imports everything.

Layers. The truncation of single layers of given shapes against whitened SVD (`truncation.py`), in this process.

Sides take turns in going first; figures are medians over repeats. Set OMP_NUM_THREADS to choose threads.

    python eval/bench_compress.py --model DIR --calibration code.jsonl --output bench.json
    python eval/bench_compress.py --tokenizer DIR --width 2048 --blocks 4 --calibration code.jsonl --output bench-1b.json
    python eval/bench_compress.py --shapes starcoder-15b --repeats 1 --output bench-layers.json

The tables lie beside the JSON as Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import truncation
from plain import write_windows
from processes import COMMAND_LINE, IMPORTS, ProcessFailed, measured
from provenance import model_name, revision
from random_model import make_model
from tables import grid
from variants import Clock, write_json


OURS = "joint"
HOSTS = {
    "optimum": ("plain:optimum", "float32"),
    "optimum-stored": ("plain:optimum", "auto"),
    "gptqmodel": ("plain:gptqmodel", "auto"),
}
"""What runs, and in which dtype it is told to load on the CPU; on a GPU everything is in the stored one."""
TITLES = {
    OURS: "joint, decomposed",
    "optimum": "Optimum GPTQ, dense",
    "optimum-stored": "Optimum GPTQ, dense, in the stored dtype",
    "gptqmodel": "GPTQModel, dense",
}
QUANTITIES = {"seconds": "seconds", "wall_s": "wall, s", "memory_bytes": "memory, MB", "gpu_bytes": "GPU memory, MB"}
NOTE = (
    "Medians over repeats; seconds: loading, compressing, writing; wall: the whole process with its imports; memory: peak "
    "resident memory above that of a process that imports everything. Ratios are ours over theirs: below 1 ours takes less."
)


def main() -> None:
    """Runs what was asked for, prints tables, writes JSON after every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="DIR", help="folder of the dense model")
    parser.add_argument("--tokenizer", metavar="DIR", help="instead: a random model with the tokenizer of this one")
    parser.add_argument("--width", type=int, default=2048, help="hidden size of the random model (default: 2048)")
    parser.add_argument("--blocks", type=int, default=4, help="blocks of the random model (default: 4)")
    parser.add_argument("--calibration", metavar="DATA", help="calibration text: file or folder")
    parser.add_argument("--sides", nargs="+", choices=list(HOSTS), default=["optimum", "gptqmodel"], help="beside ours")
    parser.add_argument("--rank-ratio", type=float, default=0.75, help="forced on all layers (default: 0.75)")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--num-samples", type=int, default=48, help="calibration windows (default: 48)")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens per window (default: 512)")
    parser.add_argument("--shapes", choices=[*truncation.SHAPES, "none"], default="small", help="layers (default: small)")
    parser.add_argument(
        "--layers", nargs="+", choices=list(truncation.STARCODER), metavar="NAME",
        help="time only these of the layers; rows of others stay as they are in the output file, each with its revision",
    )  # fmt: skip
    parser.add_argument("--tolerance", type=float, default=1e-3, help="share by which errors may differ (default: 0.001)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    args = parser.parse_args()
    _check(args)
    clock, found = Clock(), Found(args)
    if args.model or args.tokenizer:
        with tempfile.TemporaryDirectory() as folder:
            run_models(args, Path(folder), found, clock)
    if args.shapes != "none":
        rows = truncation.compare(args.shapes, args.rank_ratio, args.repeats, args.seed, _device(), args.layers)
        rows = [row | {"revision": revision()} for row in rows]
        if args.layers:
            kept = json.loads(args.output.read_text(encoding="utf-8"))["layers"]["rows"]
            by_name = {row["layer"]: row for row in [*kept, *rows]}
            rows = [by_name[name] for name in truncation.SHAPES[args.shapes] if name in by_name]
        found.content["layers"] = {"rows": rows, "summary": truncation.summarise(rows, args.tolerance)}
    shown = found.write()
    print(f"\n{shown}\n\nwritten to {args.output} and {args.output.with_suffix('.md')} ({clock})")
    if not all(line["same_error"] for line in found.content.get("layers", {}).get("summary", [])):
        raise SystemExit(f"output errors differ by more than {args.tolerance} of themselves; the times do not compare")


class Found:
    """What was found so far: settings, runs, layers, and what they sum up to."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.output: Path = args.output
        self.content: dict[str, Any] = {"settings": settings(args)}

    def write(self) -> str:
        """Writes JSON and Markdown and returns the latter."""
        parts = []
        if runs := self.content.get("runs"):
            self.content["summary"] = summarise(runs, self.content["settings"]["baseline_bytes"])
            parts += [markdown(self.content["summary"]), NOTE]
        if layers := self.content.get("layers"):
            parts.append(truncation.markdown(layers["summary"]))
        write_json(self.output, self.content)
        text = "\n\n".join(parts)
        self.output.with_suffix(".md").write_text(f"{text}\n", encoding="utf-8")
        return text


def run_models(args: argparse.Namespace, folder: Path, found: Found, clock: Clock) -> None:
    """Compresses a model every way, as often as asked for."""
    if args.tokenizer:
        args.model = str(folder / f"random-{args.width}x{args.blocks}")
        make_model(args.tokenizer, Path(args.model), args.width, args.blocks)
    job = prepare_job(args)
    windows = folder / "windows.safetensors"
    write_windows(job.windows.input_ids, windows)
    found.content["settings"] |= {
        "model": model_name(args.model),
        "calibration": job.windows.source,
        "windows_sha256": job.windows.sha256,
        "baseline_bytes": measured(IMPORTS).peak_bytes,
    }
    runs: list[dict[str, Any]] = found.content.setdefault("runs", [])
    sides = [OURS, *args.sides]
    for repeat in range(args.repeats):
        for step in range(len(sides)):
            side = sides[(repeat + step) % len(sides)]
            output = folder / "output"
            run = run_ours(args, job, output) if side == OURS else run_host(side, args, job, windows, output)
            shutil.rmtree(output, ignore_errors=True)
            runs.append({"repeat": repeat, "turn": step, "side": side} | run)
            said = run.get("error") or f"{sum(run['phases'].values()):.1f} s"
            print(f"[{repeat + 1}/{args.repeats}] {TITLES[side]}: {said} ({clock})", flush=True)
            found.write()


def prepare_job(args: argparse.Namespace) -> Any:
    """Checks our run and samples the windows that all sides get.

    Raises:
        SystemExit: Something is wrong with it.
    """
    from lord_quant.silence import import_hosts

    import_hosts()
    import lord_quant
    from lord_quant.errors import LordError

    try:
        return lord_quant.prepare(
            lord_quant.LordConfig(
                model=args.model,
                lowrank=lord_quant.LowrankConfig(rank_ratio=args.rank_ratio, force_rank=True),
                gptq=lord_quant.GptqConfig(bits=args.bits, group_size=args.group_size),
                calibration=lord_quant.CalibrationConfig(
                    dataset=args.calibration, num_samples=args.num_samples, seq_len=args.seq_len, seed=args.seed
                ),
            )
        )
    except LordError as error:
        raise SystemExit(str(error)) from error


def run_ours(args: argparse.Namespace, job: Any, output: Path) -> dict[str, Any]:
    """Compresses the model with our command line.

    Raises:
        SystemExit: Its report names other windows than the others were given.
    """
    flags = {
        "--model": args.model, "--output": output, "--dataset": args.calibration, "--num-samples": args.num_samples,
        "--seq-len": args.seq_len, "--seed": args.seed, "--stack": OURS, "--rank-ratio": args.rank_ratio,
        "--bits": args.bits, "--group-size": args.group_size,
    }  # fmt: skip
    given = [str(part) for pair in flags.items() for part in pair]
    cost = measured(COMMAND_LINE, "lord", "quantize", *given, "--force-rank", "--no-verify")
    report = json.loads((output / "lord_report.json").read_text(encoding="utf-8"))
    if report["calibration"]["sha256"] != job.windows.sha256:
        raise SystemExit("the command line took other windows than the other sides; the times do not compare")
    phases = {name: seconds for name, seconds in report["seconds"].items() if name != "total"}
    return {"phases": phases, "wall_s": cost.wall_s, "peak_bytes": cost.peak_bytes, "gpu_bytes": cost.gpu_bytes}


def run_host(side: str, args: argparse.Namespace, job: Any, windows: Path, output: Path) -> dict[str, Any]:
    """Compresses the dense model with another library; its error instead, if it cannot.

    Raises:
        SystemExit: It left a linear layer as it was, so the times do not compare.
    """
    entry, dtype = HOSTS[side]
    flags = {
        "--model": args.model, "--output": output, "--windows": windows, "--bits": args.bits,
        "--group-size": args.group_size, "--dtype": dtype if _device() == "cpu" else "auto",
    }  # fmt: skip
    try:
        cost = measured(entry, *(str(part) for pair in flags.items() for part in pair), environment=_environment())
    except ProcessFailed as error:
        return {"error": error.reason.splitlines()[0]}
    packed, wanted = cost.returned["packed"], len(job.plan.layers)
    if packed != wanted:
        raise SystemExit(f"{TITLES[side]} quantized {packed} linear layers; wanted {wanted}")
    phases = cost.returned["seconds"]
    return {"phases": phases, "wall_s": cost.wall_s, "peak_bytes": cost.peak_bytes, "gpu_bytes": cost.gpu_bytes}


def _environment() -> dict[str, str]:
    """What the other libraries run with: no C++ extension is compiled for packing, as in ours."""
    few = (os.cpu_count() or 1) < 3  # GPTQModel's own choice of workers is then below what it asks for, an error
    return {"GPTQMODEL_DISABLE_PACK_EXT": "1"} | ({"GPTQMODEL_CPU_WORKERS": "2"} if few else {})


def summarise(runs: Sequence[dict[str, Any]], baseline: int) -> dict[str, Any]:
    """Returns medians and ranges of every side, and how ours compares, repeat by repeat.

    Args:
        runs: What was run.
        baseline: Peak resident bytes of a process that only imports.
    """
    summary: dict[str, Any] = {}
    own = {side: [run for run in runs if run["side"] == side] for side in dict.fromkeys(run["side"] for run in runs)}
    for side, mine in own.items():
        if failed := [run["error"] for run in mine if "error" in run]:
            summary[side] = {"error": failed[0]}
            continue
        values = [_quantities(run, baseline) for run in mine]
        names = dict.fromkeys(name for run in mine for name in run["phases"])
        summary[side] = {
            **{name: _middle([value[name] for value in values]) for name in QUANTITIES},
            "phases": {name: median(run["phases"].get(name, 0.0) for run in mine) for name in names},
        }
        if side != OURS and OURS in own:
            by_repeat = {run["repeat"]: _quantities(run, baseline) for run in own[OURS]}
            pairs = [(by_repeat[run["repeat"]], _quantities(run, baseline)) for run in mine if run["repeat"] in by_repeat]
            summary[side]["ratios"] = {name: _ratio([(a[name], b[name]) for a, b in pairs]) for name in QUANTITIES}
    return summary


def _quantities(run: dict[str, Any], baseline: int) -> dict[str, float | None]:
    seconds = sum(run["phases"].values())
    return {"seconds": seconds, "wall_s": run["wall_s"], "memory_bytes": run["peak_bytes"] - baseline} | {
        "gpu_bytes": run["gpu_bytes"]
    }


def _middle(values: Sequence[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    return {"median": median(known), "min": min(known), "max": max(known)} if known else None


def _ratio(pairs: Sequence[tuple[float | None, float | None]]) -> dict[str, float] | None:
    """Returns the ratio of medians, and the smallest and largest one within a repeat."""
    known = [(a, b) for a, b in pairs if a is not None and b]
    if not known:
        return None
    each = [a / b for a, b in known]
    return {"of_medians": median(a for a, _ in known) / median(b for _, b in known), "min": min(each), "max": max(each)}


def markdown(summary: dict[str, Any]) -> str:
    """Renders the summary: what every side took, how ours compares, and seconds per phase."""
    done = {side: found for side, found in summary.items() if "error" not in found}
    used = [name for name in QUANTITIES if any(found[name] is not None for found in done.values())]
    lines = [[TITLES[side], *(_cell(name, found[name]) for name in used)] for side, found in done.items()]
    lines += [
        [f"ratio to {TITLES[side]}", *(_ratio_cell(found["ratios"][name]) for name in used)]
        for side, found in done.items()
        if "ratios" in found
    ]
    parts = [grid(["", *(QUANTITIES[name] for name in used)], lines)] if lines else []
    parts += [f"{TITLES[side]} failed: `{found['error']}`" for side, found in summary.items() if "error" in found]
    names = dict.fromkeys(name for found in done.values() for name in found["phases"])
    phases = [[TITLES[side], *(_seconds(found["phases"].get(name)) for name in names)] for side, found in done.items()]
    return "\n\n".join([*parts, grid(["seconds", *names], phases)] if phases else parts)


def _cell(name: str, values: dict[str, float] | None) -> str:
    if values is None:
        return "-"
    unit, form = (1e6, ".0f") if name.endswith("bytes") else (1, ".1f")
    low, middle, high = (values[key] / unit for key in ("min", "median", "max"))
    return f"{middle:{form}} ({low:{form}} … {high:{form}})"


def _ratio_cell(values: dict[str, float] | None) -> str:
    return "-" if values is None else f"{values['of_medians']:.2f} ({values['min']:.2f} … {values['max']:.2f})"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what was run, where; paths are not published."""
    import torch

    from lord_quant.version import __version__

    values = {key: value for key, value in vars(args).items() if key not in ("output", "model", "tokenizer", "calibration")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    versions = {name: version(name) for name in ("torch", "transformers", "optimum", "gptqmodel")}
    values |= {"device": device, "threads": torch.get_num_threads(), "revision": revision()}
    return values | {"versions": versions | {"lord-quant": __version__}}


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _check(args: argparse.Namespace) -> None:
    """Ends the program if flags do not fit together."""
    if args.model and args.tokenizer:
        raise SystemExit("--model and --tokenizer; wanted one of them: a model, or a random one with a model's tokenizer")
    if (args.model or args.tokenizer) and not args.calibration:
        raise SystemExit("no --calibration; wanted text to compress a model with")
    if not (args.model or args.tokenizer) and args.shapes == "none":
        raise SystemExit("nothing to do; wanted --model, --tokenizer or --shapes")
    if args.repeats < 1:
        raise SystemExit(f"--repeats is {args.repeats}; wanted 1 at least")


if __name__ == "__main__":
    main()
