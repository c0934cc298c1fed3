"""Tasks of lm-evaluation-harness: as its own model class for transformers scores them; bad tasks are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dsft.config.evaluation import LmEvalSection
from dsft.corpus.tokenizer import load_tokenizer
from dsft.errors import ConfigError, DataError
from dsft.evaluate.harness import HarnessModel, TaskResult, check_tasks, measure_task
from dsft.model.packed import PackedCausalLM
from tests.support.alone import ALONE
from tests.support.lm_eval_tasks import NUM_DOCUMENTS, write_tasks
from tests.support.tokenizers import VOCAB_TOKENS, tiny_tokenizer_folder

PACK_TOKENS = 257
TASKS = ("choice", "rolling", "written")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, its tokenizer, and tasks."""
    folder = tmp_path_factory.mktemp("harness")
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_folder(folder))
    shape = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(5)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB_TOKENS, initializer_range=0.2, **shape))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_tasks(folder / "tasks")
    return folder


def section(folder: Path, **settings: Any) -> LmEvalSection:
    return LmEvalSection(path=str(folder / "tasks"), **{"tasks": TASKS, **settings})


def load(folder: Path) -> tuple[PackedCausalLM, Any]:
    hf = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    return PackedCausalLM(hf), load_tokenizer(str(folder / "model"))


def measure(folder: Path, task: str) -> TaskResult:
    model, tokenizer = load(folder)
    found = measure_task(
        task, section(folder), model, tokenizer, ALONE, device=torch.device("cpu"), pack_tokens=PACK_TOKENS, seed=17
    )
    return found[task]


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[str, Any]:
    """What the harness says with its own model class, of the same window."""
    lm = HFLM(str(folder / "model"), device="cpu", dtype="float32", batch_size=4, max_length=PACK_TOKENS - 1)
    loaded = TaskManager(include_path=str(folder / "tasks"), include_defaults=False).load(list(TASKS))
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=17)
    found: dict[str, Any] = evaluate(lm, loaded, bootstrap_iters=0)
    return found


@pytest.mark.parametrize("task", TASKS)
def test_scores_are_those_of_the_harness_with_its_own_model(folder: Path, plain: dict[str, Any], task: str) -> None:
    found = measure(folder, task)
    wanted = {key.removesuffix(",none"): value for key, value in plain["results"][task].items() if ",none" in key}
    assert found.scores == pytest.approx({key: wanted[key] for key in found.scores}, rel=1e-5)
    assert set(found.scores) == {key for key in wanted if "_stderr" not in key and key != "sample_len"}
    assert found.num_documents == NUM_DOCUMENTS
    for metric, (low, high) in found.intervals.items():
        assert low <= found.scores[metric] <= high


def test_likelihoods_and_answers_are_those_of_the_harness(folder: Path, plain: dict[str, Any]) -> None:
    model, tokenizer = load(folder)
    lm = HarnessModel(
        model, tokenizer, ALONE, device=torch.device("cpu"), pack_tokens=PACK_TOKENS, seed=17, name="tasks"
    )
    loaded = TaskManager(include_path=str(folder / "tasks"), include_defaults=False).load(list(TASKS))
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=17)
    found: Any = evaluate(lm, loaded, bootstrap_iters=0)
    for task in TASKS:
        mine, theirs = (
            [[response for request in one["resps"] for response in request] for one in said["samples"][task]]
            for said in (found, plain)
        )
        if task == "written":
            assert mine == theirs
            assert len({answer for one in mine for answer in one}) > 1, "answers that differ, or nothing is compared"
        elif task == "rolling":
            assert [one[0] for one in mine] == pytest.approx([one[0] for one in theirs], rel=1e-5)
        else:
            for one, other in zip(mine, theirs, strict=True):
                assert [value for value, _ in one] == pytest.approx([value for value, _ in other], rel=1e-5)
                assert [bool(greedy) for _, greedy in one] == [bool(greedy) for _, greedy in other]


def test_what_cannot_be_measured_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder"):
        check_tasks(LmEvalSection(path=str(tmp_path / "none"), tasks=("choice",)))
    with pytest.raises(ConfigError, match=r"'chioce' is not in .*; there are choice, rolling, written"):
        check_tasks(section(folder, tasks=("choice", "chioce")))
    (tmp_path / "broken.yaml").write_text(
        "task: broken\ndataset_path: json\ndataset_kwargs: {data_files: {test: nowhere.jsonl}}\ntest_split: test\n"
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    )
    model, tokenizer = load(folder)
    with pytest.raises(DataError, match=r"task broken .* cannot be loaded: .*nowhere.jsonl"):
        measure_task(
            "broken",
            LmEvalSection(path=str(tmp_path), tasks=("broken",)),
            model,
            tokenizer,
            ALONE,
            device=torch.device("cpu"),
            pack_tokens=PACK_TOKENS,
            seed=17,
        )
    with pytest.raises(DataError, match=r"answers of 12 tokens \(max_gen_toks\), which leaves no room"):
        measure_task(
            "written", section(folder), model, tokenizer, ALONE, device=torch.device("cpu"), pack_tokens=12, seed=17
        )
