# SPDX-License-Identifier: Apache-2.0
"""What the product takes for granted about Optimum: its GPTQ quantizer and its command line."""

from __future__ import annotations

import copy
import importlib
import inspect
import sys
from typing import Any, NamedTuple

import families
import pytest
import torch
from torch import nn

from lord_quant.backends.gptq import host
from lord_quant.errors import ModelError


class Run(NamedTuple):
    """One run of the host's quantizer on a tiny model of two blocks, and what was seen meanwhile."""

    model: Any
    quantizer: Any
    tokens: torch.Tensor
    seen: list[torch.Tensor]
    solved: list[tuple[nn.Module, dict[str, Any], tuple[Any, ...]]]
    finished: list[nn.Module]


@pytest.fixture(scope="module")
def run() -> Run:
    """Quantizes with a solver put in place of the host's own, and a finish in place of the quantizer's."""
    module, solved, finished, seen = host(), [], [], list[torch.Tensor]()
    solver: Any = module.GPTQ

    class Solver(solver):
        def fasterquant(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().fasterquant(*args, **kwargs)
            solved.append((self.module if hasattr(self, "module") else self.layer, kwargs, outputs))
            return outputs

    tokens = torch.randint(1, families.VOCABULARY, (2, 32), generator=torch.Generator().manual_seed(0))
    model = families.build("gpt_bigcode", n_layer=1)
    quantizer = module.GPTQQuantizer(
        bits=4,
        group_size=32,
        dataset=[{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in tokens],
        sym=False,
        damp_percent=0.01,
        model_seqlen=32,
        block_name_to_quantize="transformer.h",
    )
    finish = quantizer.post_init_model

    def noted(packed: nn.Module) -> nn.Module:
        finished.append(packed)
        for layer in packed.modules():
            if hasattr(layer, "qweight"):
                layer.optimized = True
        return finish(packed)

    quantizer.post_init_model = noted
    model.transformer.wte.register_forward_pre_hook(lambda layer, args: seen.append(args[0].clone()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "GPTQ", Solver)
        patch.setenv("GPTQMODEL_DISABLE_PACK_EXT", "1")
        quantizer.quantize_model(model)
    return Run(model, quantizer, tokens, seen, solved, finished)


LINEARS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def test_the_quantizer_takes_its_first_arguments_in_this_order() -> None:
    """lord_quant/integrations/optimum.py names positional arguments by the signature, from the fourth on."""
    parameters = inspect.signature(host().GPTQQuantizer.__init__).parameters
    assert list(parameters)[:4] == ["self", "bits", "dataset", "group_size"]
    named = {"damp_percent", "desc_act", "act_group_aware", "sym", "true_sequential", "model_seqlen", "format", "backend"}
    assert named | {"block_name_to_quantize", "modules_in_block_to_quantize"} <= parameters.keys()


def test_a_copied_quantizer_chooses_kernels_for_its_own_bits_and_group_size() -> None:
    """lord_quant/backends/gptq.py packs layers of different bits with copies of one quantizer."""
    quantizer = host().GPTQQuantizer(bits=4, dataset=None, group_size=128, sym=False)
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.ModuleDict({"c": nn.Linear(64, 32, bias=False)})})
    for name, bits, size in (("a", 8, 32), ("b.c", 2, 64)):
        one = copy.copy(quantizer)
        one.bits, one.group_size = bits, size
        one.select_quant_linear(device_map={"": "cpu"}, pack=True)
        one._replace_by_quant_layers(model, {name})
        layer: Any = model.get_submodule(name)
        assert type(layer) is one.quant_linear and (layer.bits, layer.group_size) == (bits, size)
    assert model["a"].bias is not None and model["b"]["c"].bias is None
    assert (quantizer.bits, quantizer.group_size) == (4, 128)


def test_layers_of_a_sequential_are_left_as_they_are() -> None:
    """lord_quant/backends/gptq.py gives the host one layer at a time, as an attribute of a module."""
    quantizer = host().GPTQQuantizer(bits=4, dataset=None, group_size=32, sym=False)
    quantizer.select_quant_linear(device_map={"": "cpu"}, pack=True)
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(64, 64))})
    quantizer._replace_by_quant_layers(model, {"a.0"})
    assert type(model.get_submodule("a.0")) is nn.Linear


def test_layers_are_found_by_exact_type_in_the_order_of_registration() -> None:
    """lord_quant/modules.py makes both factors plain `nn.Linear`, `down` first."""
    from optimum.gptq.utils import get_layers

    from lord_quant.modules import LowRankLinear

    model = nn.ModuleDict({"first": nn.Linear(64, 64), "second": LowRankLinear(64, 32, 64, bias=True)})
    assert list(get_layers(model)) == ["first", "second.down", "second.up"]


def test_tokens_are_used_as_they_are_given(run: Run) -> None:
    """lord_quant/runs/pipeline.py feeds windows of its own choice."""
    assert torch.equal(torch.cat(run.seen), run.tokens)


def test_every_linear_layer_of_the_blocks_is_solved_in_order(run: Run) -> None:
    """lord_quant/backends/gptq.py counts them, and puts its recording solver in place of `GPTQ` in that module."""
    assert len(run.solved) == len(LINEARS)
    for name in LINEARS:
        assert hasattr(run.model.transformer.h[0].get_submodule(name), "qweight"), name
    assert type(run.model.lm_head) is nn.Linear


def test_a_solver_returns_seconds_loss_and_damping_in_these_places(run: Run) -> None:
    """lord_quant/backends/gptq.py notes the fourth to sixth value."""
    for _, _, outputs in run.solved:
        seconds, loss, damp = outputs[3:6]
        assert isinstance(seconds, float) and 0 < seconds < 60
        assert isinstance(loss, float | str) and (isinstance(loss, str) or loss > 0)
        assert 0.01 <= float(damp) < 1


def test_the_layer_to_solve_is_the_first_argument_of_the_solver() -> None:
    """lord_quant/backends/gptq.py finds its name by it."""
    parameters = list(inspect.signature(host().GPTQ.__init__).parameters)
    assert parameters[0] == "self" and len(parameters) > 1
    assert inspect.signature(host().GPTQ.__init__).parameters[parameters[1]].default is inspect.Parameter.empty


def test_the_quantizer_finishes_through_its_own_attribute_once(run: Run) -> None:
    """lord_quant/backends/gptq.py puts an eager finish in place of `post_init_model`."""
    assert run.finished == [run.model]


def test_what_was_packed_has_zeros_as_they_are_and_says_so(run: Run) -> None:
    """lord_quant/checkpoint.py records the quantizer's format."""
    assert run.quantizer.format == "gptq_v2"
    from transformers.utils.quantization_config import QuantizationMethod

    assert run.model.is_quantized and run.model.quantization_method == QuantizationMethod.GPTQ


def test_the_solver_reads_its_group_size_from_the_quantize_config() -> None:
    """lord_quant/integrations/optimum.py sets it there once a plan is made."""
    quantizer = host().GPTQQuantizer(bits=4, dataset=None, group_size=64, sym=False)
    assert (quantizer.quantizeConfig.bits, quantizer.quantizeConfig.group_size) == (4, 64)
    quantizer.quantizeConfig.group_size = 32
    assert quantizer.quantizeConfig.group_size == 32


def test_the_command_line_finds_our_commands_in_its_namespace() -> None:
    """lord_quant/integrations/optimum_register/register_lord.py is installed into `optimum.commands.register`."""
    from optimum.commands.optimum_cli import load_optimum_namespace_cli_commands

    assert [importlib.import_module(name).__file__ for name in ("optimum", "optimum.commands")] == [None, None]
    names = [command.COMMAND.name for command, parent in load_optimum_namespace_cli_commands() if parent is None]
    assert names.count("lord") == 1


def test_a_subcommand_is_given_its_arguments_and_its_exit_code_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """lord_quant/integrations/optimum_register/register_lord.py ends in `sys.exit` with the command's code."""
    from optimum.commands.optimum_cli import main

    monkeypatch.setattr(sys, "argv", ["optimum-cli", "lord", "inspect", "/no/such/folder"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == ModelError.exit_code and "/no/such/folder" in capsys.readouterr().err
