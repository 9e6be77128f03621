# SPDX-License-Identifier: Apache-2.0
"""Layers that share a bottleneck: what they compute and hold, alone and inside a model, whatever the caller does."""

from __future__ import annotations

import copy
import itertools
import pickle
import shutil
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from model_runs import TOKENS, logits
from models import tiny_model
from torch import nn

from lord_quant.decompose import Factors
from lord_quant.modules import Bottleneck, GroupedLinear, LowRankLinear
from lord_quant.surgery import replace_group
from lord_quant.targets import dense_weight


OUTPUTS = (5, 3, 2)
QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


def group(bias: bool = True, dtype: torch.dtype = torch.float64, outputs: Sequence[int] = OUTPUTS) -> nn.ModuleList:
    """Layers with 6 inputs, a bottleneck of 4, and random parameters."""
    bottleneck = Bottleneck()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.ModuleList(
            GroupedLinear(bottleneck, None if i else 6, 4, m, bias, dtype=dtype) for i, m in enumerate(outputs)
        )


def inputs(*lead: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*lead, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def explicit(layers: nn.ModuleList, x: torch.Tensor) -> list[torch.Tensor]:
    """What each layer should compute, by the product of its factors."""
    down = layers[0].down.weight
    return [x @ (one.up.weight @ down).T + (0 if one.up.bias is None else one.up.bias) for one in layers]


def count_calls(module: nn.Module) -> list[torch.Tensor]:
    """Collects the inputs of every call from now on."""
    seen: list[torch.Tensor] = []
    module.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    return seen


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (2,), (2, 4), (0,)])
def test_every_member_computes_its_up_of_the_shared_down_which_runs_once(bias: bool, lead: tuple[int, ...]) -> None:
    layers, x = group(bias), inputs(*lead)
    calls = count_calls(layers[0].down)
    for found, wanted in zip([layer(x) for layer in layers], explicit(layers, x), strict=True):
        assert found.shape == wanted.shape == (*lead, wanted.shape[-1])
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    assert len(calls) == 1


def test_the_leader_holds_down_and_state_is_stored_once_and_loaded_again() -> None:
    layers = group()
    expected = ["0.down.weight", *(f"{i}.up.{leaf}" for i in range(3) for leaf in ("weight", "bias"))]
    assert list(layers.state_dict()) == expected == [name for name, _ in layers.named_parameters()]
    assert [[name for name, _ in layer.named_children()] for layer in layers] == [["down", "up"], ["up"], ["up"]]
    assert {type(child) for layer in layers for child in layer.children()} == {nn.Linear}
    assert layers[0].down.weight.shape == (4, 6) and [layer.up.weight.shape[0] for layer in layers] == list(OUTPUTS)
    again, x = group(), inputs(3)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    assert again.load_state_dict(layers.state_dict()) == ([], [])
    assert all(torch.equal(a(x), b(x)) for a, b in zip(again, layers, strict=True))


def test_device_and_dtype_reach_all_factors_and_hosts_find_no_property() -> None:
    bottleneck = Bottleneck()
    layers = [GroupedLinear(bottleneck, n, 4, 5, True, device="meta", dtype=torch.bfloat16) for n in (6, None)]
    found = {(parameter.device.type, parameter.dtype) for layer in layers for parameter in layer.parameters()}
    assert found == {("meta", torch.bfloat16)}
    assert not [name for name, value in vars(GroupedLinear).items() if isinstance(value, property)]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_order_of_calls_does_not_matter(order: tuple[int, ...]) -> None:
    layers, x = group(), inputs(2, 3)
    calls, wanted = count_calls(layers[0].down), explicit(layers, x)
    for place in order:
        torch.testing.assert_close(layers[place](x), wanted[place], rtol=0, atol=1e-12)
    assert len(calls) == 1


@pytest.mark.parametrize("seed", range(20))
def test_any_sequence_of_calls_with_any_inputs_is_right(seed: int) -> None:
    """Members called twice, never, or with another's input in between; inputs changed in place; with and without graph."""
    layers, generator = group(), torch.Generator().manual_seed(seed)
    xs = [inputs(2, seed=10 + i) for i in range(2)]
    for _ in range(60):
        place, which, what = (int(torch.randint(n, (), generator=generator)) for n in (3, 2, 8))
        if what == 0:
            xs[which].add_(1)
        with torch.set_grad_enabled(what != 1):
            found = layers[place](xs[which])
            torch.testing.assert_close(found, explicit(layers, xs[which])[place], rtol=0, atol=1e-12)
            assert found.requires_grad == (what != 1)


def test_a_member_that_is_called_again_computes_again() -> None:
    """As in training one layer on inputs kept: the same tensor every time, other weights, a graph of its own."""
    layers, x = group(), inputs(3)
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)
    for _ in range(3):
        found = layers[1](x)
        torch.testing.assert_close(found, explicit(layers, x)[1], rtol=0, atol=1e-12)
        optimizer.zero_grad()
        found.square().sum().backward()
        optimizer.step()


def test_an_input_changed_between_two_members_is_noticed() -> None:
    layers, x = group(), inputs(3)
    layers[0](x)
    x.add_(1)
    torch.testing.assert_close(layers[1](x), explicit(layers, x)[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_a_graph(mode: Callable[[], Any]) -> None:
    layers = group()
    calls = count_calls(layers[0].down)
    with mode():
        x = inputs(2, 3).clone()
        for found, wanted in zip([layer(x) for layer in layers], explicit(layers, x), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    assert len(calls) == 1


def test_nothing_is_kept_after_the_last_member() -> None:
    layers, x = group(), inputs(3)
    kept: list[weakref.ref[torch.Tensor]] = [weakref.ref(x)]
    layers[0].down.register_forward_hook(lambda module, args, output: kept.append(weakref.ref(output)))
    with torch.no_grad():
        outputs = [layer(x) for layer in layers[:2]]
        assert len(kept) == 2 and kept[1]() is not None
        outputs.append(layers[2](x))
    del x
    assert [reference() for reference in kept] == [None, None] and len(outputs) == 3


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda layers: pickle.loads(pickle.dumps(layers))],
    ids=["deepcopy", "copy", "pickle"],
)
@pytest.mark.parametrize("called", [0, 1, 2])
def test_copies_of_a_half_called_group_stand_alone(copied: Callable[[Any], Any], called: int) -> None:
    layers, x = group(), inputs(3)
    for layer in layers[:called]:
        layer(x)
    if copied is copy.copy:
        bottleneck = copy.copy(layers[0].bottleneck)
        assert bottleneck.leader is layers[0] and bottleneck._latest is None
        return
    again = copied(layers)
    assert {id(layer.bottleneck) for layer in again} == {id(again[0].bottleneck)} != {id(layers[0].bottleneck)}
    assert again[0].bottleneck.leader is again[0] and again[0].bottleneck._latest is None
    wanted = explicit(layers, x)
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.zero_()
    for place in (2, 1, 0):
        torch.testing.assert_close(again[place](x), wanted[place], rtol=0, atol=1e-12)


def test_gradients_are_those_of_the_formula() -> None:
    layers, x = group(), inputs(4).requires_grad_()
    pulls = [inputs(4, seed=i)[:, :m] for i, m in enumerate(OUTPUTS, start=1)]
    parameters = [x, *layers.parameters()]

    def gradients(outputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(sum((y * pull).sum() for y, pull in zip(outputs, pulls, strict=True)), parameters)

    found, wanted = gradients([layer(x) for layer in layers]), gradients(explicit(layers, x))
    for one, other in zip(found, wanted, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    for place in range(3):  # `down` hears of every member
        alone = torch.autograd.grad(layers[place](x.clone()).sum(), layers[0].down.weight)[0]
        wanted_alone = torch.autograd.grad(explicit(layers, x)[place].sum(), layers[0].down.weight)[0]
        torch.testing.assert_close(alone, wanted_alone, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: tuple(layer(x) for layer in layers), (inputs(2).requires_grad_(),))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_gradients_are_the_same(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    layers, x = group(), inputs(4).requires_grad_()

    def run(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(torch.cat([layer(x) for layer in layers], dim=-1)).square().sum()

    parameters = [x, *layers.parameters()]
    wanted = torch.autograd.grad(run(x), parameters)
    checkpoint(run, x, use_reentrant=reentrant).backward()
    for parameter, gradient in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-12)


# Inside a model


def grouped_llama(dtype: torch.dtype = torch.float64, family: str = "llama") -> tuple[nn.Module, nn.Module]:
    """A model whose q, k, v and gate, up are grouped, and the same with separate layers that each have a copy of `down`."""
    ours, theirs = tiny_model(family, dtype), tiny_model(family, dtype)
    generator = torch.Generator().manual_seed(3)
    for index, names in itertools.product(range(2), (QKV, GATE_UP)):
        paths = [f"model.layers.{index}.{name}" for name in names]
        sizes = [len(dense_weight(ours.get_submodule(path))) for path in paths]
        shapes = (24, 64), (sum(sizes), 24), (sum(sizes),)
        down, up, bias = (0.2 * torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)
        made = replace_group(ours, paths, Factors(down, up, bias))
        assert [ours.get_submodule(path) for path in paths] == made
        for path, part, offset in zip(paths, up.split(sizes), bias.split(sizes), strict=True):
            alone = LowRankLinear(64, 24, len(part), True, dtype=dtype)
            alone.load_state_dict({"down.weight": down, "up.weight": part, "up.bias": offset})
            theirs.set_submodule(path, alone)
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_model_computes_each_shared_down_once_and_the_same_as_with_separate_layers(family: str) -> None:
    ours, theirs = grouped_llama(family=family)
    leaders = {name: module for name, module in ours.named_modules() if name.endswith(".down")}
    assert sorted(leaders) == sorted(
        f"model.layers.{i}.{name}.down" for i in range(2) for name in ("self_attn.q_proj", "mlp.gate_proj")
    )
    assert [name for name in ours.state_dict() if ".down." in name] == [f"{name}.weight" for name in leaders]
    calls = {name: count_calls(module) for name, module in leaders.items()}
    for times in (1, 2):
        torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-12)
        assert {name: len(seen) for name, seen in calls.items()} == dict.fromkeys(leaders, times)
    assert all(module.bottleneck._latest is None for module in ours.modules() if isinstance(module, GroupedLinear))


def test_generating_with_a_cache_is_the_same_as_with_separate_layers() -> None:
    ours, theirs = grouped_llama()
    calls = count_calls(ours.model.layers[1].self_attn.q_proj.down)
    settings: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "use_cache": True, "pad_token_id": 0}
    for more in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}):
        found, wanted = (model.generate(TOKENS[:3, :5], **settings, **more) for model in (ours, theirs))
        assert found.shape == (3, 17) and torch.equal(found, wanted)
    assert {x.shape[1] for x in calls} == {5, 1}  # the prompt, then token by token


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "not reentrant"])
def test_training_steps_are_those_of_separate_layers_that_are_kept_alike(checkpointing: bool | None) -> None:
    """The gradient of a shared `down` is the sum of what its copies would get."""
    ours, theirs = grouped_llama()
    for model in (ours, theirs):
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
        model.train()(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        if name.endswith("down.weight"):
            members = QKV if "attn" in name else GATE_UP
            prefix = name.split("self_attn.")[0].split("mlp.")[0]
            gradient = sum(wanted[f"{prefix}{member}.down.weight"] for member in members)
        else:
            gradient = wanted[name]
        assert gradient.abs().max() > 0
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-10)
    before = ours(input_ids=TOKENS, labels=TOKENS).loss
    torch.optim.SGD(ours.parameters(), lr=1e-2).step()
    assert ours(input_ids=TOKENS, labels=TOKENS).loss < before


class Attention(nn.Module):
    """Scores and values of one head, from grouped layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = group(outputs=(4, 4, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x) for layer in self.layers)
        return torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_in_one_graph_with_one_product(backend: str) -> None:
    from torch._dynamo.testing import EagerAndRecordGraphs

    torch._dynamo.reset()
    module, recorder = Attention(), EagerAndRecordGraphs()
    compiled = torch.compile(module, fullgraph=True, backend=recorder if backend == "eager" else backend)
    for shape in ((2, 5), (3, 7), (3, 7)):
        x = inputs(*shape).requires_grad_()
        found, wanted = compiled(x), module(x)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
        pairs = (torch.autograd.grad(y.square().sum(), [x, *module.parameters()]) for y in (found, wanted))
        for one, other in zip(*pairs, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), wanted, rtol=0, atol=1e-12)
    for graph in recorder.graphs:
        products = [node for node in graph.graph.nodes if "linear" in str(node.target) and node.op == "call_function"]
        assert len(products) == 4
    assert module.layers[0].bottleneck._latest is None


def test_compiled_members_by_themselves_are_right() -> None:
    """Each a graph of its own, so that what is left waiting passes from one to the next."""
    torch._dynamo.reset()
    layers = group()
    compiled = [torch.compile(layer, fullgraph=True, backend="eager") for layer in layers]
    for seed in range(3):
        x = inputs(3, seed=seed)
        for place in (1, 0, 1, 2):
            torch.testing.assert_close(compiled[place](x), explicit(layers, x)[place], rtol=0, atol=1e-12)


@pytest.mark.slow
def test_a_whole_model_compiles_in_one_graph() -> None:
    torch._dynamo.reset()
    ours, _ = grouped_llama()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found = compiled(input_ids=TOKENS, use_cache=False).logits
    torch.testing.assert_close(found, logits(ours), rtol=0, atol=1e-10)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_the_default_compiler_computes_the_same() -> None:
    torch._dynamo.reset()
    module = Attention()
    compiled = torch.compile(module, fullgraph=True)
    x = inputs(2, 5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x), rtol=0, atol=1e-10)


def test_exported_programs_compute_the_same() -> None:
    module, x = Attention(), inputs(2, 5)
    exported = torch.export.export(module, (x,)).module()
    torch.testing.assert_close(exported(x), module(x), rtol=0, atol=1e-12)
