# SPDX-License-Identifier: Apache-2.0
"""Rows of the comparison tables: each is a checkpoint made by the real command line and measured in a fresh process.

A script lists its rows and calls `run_rows`. A finished row goes into the results file at once, and a row that is there
already is not made again, so a run that was cut off goes on when it is started again with the same --output. A results
file holds rows of one calibration and one evaluation only; other settings are refused. Temporary checkpoints lie where
TMPDIR says and are deleted when measured.

Measuring one folder by itself prints one line of JSON:

    python eval/rows.py --measure DIR --heldout other.jsonl --seq-len 512 --windows 320
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from threading import Lock
from typing import Any

from provenance import digests, model_name, revision
from variants import Clock, Variant, compress, lord, write_json


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        model: Folder of the dense model.
        label: Its name in the table.
        flags: Flags of `quantize` beyond calibration and seed; None for the dense model itself.
        seed: Seed of the calibration sample; 0 for the dense model, which has none.
    """

    model: str
    label: str
    flags: tuple[str, ...] | None
    seed: int

    def key(self) -> dict[str, Any]:
        """Returns what identifies the row in a results file; of the model only its name, paths are not published."""
        flags = None if self.flags is None else list(self.flags)
        return {"model": model_name(self.model), "label": self.label, "flags": flags, "seed": self.seed}

    def __str__(self) -> str:
        seed = "" if self.flags is None else f", seed {self.seed}"
        return f"{model_name(self.model)}, {self.label}{seed}"


@dataclass(frozen=True)
class Settings:
    """What all rows of a results file share.

    Attributes:
        calibration: Calibration text, anything `load_corpus` takes.
        heldout: Held-out text; that it shares nothing with the former is the caller's responsibility.
        num_samples: Calibration windows.
        seq_len: Tokens of one window, for calibration and evaluation alike.
        windows: Held-out windows.
        humaneval: Also measure greedy pass@1; this runs generated code.
    """

    calibration: str
    heldout: str
    num_samples: int
    seq_len: int
    windows: int
    humaneval: bool

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Settings:
        """Takes the settings from the flags of `add_arguments`."""
        return cls(args.calibration, args.heldout, args.num_samples, args.seq_len, args.windows, args.humaneval)

    def published(self) -> dict[str, Any]:
        """Returns the settings with digests of the texts instead of their paths."""
        from lord_quant.corpus import load_corpus

        values = asdict(self)
        texts = {
            "calibration": load_corpus(self.calibration, split="calibration"),
            "heldout": load_corpus(self.heldout, split="heldout"),
        }
        for name, corpus in texts.items():
            values |= {name: corpus.source, f"{name}_sha256": corpus.sha256}
        if values["calibration_sha256"] == values["heldout_sha256"]:
            raise SystemExit("calibration and held-out text are the same; wanted disjoint ones")
        return values


def add_arguments(parser: argparse.ArgumentParser, seeds: Sequence[int]) -> None:
    """Adds the flags that all scripts share."""
    parser.add_argument("--calibration", required=True, metavar="DATA", help="calibration text: file or folder")
    parser.add_argument("--heldout", required=True, metavar="DATA", help="text for perplexity, disjoint from the former")
    parser.add_argument("--num-samples", type=int, default=48, help="calibration windows (default: 48)")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens per window (default: 512)")
    parser.add_argument("--windows", type=int, default=320, help="held-out windows of --seq-len tokens (default: 320)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=list(seeds), help="calibration seeds (default: %(default)s)"
    )
    parser.add_argument("--humaneval", action="store_true", help="also greedy pass@1; runs generated code in a sandbox")
    parser.add_argument("--workers", type=int, default=2, help="rows at a time, one thread each if several (default: 2)")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE.json", help="results; a table with the same name goes beside it"
    )


class Results:
    """A results file: rows are added as they finish, and the whole file is replaced in one step each time."""

    def __init__(self, path: Path, settings: dict[str, Any], models: dict[str, str]) -> None:
        """Opens a results file, or starts one.

        Args:
            path: The file.
            settings: What all of its rows share.
            models: Digest by model name.

        Raises:
            SystemExit: The file holds rows of other settings or of another model with the same name.
        """
        self.path, self.rows = path, list[dict[str, Any]]()
        self.content: dict[str, Any] = {"settings": settings, "models": dict(models)}
        if not path.exists():
            return
        old = json.loads(path.read_text(encoding="utf-8"))
        before, known = old.get("settings", {}), old.get("models", {})
        other = [f"  {name}: {before.get(name)!r}, now {value!r}" for name, value in settings.items()
                 if name not in before or before[name] != value]  # fmt: skip
        other += [f"  model {name} is not the same" for name in models.keys() & known.keys() if models[name] != known[name]]
        if other:
            shown = "\n".join(other)
            raise SystemExit(f"{path} holds rows made otherwise; choose another --output or move it away:\n{shown}")
        self.content["models"] = known | models
        self.rows = old["rows"]

    def find(self, row: Row) -> dict[str, Any] | None:
        """Returns the finished row, or None."""
        key = row.key()
        return next((found for found in self.rows if {name: found.get(name) for name in key} == key), None)

    def by_seed(self, rows: Iterable[Row], label: str) -> dict[int, dict[str, Any]]:
        """Returns the finished rows of a label by seed."""
        wanted = (row for row in rows if row.label == label)
        return {row.seed: found for row in wanted if (found := self.find(row)) is not None}

    def add(self, row: Row, scores: dict[str, Any]) -> None:
        """Adds a finished row and writes the file."""
        self.rows.append(row.key() | scores)
        self.write()

    def write(self) -> None:
        """Writes the file."""
        write_json(self.path, self.content | {"rows": self.rows})

    def finish(self, rows: Iterable[Row], summary: dict[str, Any], tables: str) -> None:
        """Puts the rows into the order of the tables, and adds the summary and the Markdown file with the tables."""
        order = {json.dumps(row.key()): index for index, row in enumerate(rows)}
        names = ("model", "label", "flags", "seed")
        self.rows.sort(key=lambda row: order.get(json.dumps({name: row[name] for name in names}), len(order)))
        self.content["summary"] = summary
        self.write()
        self.path.with_suffix(".md").write_text(f"{tables}\n", encoding="utf-8")
        print(f"\n{tables}\n\nwritten to {self.path} and {self.path.with_suffix('.md')}")


def run_rows(rows: Sequence[Row], settings: Settings, output: Path, workers: int, *, make: bool = True) -> Results:
    """Makes and measures the rows that the results file does not hold yet, `workers` at a time; or leaves them out.

    Raises:
        SystemExit: The file holds something else, rows failed (the others are finished first), or an interrupt.
    """
    rows, clock = list(dict.fromkeys(rows)), Clock()
    results = Results(output, settings.published(), digests(row.model for row in rows))
    todo = [row for row in rows if make and results.find(row) is None]
    stale = [str(row) for row in rows if (old := results.find(row)) is not None and made_without_options(old)]
    if stale:
        shown = "\n  ".join(stale)
        raise SystemExit(f"{output} holds rows of a joint stack with other options than today's; remove them:\n  {shown}")
    current = revision()
    found = [results.find(row) for row in rows]
    old = sum(row is not None and row["revision"] != current for row in found)
    print(f"{len(rows)} rows: {len(rows) - len(todo)} are in {output}, {len(todo)} to make, {workers} at once", flush=True)
    if old:
        print(f"warning: {old} of the rows in the file were made by another revision than {current}", file=sys.stderr)
    failed = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        statistics = SharedStatistics(folder)
        jobs = {pool.submit(run_row, row, settings, statistics, one_thread=workers > 1): row for row in todo}
        try:
            for count, job in enumerate(as_completed(jobs), 1):
                row, error = jobs[job], job.exception()
                if error is not None:
                    failed.append(str(row))
                    print(f"[{count}/{len(todo)}] {row} FAILED: {error}", file=sys.stderr, flush=True)
                    continue
                scores = job.result()
                results.add(row, scores)
                print(f"[{count}/{len(todo)}] {row}: {describe(scores)} ({clock} so far)", flush=True)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)  # no row starts any more
            raise SystemExit(f"interrupted; the same command goes on from what is in {output}") from None
    if failed:
        raise SystemExit(
            f"{len(failed)} rows failed, see above; the same command makes them again:\n  " + "\n  ".join(failed)
        )
    return results


def made_without_options(row: dict[str, Any]) -> bool:
    """Tells whether a joint row is older than an option of the joint stack, whose default its flags now mean."""
    from lord_quant.config import JointConfig

    config = row.get("config", {})
    return config.get("stack") == "joint" and set(config["joint"]) != {field.name for field in fields(JointConfig)}


def describe(scores: dict[str, Any]) -> str:
    """Renders a finished row for the progress line."""
    passed = f", pass@1 {scores['pass@1']:.3f}" if "pass@1" in scores else ""
    seconds = "" if scores["seconds"] is None else f", {scores['seconds']:.0f} s to compress"
    return f"bpw {scores['bpw']:.3f}, perplexity {scores['perplexity']:.3f}{passed}{seconds}"


class SharedStatistics:
    """The sensitivity pass of a model and seed, made once for all rows that have a budget."""

    def __init__(self, folder: str) -> None:
        self.folder, self.lock = Path(folder), Lock()

    def flags(self, row: Row, common: tuple[str, ...], environment: dict[str, str]) -> tuple[str, ...]:
        """Returns what a row's command line is given beside its own flags; makes the file if it is the first to ask."""
        if row.flags is None or "--target-bpw" not in row.flags:
            return ()
        with self.lock:
            path = self.folder / f"{model_name(row.model)}-{row.seed}.stats"
            if not path.exists():
                lord(
                    "sensitivity", "--model", row.model, "--output", str(path), *common, quiet=True, environment=environment
                )
        return ("--statistics", str(path))


def run_row(row: Row, settings: Settings, statistics: SharedStatistics, *, one_thread: bool) -> dict[str, Any]:
    """Makes one checkpoint and measures it, in processes of their own.

    Raises:
        SystemExit: One of them failed; the message holds what it printed.
    """
    made_by = revision()
    environment = {"TQDM_DISABLE": "1"} | ({"OMP_NUM_THREADS": "1"} if one_thread else {})
    # Unpacking layers once instead of at every call changes no bit of the result.
    evaluation = environment | {"GPTQ_TORCH_CACHE_WEIGHTS": "1"}
    common: tuple[str, ...] = ("--dataset", settings.calibration, "--num-samples", str(settings.num_samples))
    common += ("--seq-len", str(settings.seq_len), "--seed", str(row.seed))
    with tempfile.TemporaryDirectory() as folder:
        variant = Variant("checkpoint", row.flags)
        common += statistics.flags(row, common, environment)
        where, seconds = compress(variant, row.model, Path(folder), common, quiet=True, environment=environment)
        scores = measure_fresh(where, settings, evaluation)
        if settings.humaneval:
            scores["pass@1"] = pass_at_1(where, Path(folder) / "humaneval.json", evaluation)
        threads = 1 if one_thread else int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
        config = {} if row.flags is None else {"config": effective_config(Path(where))}
    return scores | {"seconds": seconds, "threads": threads, "revision": made_by} | config


def measure_fresh(where: str, settings: Settings, environment: dict[str, str]) -> dict[str, Any]:
    """Measures a folder in a process that had no part in making it."""
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", where, "--heldout", settings.heldout]
    command += ["--seq-len", str(settings.seq_len), "--windows", str(settings.windows)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)
    if done.returncode:
        raise SystemExit(f"measuring failed with exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def pass_at_1(where: str, output: Path, environment: dict[str, str]) -> float:
    """Returns greedy HumanEval pass@1 of a folder, from the real command line."""
    flags = ("--dtype", "float32", "--batch-size", "41", "--confirm-run-unsafe-code", "--output", str(output))
    lord("eval", "--model", where, "--tasks", "lord_humaneval", *flags, quiet=True, environment=environment)
    return float(json.loads(output.read_text(encoding="utf-8"))["metrics"]["lord_humaneval"]["pass@1"])


def effective_config(folder: Path) -> dict[str, Any]:
    """Returns the settings that made a checkpoint, defaults included, without what the results file says already."""
    config = json.loads((folder / "lord_report.json").read_text(encoding="utf-8"))["config"]
    return {key: value for key, value in config.items() if key not in ("model", "output", "calibration")}


def measure(folder: str, heldout: str, seq_len: int, windows: int) -> dict[str, Any]:
    """Loads a checkpoint as any user would; returns what is stored, from its files' headers, and its perplexity."""
    import torch

    from lord_quant.silence import import_hosts

    import_hosts()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import lord_quant
    from lord_quant.corpus import load_corpus
    from lord_quant.evaluation.perplexity import corpus_perplexity

    stored = lord_quant.measure(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer, corpus = AutoTokenizer.from_pretrained(folder), load_corpus(heldout, split="heldout")
    result = corpus_perplexity(model, tokenizer, corpus, window=seq_len, max_windows=windows, batch_size=8)
    return {
        "bpw": stored.bpw,
        "tensor_bytes": stored.tensor_bytes,
        "file_bytes": stored.file_bytes,
        "perplexity": result.perplexity,
        "num_tokens": result.num_tokens,
    }


def main() -> None:
    """Measures one folder and prints one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", required=True, metavar="DIR", help="checkpoint folder, dense or compressed")
    parser.add_argument("--heldout", required=True, metavar="DATA")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=320)
    args = parser.parse_args()
    print(json.dumps(measure(args.measure, args.heldout, args.seq_len, args.windows)))


if __name__ == "__main__":
    main()
