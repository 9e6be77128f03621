# SPDX-License-Identifier: Apache-2.0
"""Running tasks: consent, refusals before a model is loaded, own tasks, and scores that agree with the host's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import families
import pytest
import torch

from lord_quant.errors import CalibrationError, ConsentError, EvaluationError, HostError, ModelError
from lord_quant.evaluation import preflight, sandbox
from lord_quant.evaluation.harness import evaluate, tasks_path
from lord_quant.evaluation.preflight import build_task_manager, check_tasks, read_settings, shortest_context


DEMO = Path(__file__).parents[2] / "eval" / "models" / "pycoder-starcoder-humaneval"
needs_demo = pytest.mark.skipif(not DEMO.is_dir(), reason="the demo model is not in this checkout")

OWN = ("lord_humaneval", "lord_humaneval_stripped", "lord_humaneval_k", "lord_code_ppl")


@pytest.fixture
def broken_model(tmp_path: Path) -> Path:
    """Looks like a model from outside; loading it fails."""
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
    (folder / "model.safetensors").write_bytes(b"not weights")
    return folder


@pytest.fixture(scope="module")
def manager() -> Any:
    return build_task_manager(OWN, {})


@pytest.mark.parametrize("task", ["lord_humaneval", "lord_humaneval_stripped", "lord_humaneval_k"])
def test_consent_comes_before_the_model(task: str, broken_model: Path) -> None:
    with pytest.raises(ConsentError, match=rf"{task}: .*--confirm-run-unsafe-code"):
        evaluate(str(broken_model), [task], device="cpu")


def test_with_consent_the_same_model_is_loaded_and_fails(broken_model: Path) -> None:
    with pytest.raises(ModelError, match="could not be loaded"):
        evaluate(str(broken_model), ["lord_humaneval"], device="cpu", confirm_run_unsafe_code=True)


def test_a_broken_sandbox_is_found_before_the_model(
    broken_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "_CHILD", tmp_path / "none.py")
    with pytest.raises(HostError, match="sandbox did not start"):
        evaluate(str(broken_model), ["lord_humaneval"], device="cpu", confirm_run_unsafe_code=True)
    with pytest.raises(ModelError, match="could not be loaded"):  # a task without generated code needs no sandbox
        evaluate(str(broken_model), ["lord_code_ppl"], device="cpu")


def test_a_weak_sandbox_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for file in sandbox._CHILD.parent.glob("sandbox_*.py"):
        (tmp_path / file.name).write_text(file.read_text())
    monkeypatch.setattr(sandbox, "_CHILD", tmp_path / "sandbox_child.py")
    with (tmp_path / "sandbox_kernel.py").open("a") as kernel:
        kernel.write("enter_namespaces = lambda: []\nlandlock = lambda *_, **__: []\n")
    with (tmp_path / "sandbox_calls.py").open("a") as calls:
        calls.write("refuse_calls = lambda: False\n")
    preflight.check_sandbox()
    told = caplog.messages[0]
    for gap in ("read and write whatever files", "fill the disk", "use the network", "each process it starts"):
        assert gap in told
    assert "take all memory" not in told


def test_without_posix_unsafe_tasks_are_refused(manager: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "os", types.SimpleNamespace(name="nt"))
    with pytest.raises(EvaluationError, match=r"lord_humaneval: .* POSIX .*'nt'"):
        check_tasks(manager, ["lord_humaneval"], confirmed=True)
    check_tasks(manager, ["lord_code_ppl"], confirmed=True)


def test_the_home_folder_is_expanded_for_check_and_load(
    broken_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    text = tmp_path / "text.py"
    text.write_text("x = 1\n")
    for model in ("~/broken", Path("~/broken")):
        with pytest.raises(ModelError, match=f"{broken_model}.* could not be loaded"):
            evaluate(model, perplexity_dataset=str(text), device="cpu")
    with pytest.raises(ModelError, match="no such folder"):
        evaluate("~/none", perplexity_dataset=str(text), device="cpu")


def test_consent_looks_into_groups_and_tags(tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    (tmp_path / "inner.yaml").write_text("task: inner\nunsafe_code: true\ntag: my_tag\n")
    (tmp_path / "safe.yaml").write_text("task: safe\n")
    (tmp_path / "group.yaml").write_text("group: my_group\ntask: [safe, inner]\n")
    (tmp_path / "outer.yaml").write_text("group: my_outer\ntask:\n  - group: inline\n    task: [my_group]\n")
    (tmp_path / "override.yaml").write_text("group: my_override\ntask: [{task: safe, unsafe_code: true}]\n")
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    for name in ("inner", "my_tag", "my_group", "my_outer", "my_override"):
        with pytest.raises(ConsentError):
            check_tasks(manager, [name], confirmed=False)
        check_tasks(manager, [name], confirmed=True)
    check_tasks(manager, ["safe"], confirmed=False)


@pytest.mark.slow
def test_consent_for_a_task_of_lm_eval(broken_model: Path) -> None:
    with pytest.raises(ConsentError, match="humaneval: "):
        evaluate(str(broken_model), ["humaneval"], device="cpu")


@pytest.mark.slow
def test_unknown_tasks_are_all_named_with_the_nearest(broken_model: Path) -> None:
    with pytest.raises(EvaluationError) as caught:
        evaluate(str(broken_model), ["lord_humanevl", "arc_eazy"], device="cpu")
    assert "'lord_humanevl'; did you mean 'lord_humaneval'" in str(caught.value)
    assert "'arc_eazy'; did you mean 'arc_easy'" in str(caught.value)


def test_missing_models_and_texts_are_refused_at_once(tmp_path: Path, broken_model: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, message in ((tmp_path / "none", "no such folder"), (tmp_path / "empty", "config.json")):
        with pytest.raises(ModelError, match=message):
            evaluate(str(path), ["lord_code_ppl"])
        with pytest.raises(ModelError, match=message):
            evaluate(str(broken_model), ["lord_code_ppl"], baseline=str(path))
    with pytest.raises(CalibrationError, match="no such file"):
        evaluate(str(broken_model), perplexity_dataset=str(tmp_path / "none.txt"))
    with pytest.raises(EvaluationError, match="nothing to evaluate"):
        evaluate(str(broken_model))


def test_own_tasks_are_found_and_marked(manager: Any) -> None:
    own = {name: entry.cfg for name, entry in manager.task_index.items() if name.startswith("lord_")}
    assert set(own) == set(OWN)
    assert all(cfg.get("unsafe_code", False) == ("humaneval" in name) for name, cfg in own.items())


def test_own_tasks_build_and_their_prompts_are_what_they_say(manager: Any) -> None:
    loaded = manager.load(["lord_humaneval", "lord_humaneval_stripped"])["tasks"]
    plain, stripped = loaded["lord_humaneval"], loaded["lord_humaneval_stripped"]
    docs = list(plain.eval_docs)
    assert len(docs) == 164
    assert all(plain.doc_to_text(doc) == doc["prompt"] for doc in docs)
    assert all(stripped.doc_to_text(doc) == doc["prompt"].strip() for doc in docs)
    assert plain.UNSAFE_CODE and stripped.UNSAFE_CODE


def test_code_task_reads_the_given_text_unchanged(tmp_path: Path) -> None:
    text = "[1, 2]"  # lm-eval would read a template's result of this form as a list
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "{{x}}\n"}) + "\n")
    task = build_task_manager(["lord_code_ppl"], {"dataset": str(tmp_path / "data.jsonl")}).load(["lord_code_ppl"])
    task = task["tasks"]["lord_code_ppl"]
    assert [task.doc_to_target(doc) for doc in task.eval_docs] == [text, "{{x}}\n"]


def test_default_code_is_bounded_and_reproducible() -> None:
    from lord_quant.evaluation.documents import load_code

    first, second = (load_code()["test"]["text"] for _ in range(2))
    assert first == second
    assert len(first) == 12 and sum(map(len, first)) <= 12 * 4096


@needs_demo
@pytest.mark.slow
def test_stock_command_line_harness_and_own_command_agree_to_the_last_digit(tmp_path: Path) -> None:
    """Three ways, the same numbers: metrics that vary continuously (bits per byte) as well as counts."""
    tasks, text = ["lord_humaneval", "lord_code_ppl"], tmp_path / "text.py"
    text.write_text("def mean(xs):\n    return sum(xs) / len(xs)\n" * 20)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={DEMO}"]
    command += ["--include_path", str(tasks_path()), "--tasks", ",".join(tasks), "--confirm_run_unsafe_code"]
    command += ["--batch_size", "4", "--device", "cpu", "--limit", "4", "--seed", "1234"]
    command += ["--metadata", json.dumps({"dataset": str(text)}), "--output_path", str(tmp_path / "stock.json")]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    rows = json.loads(next(tmp_path.glob("stock_*.json")).read_text())["results"]
    stock = {
        "pass@1": rows["lord_humaneval"]["pass@1,sandbox"],
        "bits_per_byte": rows["lord_code_ppl"]["bits_per_byte,none"],
    }

    script = (
        "import json, sys\nfrom lord_quant.evaluation.harness import evaluate\n"
        "model, text, out = sys.argv[1:]\n"
        "result = evaluate(model, ['lord_humaneval', 'lord_code_ppl'], batch_size=4, device='cpu', limit=4,\n"
        "                  confirm_run_unsafe_code=True, metadata={'dataset': text})\n"
        "open(out, 'w').write(json.dumps(result.to_dict()))\n"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(DEMO), str(text), str(tmp_path / "api.json")], env=environment, check=True
    )
    metrics = json.loads((tmp_path / "api.json").read_text())["metrics"]
    api = {"pass@1": metrics["lord_humaneval"]["pass@1"], "bits_per_byte": metrics["lord_code_ppl"]["bits_per_byte"]}
    assert api == stock

    script = (
        "import argparse\nfrom lord_quant.commands import eval\n"
        "parser = argparse.ArgumentParser()\neval.add_arguments(parser)\neval.run(parser.parse_args())\n"
    )
    flags = ["--model", str(DEMO), "--tasks", "lord_humaneval", "--batch-size", "4", "--device", "cpu", "--limit", "4"]
    flags += ["--confirm-run-unsafe-code", "--output", str(tmp_path / "own.json")]
    printed = subprocess.run(
        [sys.executable, "-c", script, *flags], env=environment, check=True, capture_output=True, text=True
    ).stdout
    own = json.loads((tmp_path / "own.json").read_text())
    assert own["metrics"]["lord_humaneval"]["pass@1"] == stock["pass@1"] == 1.0
    assert "pass@1" in printed and "lord_humaneval" in printed


@needs_demo
@pytest.mark.slow
def test_sampling_task_gives_pass_at_1_and_10() -> None:
    result = evaluate(
        str(DEMO), ["lord_humaneval_k"], batch_size=10, device="cpu", dtype="float32", limit=1, confirm_run_unsafe_code=True
    )
    assert set(result.metrics["lord_humaneval_k"]) == {"pass@1", "pass@10"}


@needs_demo
def test_loaded_model_with_baseline_perplexity_and_speed(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = tmp_path / "text.py"
    text.write_text("def mean(xs):\n    return sum(xs) / len(xs)\n" * 20)
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype="float32")
    result = evaluate(
        model,
        tokenizer=AutoTokenizer.from_pretrained(DEMO),
        baseline=str(DEMO),
        device="cpu",
        dtype="float32",
        perplexity_dataset=str(text),
        window=64,
        speed=True,
    )
    assert result.perplexity is not None and result.baseline is not None and result.speed is not None
    assert result.perplexity == result.baseline.perplexity
    assert result.perplexity.source == "text.py" and result.perplexity.window == 64
    assert result.speed.decode_ratio is not None and 0.2 < result.speed.decode_ratio < 5
    assert set(result.versions) == {"lord_quant", "lm_eval", "transformers", "torch"}
    assert json.loads(json.dumps(result.to_dict()))["settings"]["window"] == 64


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        ("do_sample=False", False),
        ("do_sample=true", True),
        ("top_k=05", 5),
        ("temperature=1.5", 1.5),
        ("until=None", None),
        ('until=["\\n", "a=b"]', ["\n", "a=b"]),
        ("x=[half", "[half"),
    ],
)
def test_generation_settings_mean_what_they_do_on_the_stock_command_line(pair: str, value: Any) -> None:
    from lm_eval.utils import simple_parse_args_string

    key = pair.partition("=")[0]
    assert read_settings([pair]) == {key: value} and type(read_settings([pair])[key]) is type(value)
    if not isinstance(value, list):
        assert simple_parse_args_string(pair) == {key: value}


def test_generation_settings_that_are_no_numbers_are_refused() -> None:
    for pair in ("temperature=nan", "temperature=inf"):
        with pytest.raises(EvaluationError, match="wanted a finite number"):
            read_settings([pair])


def test_both_models_are_measured_in_windows_that_both_take(tmp_path: Path) -> None:
    contexts = {}
    for name, positions in (("long", 128), ("short", 64)):
        folder = families.save(families.build("llama", max_position_embeddings=positions), tmp_path / name)
        contexts[name] = str(folder)
    assert shortest_context([contexts["long"]]) == 128 and shortest_context(list(contexts.values())) == 64
    found = evaluate(contexts["long"], baseline=contexts["short"], perplexity_dataset="python-stdlib", max_windows=1,
                     speed=True, device="cpu", dtype=torch.float32)  # fmt: skip
    assert found.perplexity is not None and found.baseline is not None and found.baseline.perplexity is not None
    assert found.perplexity.window == found.baseline.perplexity.window == 64
    assert found.speed is not None and found.speed.prompt_tokens + found.speed.new_tokens <= 64
    assert json.loads(json.dumps(found.to_dict()))["settings"]["dtype"] == "float32"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 129}, "window 129 is longer than the model's context of 64 tokens"),
        ({"stride": 100}, "stride is 100; wanted at most the window, 64"),
        ({"baseline": "unknown"}, "its configuration cannot be used"),
        ({"tokenizer": "mute"}, "has no EOS token"),
    ],
)
def test_what_no_window_or_model_allows_is_refused_before_a_weight_is_read(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = families.save(families.build("llama", max_position_embeddings=64), tmp_path / "model")
    for name in ("unknown", "mute"):
        shutil.copytree(model, tmp_path / name)
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "unknown" / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    told = json.loads((model / "tokenizer_config.json").read_text())
    (tmp_path / "mute" / "tokenizer_config.json").write_text(json.dumps(told | {"eos_token": None}))
    (tmp_path / "mute" / "special_tokens_map.json").unlink(missing_ok=True)
    (model / "model.safetensors").write_bytes(b"unreadable")
    places = {name: str(tmp_path / value) if isinstance(value, str) else value for name, value in settings.items()}
    with pytest.raises((EvaluationError, ModelError), match=message):
        evaluate(str(model), perplexity_dataset="python-stdlib", device="cpu", **places)
