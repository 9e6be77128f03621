# SPDX-License-Identifier: Apache-2.0
"""What the product takes for granted about lm-eval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import families
import pytest
import torch


UTILS = """
import json, pathlib
from datasets import Dataset, DatasetDict

HERE = pathlib.Path(__file__).parent

def load(**given):
    (HERE / "given.json").write_text(json.dumps(given, default=str))
    rows = [{"prompt": "x = 1\\n", "check": "a"}, {"prompt": "y = 2\\n", "check": "b"}]
    return DatasetDict({"test": Dataset.from_list(rows)})

def answers(responses, docs):
    (HERE / "asked.json").write_text(json.dumps([responses, docs]))
    return [[{"text": text, "of": doc["check"]} for text in texts] for texts, doc in zip(responses, docs)]

def score(references, predictions, k):
    (found,) = predictions
    (check,) = references
    return {f"right@{n}": float(all(each["of"] == check for each in found)) * n for n in k}

def text(doc):
    return doc["prompt"]
"""
SAMPLED = """
task: contract_sampled
custom_dataset: !function utils.load
unsafe_code: true
output_type: generate_until
test_split: test
doc_to_text: "{{prompt}}"
doc_to_target: "{{check}}"
metric_list:
  - metric: !function utils.score
    aggregation: mean
    higher_is_better: true
    k: [1, 2]
generation_kwargs: {until: ["\\nclass"], max_gen_toks: 2, do_sample: true, temperature: 1.0}
repeats: 2
num_fewshot: 0
tag: contract_tag
filter_list:
  - name: own
    filter:
      - function: custom
        filter_fn: !function utils.answers
metadata: {version: 1.0}
"""
ROLLING = """
task: contract_rolling
custom_dataset: !function utils.load
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: !function utils.text
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
num_fewshot: 0
metadata: {version: 1.0}
"""
INCLUDING = "include: contract_sampled.yaml\ntask: contract_greedy\nrepeats: 1\n"
GROUP = "group: contract_group\ntask: [contract_sampled, contract_rolling]\n"


class Run(NamedTuple):
    """Both tasks, run on a tiny model."""

    folder: Path
    model: Any
    lm: Any
    manager: Any
    results: dict[str, Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    from lord_quant.silence import import_hosts

    import_hosts()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tasks")
    (folder / "utils.py").write_text(UTILS)
    for name, text in {"sampled": SAMPLED, "rolling": ROLLING, "greedy": INCLUDING, "group": GROUP}.items():
        (folder / f"contract_{name}.yaml").write_text(text)
    model = families.build("gpt_bigcode", n_layer=1)
    lm = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(families.TOKENIZER), batch_size=1, device="cpu")
    manager = TaskManager(include_path=str(folder), include_defaults=False, metadata={"dataset": "data", "limit_to": 3})
    results: Any = simple_evaluate(
        model=lm,
        tasks=["contract_sampled", "contract_rolling"],
        task_manager=manager,
        num_fewshot=None,
        batch_size=1,
        device="cpu",
        limit=None,
        gen_kwargs=None,
        log_samples=False,
        confirm_run_unsafe_code=True,
        random_seed=1,
        numpy_random_seed=1,
        torch_random_seed=1,
        fewshot_random_seed=1,
        bootstrap_iters=10,
    )
    return Run(folder, model, lm, manager, results)


def test_the_index_tells_settings_groups_and_tags_before_anything_is_loaded(run: Run) -> None:
    """lord_quant/evaluation/preflight.py finds tasks that run generated code by it."""
    index = run.manager.task_index
    assert {"contract_sampled", "contract_greedy", "contract_rolling", "contract_group", "contract_tag"} == index.keys()
    assert index["contract_sampled"].cfg["unsafe_code"] is True and "unsafe_code" not in index["contract_rolling"].cfg
    assert index["contract_group"].cfg["task"] == ["contract_sampled", "contract_rolling"]
    assert index["contract_tag"].kind.name == "TAG" and "contract_sampled" in index["contract_tag"].tags


def test_a_task_that_includes_another_is_unsafe_as_well(run: Run) -> None:
    """lord_quant/evaluation/preflight.py asks for consent for `lord_humaneval_k`, which includes `lord_humaneval`."""
    from lord_quant.errors import ConsentError
    from lord_quant.evaluation.preflight import check_tasks

    for name in ("contract_sampled", "contract_greedy", "contract_group", "contract_tag"):
        with pytest.raises(ConsentError, match="contract_"):
            check_tasks(run.manager, [name], confirmed=False)
    check_tasks(run.manager, ["contract_rolling"], confirmed=False)


def test_a_task_loads_its_documents_with_the_managers_metadata(run: Run) -> None:
    """lord_quant/evaluation/tasks/utils.py takes `dataset` and other settings from there."""
    given = json.loads((run.folder / "given.json").read_text())
    assert given["dataset"] == "data" and given["limit_to"] == 3


def test_a_custom_filter_gets_all_samples_of_all_documents(run: Run) -> None:
    """lord_quant/evaluation/tasks/utils.py runs them in sandboxes, several at a time."""
    responses, docs = json.loads((run.folder / "asked.json").read_text())
    assert [doc["check"] for doc in docs] == ["a", "b"]
    assert [len(texts) for texts in responses] == [2, 2] and all(isinstance(text, str) for text in responses[0])


def test_a_metric_of_ones_own_becomes_rows_named_after_metric_and_filter(run: Run) -> None:
    """lord_quant/evaluation/harness.py splits `metric,filter` and `metric_stderr,filter`."""
    row = run.results["results"]["contract_sampled"]
    assert row["right@1,own"] == 1 and row["right@2,own"] == 2
    assert {key for key in row if "," in key} == {f"right@{k}{tail},own" for k in (1, 2) for tail in ("", "_stderr")}
    assert "bits_per_byte,none" in run.results["results"]["contract_rolling"]


def test_directions_are_told_by_task_and_metric(run: Run) -> None:
    """lord_quant/evaluation/harness.py hands them on in its result."""
    directions = run.results["higher_is_better"]
    assert directions["contract_rolling"]["bits_per_byte"] is False
    assert all(directions["contract_sampled"].values()) and directions["contract_sampled"]


def test_bits_per_byte_are_the_models_own_log_likelihood(run: Run) -> None:
    """lord_quant/evaluation/tasks/lord_code_ppl.yaml rests on it; here computed from the logits."""
    bits, size = 0.0, 0
    for text in ("x = 1\n", "y = 2\n"):
        ids = run.lm.tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens = torch.tensor([[run.lm.prefix_token_id, *ids]])
        with torch.no_grad():
            logs = run.model(input_ids=tokens).logits.double().log_softmax(-1)
        bits -= float(sum(logs[0, place, token] for place, token in enumerate(ids))) / 0.6931471805599453
        size += len(text.encode())
    found = run.results["results"]["contract_rolling"]["bits_per_byte,none"]
    assert found == pytest.approx(bits / size, rel=1e-5)


def test_a_wrapped_model_is_the_one_that_was_given(run: Run) -> None:
    """lord_quant/evaluation/harness.py measures perplexity and speed on `model`, with `tokenizer` and `max_length`."""
    assert run.lm.model is run.model and run.lm.max_length == families.CONTEXT
    assert run.lm.tokenizer("x", add_special_tokens=False)["input_ids"]


def test_without_consent_unsafe_tasks_are_refused(run: Run) -> None:
    """lord_quant/evaluation/harness.py passes the consent it was given, and nothing else opens the gate."""
    from lm_eval import simple_evaluate

    with pytest.raises(ValueError, match="confirm_run_unsafe_code"):
        simple_evaluate(model=run.lm, tasks=["contract_sampled"], task_manager=run.manager)
