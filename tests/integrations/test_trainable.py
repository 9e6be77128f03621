# SPDX-License-Identifier: Apache-2.0
"""Float low-rank checkpoints are ordinary models: they cast, train, take adapters, and save again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch


FACTORS = r".*\.(down|up)$"
FLOATS = [
    ("llama", "llama", "two_factor"),
    ("gpt_bigcode", "gpt_bigcode", "two_factor"),
    ("pivoted", "llama", "pivoted"),
    ("column_pivoted", "llama", "column_pivoted"),
    ("grouped", "llama", "grouped"),
]
FACTORS_OF = {"llama": 28, "pivoted": 28, "column_pivoted": 28, "grouped": 22}
"""Of 14 layers; groups share what 6 would have."""


@pytest.fixture(scope="module")
def float_folders(
    model_folder: Callable[..., Path], corpus_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("float")
    for label, family, form in FLOATS:
        lowrank = {"rank_ratio": 0.25, "form": form}
        families.compress(model_folder(family), root / label, corpus_file, gptq={"bits": 16}, lowrank=lowrank)
    return {label: root / label for label, _, _ in FLOATS}


PACKED: dict[str, dict[str, Any]] = {
    "uniform": {"bits": 4},
    "mixed": {"bits": 4, "bits_pattern": {"mlp": 8, "o_proj": 2, "q_proj": 3}, "group_size_pattern": {"up_proj": 64}},
    "grouped": {"bits": 4, "bits_pattern": {"attention.up": 8}},
}


@pytest.fixture(scope="module", params=PACKED)
def packed_folder(
    request: pytest.FixtureRequest,
    model_folder: Callable[..., Path],
    corpus_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "llama"
    lowrank = {"rank_ratio": 0.25, "form": "grouped" if request.param == "grouped" else "two_factor"}
    families.compress(model_folder("llama"), folder, corpus_file, gptq=PACKED[request.param], lowrank=lowrank)
    return folder


def load(folder: Path, **arguments: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **arguments)


def loss_of(model: Any) -> torch.Tensor:
    tokens = families.probe_tokens()
    return model(input_ids=tokens, labels=tokens).loss


@pytest.mark.parametrize("label", FACTORS_OF)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casting_works_like_on_any_model(dtype: torch.dtype, label: str, float_folders: dict[str, Path]) -> None:
    model = load(float_folders[label])
    expected = families.probe_logits(model)
    cast = model.half() if dtype is torch.float16 else model.to(dtype)
    assert {parameter.dtype for parameter in cast.parameters()} == {dtype}
    direct = load(float_folders[label], dtype=dtype)
    assert torch.allclose(families.probe_logits(direct).float(), expected, atol=0.02 * expected.std().item() * 16)
    assert model.float().dtype == torch.float32


@pytest.mark.parametrize("family", [label for label, _, _ in FLOATS])
def test_a_step_trains_every_weight_and_lowers_the_loss(
    family: str, float_folders: dict[str, Path], tmp_path: Path
) -> None:
    model = load(float_folders[family]).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = loss_of(model)
    before.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad and parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all()
        if name.endswith(("down.weight", "up.weight")):
            assert parameter.grad.abs().max() > 0, name
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    assert loss_of(model) < before
    model.eval().save_pretrained(tmp_path / "trained")
    again = load(tmp_path / "trained")
    assert torch.equal(families.probe_logits(again), families.probe_logits(model))
    assert not torch.equal(families.probe_logits(again), families.probe_logits(load(float_folders[family])))


@pytest.mark.slow
def test_trainer_trains_a_loaded_model(float_folders: dict[str, Path], tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = load(float_folders["llama"])
    before = families.probe_logits(model)
    rows = [{"input_ids": row, "labels": row} for row in families.probe_tokens()]
    settings = TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        max_steps=2,
        per_device_train_batch_size=1,
        learning_rate=1e-4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = Trainer(model=model, args=settings, train_dataset=rows)
    assert trainer.train().global_step == 2
    trainer.save_model(str(tmp_path / "saved"))
    after = families.probe_logits(model.eval())
    assert not torch.equal(before, after)
    assert torch.equal(families.probe_logits(load(tmp_path / "saved")), after)


@pytest.mark.parametrize("label", FACTORS_OF)
def test_lora_trains_and_merges_into_float_factors(label: str, float_folders: dict[str, Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = load(float_folders[label])
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=FACTORS, init_lora_weights=False))
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == FACTORS_OF[label]
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)
    before = loss_of(adapted)
    before.backward()
    optimizer.step()
    assert loss_of(adapted) < before
    expected = families.probe_logits(adapted.eval())
    merged = adapted.merge_and_unload()
    assert torch.allclose(families.probe_logits(merged), expected, atol=1e-4 * expected.abs().max().item())
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(families.probe_logits(load(tmp_path / "merged")), families.probe_logits(merged))


@pytest.mark.slow
def test_lora_trains_beside_packed_factors_and_says_why_it_cannot_merge(packed_folder: Path) -> None:
    peft = pytest.importorskip("peft")
    from lord_quant import LordGPTQConfig

    model = load(packed_folder, quantization_config=LordGPTQConfig(4, backend="gptq_torch"))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=FACTORS, init_lora_weights=False))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)
    before = loss_of(adapted)
    before.backward()
    optimizer.step()
    assert loss_of(adapted) < before
    with pytest.raises(ValueError, match="Cannot merge LORA layers when the model is gptq quantized"):
        adapted.merge_and_unload()
