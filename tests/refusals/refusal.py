# SPDX-License-Identifier: Apache-2.0
"""What a refusal is, and the ground on which cases spoil things: copies of real files, each made when it is needed."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from in_process import run_command
from scene import Scene


Header = dict[str, Any]


class Refusal(NamedTuple):
    """A case: what is done, the error it must end in, what the message must say, in order."""

    do: Callable[[Ground], Any]
    error: str
    parts: tuple[str, ...]


class Ground:
    """A folder of a test's own, beside a scene that all tests share."""

    def __init__(self, root: Path, scene: Scene) -> None:
        self.root, self.scene = root, scene
        self.dense, self.text = scene.dense, scene.root / "text.py"

    # Files

    def file(self, name: str, content: bytes | str) -> Path:
        path = self.root / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def folder(self, name: str) -> Path:
        (self.root / name).mkdir()
        return self.root / name

    def loop(self, name: str) -> Path:
        """A link that leads back to itself."""
        (self.root / name).symlink_to(name)
        return self.root / name

    def packed(self, change: Callable[[dict[str, Any]], Any] | None = None) -> Path:
        """A copy of the compressed checkpoint, with another `quantization_config`."""
        folder = Path(shutil.copytree(self.scene.packed, self.root / "packed"))
        if change is not None:
            edit_json(folder / "config.json", lambda values: change(values["quantization_config"]))
        return folder

    def model(self, change: Callable[[dict[str, Any]], Any] | None = None) -> Path:
        """A copy of the dense model, with another configuration."""
        folder = Path(shutil.copytree(self.scene.dense, self.root / "model"))
        if change is not None:
            edit_json(folder / "config.json", change)
        return folder

    def sharded(self, index: Any = None) -> Path:
        """A copy of the compressed checkpoint in two files; `index` says what its weight map names instead of them."""
        from safetensors.torch import load_file, save_file

        folder = self.packed()
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        where = {name: names[number % 2] for number, name in enumerate(sorted(tensors))}
        for file in names:
            save_file({key: tensors[key] for key in where if where[key] == file}, folder / file, {"format": "pt"})
        text = json.dumps({"metadata": {}, "weight_map": where if index is None else index})
        (folder / "model.safetensors.index.json").write_text(text)
        return folder

    # Commands and calls

    def plan(self, *arguments: Any) -> int:
        return run_command("plan", "--model", self.dense, *arguments)

    def configured(self, text: bytes | str | Path) -> int:
        """Plans with a configuration file."""
        path = text if isinstance(text, Path) else self.file("run.yaml", text)
        return self.plan("--config", path)

    def quantize(self, *arguments: Any, model: Path | str | None = None, dataset: Path | str | None = None) -> int:
        flags = ["--model", model or self.dense, "--dataset", dataset or self.text, "--output", self.root / "output"]
        return run_command("quantize", *flags, "--num-samples", 2, "--seq-len", 32, "--group-size", 32, *arguments)

    def compress(self, **places: Path | str) -> int:
        """A run that would succeed, but for the model or the text."""
        return self.quantize("--rank-ratio", "0.5", "--force-rank", **places)

    def planned(self, text: bytes | str | Path | Callable[[dict[str, Any]], Any]) -> int:
        """Runs a plan, or the real one with a change."""
        import yaml

        if callable(text):
            values = yaml.safe_load((self.scene.root / "plan.yaml").read_text())
            text(values)
            text = yaml.safe_dump(values)
        path = text if isinstance(text, Path) else self.file("plan.yaml", text)
        flags = ["--model", self.dense, "--dataset", self.text, "--num-samples", 2, "--seq-len", 32]
        return run_command("quantize", *flags, "--plan", path, "--output", self.root / "output")

    def budgeted(self, statistics: Path) -> int:
        """Plans from statistics."""
        return self.plan("--statistics", statistics, "--target-bpw", "4.5", "--refine", "1")

    def measured(self, change: Callable[[bytes], bytes]) -> int:
        """Plans from the real statistics with other bytes."""
        return self.budgeted(self.file("model.stats", change((self.scene.root / "model.stats").read_bytes())))

    def told(self, change: Callable[[dict[str, Any]], Any] | str) -> int:
        """Plans from the real statistics with another header: a change of what it says, or another text."""

        def edit(header: Header) -> None:
            metadata = header["__metadata__"]
            if isinstance(change, str):
                metadata["lord_statistics"] = change
                return
            about = json.loads(metadata["lord_statistics"])
            change(about)
            metadata["lord_statistics"] = json.dumps(about)

        return self.measured(lambda data: edit_header(data, edit))

    def load(self, folder: Path) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder)

    def rewritten(self, change: Callable[[bytes], bytes]) -> Path:
        """A copy of the compressed checkpoint whose weights' file has other bytes."""
        path = self.packed() / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))
        return path.parent

    def retensored(self, change: Callable[[dict[str, Any]], Any]) -> Path:
        """A copy of the compressed checkpoint with other tensors."""
        from safetensors.torch import load_file, save_file

        path = self.packed() / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
        return path.parent


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_header(data: bytes, change: Callable[[Header], Any]) -> bytes:
    """Changes the header of a safetensors file, which may then be one that no library writes."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def claiming(length: int) -> Callable[[bytes], bytes]:
    """Makes a safetensors file claim a header of another length."""
    return lambda data: struct.pack("<Q", length) + data[8:]


def overlapping(header: Header) -> None:
    """Lets two tensors claim the same bytes."""
    one, other = [entry for entry in header.values() if "data_offsets" in entry][:2]
    other.update(one)


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels
