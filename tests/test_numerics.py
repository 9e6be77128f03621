# SPDX-License-Identifier: Apache-2.0
"""Faults of numbers, each at its place, through whole runs: an error that names the place and leaves nothing, or a finished
checkpoint whose remedy is in the report and whose reloaded model is finite and says what the compressed one said."""

from __future__ import annotations

import gc
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from families import copy_tokenizer, edit_tensors
from models import tiny_model

from lord_quant.artifact.fingerprint import TOLERANCE
from lord_quant.artifact.verification import examine, verify
from lord_quant.blocks import gradients
from lord_quant.blocks.source import load_model
from lord_quant.config import LordConfig
from lord_quant.errors import NumericsError
from lord_quant.runs.execution import execute
from lord_quant.runs.pipeline import compress_model, prepare


EVERYWHERE = os.environ.get("LORD_QUANT_FAULTS") == "all"
"""Whether faults meet every scheme named with them, or only the first: that takes a third of the time."""
Tensors = dict[str, torch.Tensor]
B = "model.layers.1."
V, OUT, UP, DOWN, GATE = (
    f"{B}{name}_proj.weight" for name in ("self_attn.v", "self_attn.o", "mlp.up", "mlp.down", "mlp.gate")
)
NORM = f"{B}input_layernorm.weight"
H = "transformer.h.1."
SCHEMES: dict[str, dict[str, Any]] = {
    "factors": {"gptq": {"bits": 4, "group_size": 32}, "lowrank": {"rank_ratio": 0.5, "force_rank": True}},
    "pivoted": {"gptq": {"bits": 4, "group_size": 32}, "lowrank": {"rank_ratio": 0.5, "form": "pivoted"}},
    "grouped": {"gptq": {"bits": 4, "group_size": 32}, "lowrank": {"rank_ratio": 0.5, "form": "grouped"}},
    "float": {"gptq": {"bits": 16, "group_size": 32}, "lowrank": {"rank_ratio": 0.5, "force_rank": True}},
    "dense": {"gptq": {"bits": 4, "group_size": 32}, "lowrank": {"rank_ratio": 1}},
    "2 bits": {"gptq": {"bits": 2, "group_size": 32}, "lowrank": {"rank_ratio": 1}},
}


class Case(NamedTuple):
    """A fault, and what has to come of it.

    Attributes:
        family: Of the model.
        spoil: What is done to its tensors.
        refused: What the error says, or None if the run survives.
        remedies: What the report's remedies say, one after the other.
        schemes: How the model is compressed, see `EVERYWHERE`.
        kept: Layers that stay dense and unpacked in every scheme.
        settings: Further settings of the run.
    """

    family: str
    spoil: Callable[[Tensors], Any]
    refused: str | None = None
    remedies: tuple[str, ...] = ()
    schemes: tuple[str, ...] = ("factors", "dense")
    kept: frozenset[str] = frozenset()
    settings: tuple[tuple[str, Any], ...] = ()


def first(name: str, value: float) -> Callable[[Tensors], Any]:
    """One value of a tensor becomes another."""
    return lambda tensors: tensors[name].view(-1)[:1].fill_(value)


def scaled(**factors: float) -> Callable[[Tensors], Any]:
    """Tensors are multiplied; `v=1e7, o=1e-7` leaves the model what it was."""
    names = {"v": V, "o": OUT, "up": UP, "down": DOWN, "gate": GATE, "norm": NORM}
    return lambda tensors: [tensors[names[name]].mul_(factor) for name, factor in factors.items()]


def duplicated(tensors: Tensors) -> None:
    """Every second channel of all hidden states is the one before it."""
    for name, tensor in tensors.items():
        if name.endswith(("embed_tokens.weight",)):
            tensor[:, 1::2] = tensor[:, ::2]
        elif name.endswith(("norm.weight", "o_proj.weight", "down_proj.weight")):
            tensor[1::2] = tensor[::2]


def silent_block(tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        if name.startswith(B):
            tensor.zero_()


def constant(tensors: Tensors) -> None:
    """The outputs of a layer are its bias."""
    tensors[f"{H}mlp.c_fc.weight"].zero_()


def loud_bias(tensors: Tensors) -> None:
    """A bias that fits, but not what outputs predicted from others need of it."""
    bias = tensors[f"{H}mlp.c_proj.bias"]
    bias.copy_(2e4 * torch.randn(len(bias), generator=torch.Generator().manual_seed(0)).sign())


def nothing(tensors: Tensors) -> None:
    """The fault is elsewhere."""


NAN, INF = float("nan"), float("inf")
KEPT, ZERO, SOME = "kept dense and unpacked: ", "all inputs never vary", "some inputs never vary"
CASES = {
    "NaN in attention": Case("llama", first(V, NAN), rf"weight '{V}'.*: 1 of \d+ values are NaN"),
    "NaN in the MLP": Case("llama", first(DOWN, NAN), rf"weight '{DOWN}'", schemes=("dense",)),
    "NaN in the embedding": Case("llama", first("model.embed_tokens.weight", NAN), r"weight 'model\.embed_tokens\.weight'"),
    "NaN in a norm": Case("llama", first(NORM, NAN), rf"weight '{NORM}'", schemes=("dense",)),
    "NaN in the head": Case("llama", first("lm_head.weight", -INF), r"weight 'lm_head\.weight'", schemes=("dense",)),
    "inf in a bias": Case("gpt2", first(f"{H}attn.c_attn.bias", INF), rf"weight '{H}attn\.c_attn\.bias'"),
    "activations that overflow": Case("llama", scaled(v=1e38, norm=1e3), r"layers\.1", schemes=("factors", "dense")),
    "a weight of 1e30": Case("llama", first(DOWN, 1e30), None, (f"{KEPT}scales",), kept=frozenset({DOWN})),
    "squares that overflow": Case(
        "llama", scaled(up=1e22, down=1e-22), None, ("moments in float64",), ("dense",), frozenset({UP})
    ),
    "a layer of zeros": Case("llama", scaled(v=0), None, (ZERO,)),
    "a block of zeros": Case("llama", silent_block, None, (ZERO,), ("factors", "pivoted", "grouped", "2 bits")),
    "activations of 1e-20": Case("llama", scaled(norm=1e-20), None, (), ("factors", "pivoted", "dense")),
    "dead channels": Case("llama", lambda t: t[NORM][:10].zero_(), None, (SOME,)),
    "all channels dead": Case("llama", scaled(norm=0), None, (ZERO,), ("factors", "pivoted")),
    "duplicated channels": Case("llama", duplicated, None, (), ("factors", "pivoted", "grouped", "dense")),
    "constant outputs": Case("gpt2", constant, None, ()),
    "scales that overflow": Case(
        "llama", scaled(v=1e7, o=1e-7), None, (f"{KEPT}scales stored as float16",), ("dense", "2 bits"), frozenset({V})
    ),
    "scales of factors that overflow": Case(
        "llama", scaled(v=1e14, o=1e-14), None, (f"{KEPT}scales stored as float16",), ("factors", "grouped")
    ),
    "bias that overflows float16": Case(
        "gpt2", first(f"{H}attn.c_attn.bias", 1e6), None, (f"{KEPT}bias.* stored as float16",),
        kept=frozenset({f"{H}attn.c_attn.weight"}),
    ),
    "bias of a factor that overflows float16": Case(
        "gpt2", loud_bias, None, (f"{KEPT}bias of factor up stored as float16",), ("pivoted",),
        kept=frozenset({f"{H}mlp.c_proj.weight"}),
    ),
    "float factors of any size": Case("llama", scaled(v=1e14, o=1e-14), None, (), ("float",)),
    "weights too small for scales": Case(
        "llama", scaled(v=1e-10, o=1e10), None, (f"{KEPT}.* a layer of zeros loses 1",), ("dense",), frozenset({V, OUT})
    ),
    "subnormal weights": Case("llama", scaled(up=1e-40), None, (), ("dense",)),
    "bfloat16 at its end": Case(
        "llama", first(DOWN, 3e38), r"hidden states behind model\.layers\.1 .*12 of 6144 values are NaN", (), ("dense",),
        settings=(("dtype", "bfloat16"),),
    ),
    "stored in float16": Case("llama", scaled(v=1e3, o=1e-3), None, (), settings=(("dtype", "float16"),)),
    "stored in bfloat16": Case("llama", scaled(v=1e3, o=1e-3), None, (), ("dense",), settings=(("dtype", "bfloat16"),)),
    "beyond float16": Case(
        "llama", first(UP, 1e6), r"weight' stored as torch\.float16", (), ("dense",), settings=(("dtype", "float16"),)
    ),
    "identical tokens": Case("llama", nothing, None, (), settings=(("text", " a"),)),
    "two tokens": Case("llama", nothing, None, (), settings=(("num_samples", 1), ("seq_len", 2))),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("dense")
    for family in ("llama", "gpt2"):
        tiny_model(family, torch.float32, vocab_size=4096).save_pretrained(root / family)
        copy_tokenizer(root / family)
    return {family: root / family for family in ("llama", "gpt2")}


def spoilt(case: Case, scheme: str, folders: dict[str, Path], corpus: Path, root: Path) -> LordConfig:
    """Returns the run of a fault."""
    gc.freeze()  # the host collects garbage at every load, which costs more than its work on models this small
    folder = shutil.copytree(folders[case.family], root / "model")
    edit_tensors(folder, case.spoil)
    settings = dict(case.settings)
    if "text" in settings:
        corpus = root / "text.txt"
        corpus.write_text(settings.pop("text") * 4000)
    calibration = {"dataset": str(corpus), "num_samples": settings.pop("num_samples", 4)}
    calibration["seq_len"] = settings.pop("seq_len", 24)
    return LordConfig.from_dict(
        {"model": str(folder), "output": str(root / "out"), "calibration": calibration, **SCHEMES[scheme], **settings}
    )


def runs() -> Iterator[Any]:
    for name, case in CASES.items():
        schemes = case.schemes if EVERYWHERE else case.schemes[:1]
        yield from (pytest.param(case, scheme, id=f"{name}-{scheme}") for scheme in schemes)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "scheme"), list(runs()))
def test_a_fault_is_named_or_survived_with_a_remedy(
    case: Case, scheme: str, folders: dict[str, Path], corpus_file: Path, tmp_path: Path
) -> None:
    config = spoilt(case, scheme, folders, corpus_file, tmp_path)
    if case.refused is not None:
        with pytest.raises(NumericsError, match=case.refused):
            execute(prepare(config), verify=False)
        assert not (tmp_path / "out").exists()
        if case.refused.startswith("weight '"):  # found before any block is compressed
            assert not (tmp_path / ".out.unfinished").exists()
        return
    report = execute(prepare(config), verify=False)
    told = [item["remedy"] for item in report["remedies"]]
    for remedy in case.remedies:
        assert any(re.match(remedy, text) for text in told), told
    kept = {f"{layer['name']}.weight" for layer in report["layers"] if layer["note"].startswith("kept")}
    assert kept >= case.kept and (kept or not any(KEPT in text for text in told))
    found = verify(tmp_path / "out")
    assert found.difference is not None and found.difference < TOLERANCE / 2


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_names_the_block_and_doing_without_survives(
    folders: dict[str, Path], corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    back = gradients._Run.back

    def spoil(*arguments: Any) -> list[Any]:
        *others, (entering,) = back(*arguments)
        assert entering is not None
        return [*others, (entering.index_fill(-1, torch.tensor([3]), NAN),)]

    monkeypatch.setattr(gradients._Run, "back", spoil)
    config = spoilt(Case("llama", nothing), "factors", folders, corpus_file, tmp_path)
    with pytest.raises(NumericsError, match=r"loss in front of model\.layers\.1 \(.*--no-fisher does without"):
        execute(prepare(config), verify=False)
    assert not (tmp_path / "out").exists()
    execute(prepare(LordConfig.from_dict(config.to_dict() | {"joint": {"fisher": False}})), verify=False)
    assert verify(tmp_path / "out").difference is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scales that overflow", "NaN in attention"])
def test_a_model_in_memory_fares_as_a_streamed_one(
    name: str, folders: dict[str, Path], corpus_file: Path, tmp_path: Path
) -> None:
    case = CASES[name]
    job = prepare(spoilt(case, case.schemes[0], folders, corpus_file, tmp_path))
    if case.refused is not None:
        with pytest.raises(NumericsError, match=case.refused):
            load_model(job.source, job.device)
        return
    model = load_model(job.source, job.device)
    done = compress_model(model, job.plan, job.windows, job.config)
    told = [text for record in done.decomposed for text in record.remedies]
    assert all(any(re.match(remedy, text) for text in told) for remedy in case.remedies)
    model.save_pretrained(tmp_path / "out")
    found = verify(tmp_path / "out")  # without a manifest
    assert found.difference is None
    assert done.fingerprint is not None and done.fingerprint.difference(examine(tmp_path / "out")[1]) < TOLERANCE / 2
