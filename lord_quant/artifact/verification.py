# SPDX-License-Identifier: Apache-2.0
"""Whether a checkpoint is what was written, and loads: looked at again, file by file, tensor by tensor, and run.

* Files: each has the hash that was recorded when it was written (`manifest.py`); what differs is named.
* Tensors: one at a time, floats are finite, packed layers have the dtypes and shapes of their format, indices are in range.
* Model: `from_pretrained` loads it, as a user would but in float32, on the CPU with the host's kernels, and its logits on a
  few fixed tokens are finite and those of the model that was compressed, in float before packing (`fingerprint.py`).

After a run a fresh process does the last two before the folder is put in place: it holds the packed model, the run not.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lord_quant.artifact.fingerprint import TOLERANCE, Fingerprint, fingerprint_of
from lord_quant.artifact.manifest import MANIFEST_NAME, changed_files, read_manifest
from lord_quant.checkpoint import REPORT_NAME
from lord_quant.errors import CheckpointError, LordError
from lord_quant.files.headers import read_headers, weight_files
from lord_quant.files.packing import WORD
from lord_quant.files.reading import open_tensors
from lord_quant.linalg import is_finite


MOST = 10
"""Problems that a message names."""
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells a process that the fresh one must not hear."""
START = "from lord_quant.artifact.verification import main; main()"
INTEGERS = {"qweight": "I32", "qzeros": "I32", "g_idx": "I32"}
"""dtype of the packed parts that are no floats."""


class Verified(NamedTuple):
    """What was found out about a checkpoint with which nothing is wrong.

    Attributes:
        files: Files whose hashes are those recorded; 0 where none were compared.
        tensors: Tensors looked at.
        difference: By how much logits differ from the compressed model's, as a share of their spread; None where those
            were not recorded.
    """

    files: int
    tensors: int
    difference: float | None

    @classmethod
    def of(cls, report: Mapping[str, Any]) -> Verified:
        """Reads what a run's report says of it."""
        return cls(0, report["verified"]["tensors"], report["verified"]["difference"])

    def tell(self) -> str:
        """Renders it in a line."""
        parts = [f"{self.files} files as written"] * bool(self.files)
        parts.append(f"{self.tensors} tensors sound")
        logits = "loads with finite logits, to be compared with none"
        if self.difference is not None:
            logits = f"loads, logits within {self.difference:.2%} of the compressed model's (at most {TOLERANCE:.0%})"
        return ", ".join([*parts, logits])


def verify(folder: str | Path) -> Verified:
    """Verifies a checkpoint folder in this process, from its files to its logits.

    Raises:
        CheckpointError: Something is wrong; it is named, up to ten things of a kind.
    """
    path = Path(folder)
    manifest = read_manifest(path)
    if manifest is None and (path / REPORT_NAME).exists():
        raise CheckpointError(f"{str(folder)!r} is not what was written:\n  {MANIFEST_NAME}: missing")
    if manifest is not None:
        _require(changed_files(path, manifest), f"{str(folder)!r} is not what was written:")
    tensors, found = examine(path)
    reference = None if manifest is None else manifest.fingerprint
    return Verified(0 if manifest is None else len(manifest.files), tensors, compared(reference, found))


def verify_afresh(folder: Path, reference: Fingerprint | None) -> Verified:
    """Verifies tensors and model in a fresh process; files are being written.

    Args:
        folder: The checkpoint folder.
        reference: What the compressed model said in float, or None.

    Raises:
        CheckpointError: It cannot be loaded, or says something else.
        OSError: There is no room beside it for what the process says.
    """
    # Beside what is written, where there is room, and removed by the next run if this one is killed.
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}-", dir=folder.parent) as scratch:
        result = Path(scratch) / "result.json"
        done = subprocess.run(
            [sys.executable, "-c", START, str(folder.resolve()), str(result)],
            capture_output=True, text=True, errors="replace", cwd=scratch, env=_environment(), check=False,
        )  # fmt: skip
        try:
            found = json.loads(result.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            found = {"error": f"the process ended with exit code {done.returncode}: {last}"}
    if "error" in found:
        raise CheckpointError(f"what was written cannot be read back: {found['error']}")
    return Verified(0, found["tensors"], compared(reference, Fingerprint.from_dict(found["fingerprint"])))


def examine(folder: Path) -> tuple[int, Fingerprint]:
    """Looks at every tensor, loads the model and runs it; returns how many there are, and its fingerprint.

    Raises:
        CheckpointError: A tensor is illegal, the model cannot be loaded, or its logits hold NaN or inf.
    """
    files = weight_files(folder)
    _require(tensor_problems(files), f"{str(folder)!r} holds illegal tensors:")
    return len(read_headers(files)), _loaded(folder)


def compared(reference: Fingerprint | None, found: Fingerprint) -> float | None:
    """Returns by how much logits differ, None where there is nothing to compare them with.

    Raises:
        CheckpointError: They differ by more than kernels may.
    """
    if reference is None:
        return None
    difference = reference.difference(found)
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"what was read back is not what was compressed: logits on {len(found.tokens)} fixed tokens differ by "
            f"{difference:.3g} of their spread; wanted at most {TOLERANCE}"
        )
    return difference


def tensor_problems(files: Sequence[str]) -> Iterator[str]:
    """Names tensors that no checkpoint may hold; reads them one at a time."""
    headers = read_headers(list(files))
    for file in files:
        with open_tensors(file) as handle:
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                owner, _, leaf = name.rpartition(".")
                yield from _of_tensor(
                    name, handle.get_tensor(name), headers.get(f"{owner}.scales") if leaf == "g_idx" else None
                )
    for name in headers:
        if name.endswith(".qweight"):
            yield from _of_packed(name.removesuffix(".qweight"), headers)


def _of_tensor(name: str, tensor: torch.Tensor, scales: tuple[Any, ...] | None) -> Iterator[str]:
    if tensor.is_floating_point() and not is_finite(tensor):
        yield f"{name}: {int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} values are NaN or inf"
    if name.endswith(".order") and not torch.equal(tensor.long().sort().values, torch.arange(len(tensor))):
        yield f"{name}: no order of {len(tensor)} features"
    if scales is not None and tensor.numel() and not 0 <= int(tensor.min()) <= int(tensor.max()) < scales[0][0]:
        yield f"{name}: groups {int(tensor.min())} to {int(tensor.max())}; there are {scales[0][0]}"


def _of_packed(layer: str, headers: Mapping[str, tuple[tuple[int, ...], str, int]]) -> Iterator[str]:
    """Names what does not fit together in one packed layer."""
    parts = {
        leaf: headers[f"{layer}.{leaf}"]
        for leaf in ("qweight", "qzeros", "scales", "g_idx")
        if f"{layer}.{leaf}" in headers
    }
    for leaf, wanted in INTEGERS.items():
        if leaf in parts and parts[leaf][1] != wanted:
            yield f"{layer}.{leaf}: dtype {parts[leaf][1]}; wanted {wanted}"
    if "scales" in parts and not parts["scales"][1].startswith(("F", "BF")):
        yield f"{layer}.scales: dtype {parts['scales'][1]}; wanted floats"
    if len(parts) < 4:
        return  # other methods than ours leave indices out
    (words, outputs), (groups, zeros), (rows, columns), (inputs,) = (
        parts[leaf][0] for leaf in ("qweight", "qzeros", "scales", "g_idx")
    )
    bits = WORD * words / inputs
    if (groups, outputs) != (rows, columns) or zeros != math.ceil(outputs * bits / WORD):
        shapes = ", ".join(f"{leaf} {part[0]}" for leaf, part in parts.items())
        yield f"{layer}: shapes do not fit together: {shapes}"


def _loaded(folder: Path) -> Fingerprint:
    from transformers import AutoModelForCausalLM

    from lord_quant import register
    from lord_quant.silence import hush, import_hosts

    import_hosts()
    register()
    try:
        with hush("transformers"):
            return fingerprint_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
    except LordError as error:
        raise CheckpointError(str(error)) from error
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:  # hosts raise what they like
        raise CheckpointError(f"{str(folder)!r} cannot be loaded: {type(error).__name__}: {error}") from error


def _require(problems: Iterator[str], title: str) -> None:
    found = list(problems)
    if found:
        more = [f"… and {len(found) - MOST} more"] if len(found) > MOST else []
        raise CheckpointError("\n  ".join([title, *found[:MOST], *more]))


def _environment() -> dict[str, str]:
    """Returns the variables of the fresh process, which is alone and computes on the CPU."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER and "TORCHELASTIC" not in name}
    if kept.get("PYTHONPATH"):  # the process has another current folder
        kept["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, kept["PYTHONPATH"].split(os.pathsep)))
    return kept | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def main() -> None:
    """Examines the folder named first and writes what was found as JSON into the file named second."""
    folder, result = map(Path, sys.argv[1:])
    found: dict[str, Any]
    try:
        tensors, fingerprint = examine(folder)
        found = {"tensors": tensors, "fingerprint": fingerprint.to_dict()}
    except LordError as error:
        found = {"error": str(error)}
    result.write_text(json.dumps(found), encoding="utf-8")
