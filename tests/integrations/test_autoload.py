# SPDX-License-Identifier: Apache-2.0
"""Autoloading: it happens by itself, can be declined, and never breaks its hosts."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from lord_quant.integrations import autoload


@pytest.fixture
def fake_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Puts fakes in place of transformers' registry and of our module; returns the list that counts registrations."""
    (tmp_path / "fake_registry.py").write_text(
        # As when it imports torch: the entry point runs while this module is half there.
        "import lord_fake_torch_backend\nDONE = 1\n"
    )
    (tmp_path / "lord_fake_torch_backend.py").write_text(
        "from lord_quant.integrations import autoload\nautoload.install()\n"
    )
    (tmp_path / "fake_target.py").write_text(
        "import fake_registry\nassert fake_registry.DONE\nfake_registry.CALLS = getattr(fake_registry, 'CALLS', 0) + 1\n"
    )
    (tmp_path / "fake_later.py").write_text("")
    (tmp_path / "fake_broken.py").write_text("raise RuntimeError('registration failed')\n")
    names = ["fake_registry", "lord_fake_torch_backend", "fake_target", "fake_later", "fake_broken"]
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(autoload, "TRIGGER", "fake_registry")
    monkeypatch.setattr(autoload, "TARGET", "fake_target")
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, autoload._Watcher)])
    monkeypatch.delenv(autoload.OPT_OUT, raising=False)
    yield names
    for name in names:
        sys.modules.pop(name, None)


def watchers() -> int:
    return sum(isinstance(finder, autoload._Watcher) for finder in sys.meta_path)


def test_registers_right_after_the_registry_was_imported(fake_registry: list[str]) -> None:
    autoload.install()
    autoload.install()
    assert watchers() == 1 and "fake_target" not in sys.modules
    assert importlib.import_module("fake_registry").CALLS == 1
    assert watchers() == 0


def test_registers_at_once_when_the_registry_is_there(fake_registry: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(autoload.OPT_OUT, "0")
    registry = importlib.import_module("fake_registry")
    assert not hasattr(registry, "CALLS")
    monkeypatch.delenv(autoload.OPT_OUT)
    autoload.install()
    assert registry.CALLS == 1 and watchers() == 0


def test_a_registry_that_imports_torch_itself_is_waited_for(fake_registry: list[str]) -> None:
    """`import transformers.quantizers.…` before torch: the entry point runs while the registry is half initialised."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registry = importlib.import_module("fake_registry")
        assert watchers() == 1
        importlib.import_module("fake_later")
    assert registry.CALLS == 1 and watchers() == 0


def test_looking_for_the_registry_without_importing_it_spends_nothing(fake_registry: list[str]) -> None:
    autoload.install()
    assert importlib.util.find_spec("fake_registry") is not None
    assert importlib.import_module("fake_registry").CALLS == 1


def test_a_failure_is_one_warning(fake_registry: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoload, "TARGET", "fake_broken")
    autoload.install()
    with pytest.warns(UserWarning, match="could not register.*registration failed") as caught:
        assert importlib.import_module("fake_registry").DONE == 1
        importlib.import_module("fake_later")
    assert len(caught) == 1


@pytest.mark.parametrize("value", ["0", "false", "no", "OFF"])
def test_opting_out_leaves_no_hook(value: str, fake_registry: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(autoload.OPT_OUT, value)
    autoload.install()
    assert watchers() == 0
    assert not hasattr(importlib.import_module("fake_registry"), "CALLS")


def run_python(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | environment,
    )
    assert process.returncode == 0, process.stderr
    return process


REGISTER_BY_HAND = """
    import torch
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as known
    assert "lord_gptq" not in known and "lord" not in known
    import lord_quant
    assert "lord_gptq" not in known
    lord_quant.register()
    lord_quant.register()
    assert "lord_gptq" in known and "lord" in known
"""


@pytest.mark.slow
@pytest.mark.parametrize("variable", ["LORD_QUANT_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"])
def test_without_autoload_register_does_it_by_hand(variable: str) -> None:
    assert run_python(REGISTER_BY_HAND, **{variable: "0"}).stdout == ""


@pytest.mark.slow
def test_registry_before_torch_in_the_real_hosts() -> None:
    process = run_python("""
        from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as known
        from transformers.models.llama import LlamaForCausalLM
        assert "lord_gptq" in known and "lord" in known
    """)
    assert process.stdout == "" and "could not register" not in process.stderr


@pytest.mark.slow
def test_a_broken_installation_leaves_transformers_usable() -> None:
    process = run_python("""
        import sys
        sys.modules["lord_quant.integrations.transformers"] = None  # importing it raises ImportError
        from transformers import LlamaConfig, LlamaForCausalLM
        config = LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
        LlamaForCausalLM(config)
    """)
    assert process.stdout == ""
    assert process.stderr.count("lord-quant could not register") == 1


def test_importing_the_package_is_silent_and_light() -> None:
    process = run_python("""
        import sys
        import lord_quant
        lord_quant.LordConfig
        heavy = {"torch", "transformers", "optimum", "gptqmodel", "numpy", "lm_eval"} & set(sys.modules)
        assert not heavy, heavy
    """)
    assert process.stdout == "" and process.stderr == ""
