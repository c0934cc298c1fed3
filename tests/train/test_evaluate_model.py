"""``dsft eval`` through a real launcher: as alone, as plain transformers, and on from where it stopped."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dsft.errors import ConfigError
from dsft.train.evaluate_model import compare
from tests.support.launch import exit_code
from tests.support.lm_eval_tasks import NUM_DOCUMENTS, write_tasks
from tests.support.ranks import REPOSITORY, free_port
from tests.support.tokenizers import VOCAB_TOKENS, tiny_tokenizer_folder

pytestmark = [pytest.mark.launch, pytest.mark.timeout(600)]

BIN = Path(sys.executable).parent
LIMIT_SECONDS = 240.0
RUN_YAML = """\
run: {{name: measured, dir: {folder}/run}}
model: {{path: {folder}/model, dtype: fp32}}
data: {{pack_tokens: 512, chat_template: chatml, sources: [{{name: text, path: {folder}/text.jsonl}}]}}
train: {{steps: 1, global_batch_packs: 2, lr: 1e-3}}
deepspeed: {repository}/ds_configs/zero3_offload.json
evaluate:
  sets:
    - {{name: text, path: {folder}/text.jsonl}}
    - {{name: qa, path: {folder}/qa.jsonl, format: prompt_completion, generate: 6, max_new_tokens: 8, temperature: 1.0,
       metrics: [rougeL, bleu, chrf], checker: {folder}/checker.py}}
  bias:
    - {{name: jobs, kind: templates, max_items: 12}}
    - {{name: swaps, kind: counterfactual, path: {folder}/said.txt}}
    - {{name: words, kind: word_list, path: {folder}/prompts.txt, words: {folder}/words.txt, max_new_tokens: 8}}
  lm_eval: {{path: {folder}/tasks, tasks: [choice, rolling, written]}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two random models, held-out text and questions, and the results of the first model alone and on two ranks."""
    folder = tmp_path_factory.mktemp("eval")
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_folder(folder))
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    for seed, name in enumerate(("model", "other")):
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB_TOKENS, **shape)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    texts = [json.dumps({"text": topics[name][:300]}) for name in sorted(topics)[:9]]
    pairs = [json.dumps({"prompt": f"What is {name}?", "completion": topics[name][:60]}) for name in sorted(topics)[:7]]
    (folder / "text.jsonl").write_text("\n".join(texts) + "\n")
    (folder / "qa.jsonl").write_text("\n".join(pairs) + "\n")
    (folder / "checker.py").write_text("def check(prompt, answer, reference): return len(answer) % 2 == 0\n")
    (folder / "prompts.txt").write_text("The pilot said\nThe nurse said\nNobody said\n")
    (folder / "said.txt").write_text("He said that his day was long.\nThe nurse did what she could.\nShe left him.\n")
    (folder / "words.txt").write_text("".join(f"{letter}\n" for letter in "abcdefghij"))
    write_tasks(folder / "tasks")
    (folder / "run.yaml").write_text(RUN_YAML.format(folder=folder, repository=REPOSITORY))
    _eval(folder, "alone", [sys.executable, "-m", "dsft"], "model")
    launcher = [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port()), "--module", "dsft"]
    _eval(folder, "ranks", launcher, "model")
    return folder


def _eval(folder: Path, out: str, program: list[str], model: str, *options: str) -> str:
    log = folder / f"{out}.log"
    command = [*program, "eval", str(folder / model), "run.yaml", "--out", str(folder / out), *options]
    assert exit_code(command, log, {}, LIMIT_SECONDS) == 0, log.read_text()
    return log.read_text()


def _result(folder: Path, out: str, name: str) -> dict[str, Any]:
    result = json.loads((folder / out / f"{name}.json").read_text())
    result.pop("seconds")
    return result


def test_perplexity_equals_plain_transformers(folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder / "model").double().eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    nll, num_tokens, num_correct = 0.0, 0, 0
    for line in (folder / "text.jsonl").read_text().splitlines():
        ids = torch.tensor([[*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        nll += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        num_correct += int((logits.argmax(-1) == ids[0, 1:]).sum())
        num_tokens += ids.shape[1] - 1
    result = _result(folder, "alone", "text")
    assert result["num_tokens"] == num_tokens
    assert result["perplexity"] == pytest.approx(math.exp(nll / num_tokens), rel=1e-5)
    assert result["token_accuracy"] == pytest.approx(num_correct / num_tokens, abs=1.5 / num_tokens)


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Likelihoods to 1e-6 (the order of fp32 sums differs); counts, answers, and every score of them exactly."""
    one, other = dict(one), dict(other)
    assert one.pop("documents")["nll"] == pytest.approx(other.pop("documents")["nll"], rel=1e-6)
    for key in [key for key in one if key in ("loss", "perplexity", "bits_per_byte") or key.endswith("_interval")]:
        assert one.pop(key) == pytest.approx(other.pop(key), rel=1e-6)
    assert one == other


def test_two_ranks_of_zero_3_measure_what_one_process_measures(folder: Path) -> None:
    for name in ("text", "qa"):
        assert_same(_result(folder, "alone", name), _result(folder, "ranks", name))
    ranks = _result(folder, "ranks", "qa")
    assert set(ranks["scores"]) == {"rougeL", "bleu", "chrf", "pass_rate"}
    assert sum(ranks["outcomes"].values()) == 6
    for name in ("jobs", "words"):
        alone, ranks = (json.loads((folder / out / "bias" / f"{name}.json").read_bytes()) for out in ("alone", "ranks"))
        assert alone == ranks
        assert alone["num_items"] == {"jobs": 12, "words": 3}[name]
    # Likelihoods themselves, not only which of two is larger: nats a token.
    alone, ranks = (json.loads((folder / out / "bias" / "swaps.json").read_bytes()) for out in ("alone", "ranks"))
    assert len(alone["each"]) == 3
    assert alone["each"] == pytest.approx(ranks["each"], abs=1e-6, rel=0)
    assert 0 < alone["value"] == pytest.approx(ranks["value"], abs=1e-6, rel=0)


def test_two_ranks_of_zero_3_give_the_scores_of_tasks_that_one_process_gives(folder: Path) -> None:
    for name in ("choice", "rolling", "written"):
        alone, ranks = (
            json.loads((folder / out / "tasks" / f"{name}.json").read_bytes()) for out in ("alone", "ranks")
        )
        assert ranks[name]["each"] == alone[name]["each"]
        assert ranks[name]["scores"] == pytest.approx(alone[name]["scores"], rel=1e-6)
        assert alone[name]["num_documents"] == NUM_DOCUMENTS


def test_it_goes_on_where_it_stopped_and_compares_two_models(folder: Path) -> None:
    before = _result(folder, "alone", "qa")
    (folder / "alone" / "qa.json").unlink()
    text_file = folder / "alone" / "text.json"
    untouched = text_file.stat().st_mtime_ns
    log = _eval(folder, "alone", [sys.executable, "-m", "dsft"], "model")
    assert "text: measured before" in log
    assert text_file.stat().st_mtime_ns == untouched
    assert_same(_result(folder, "alone", "qa"), before)

    log = _eval(folder, "other-results", [sys.executable, "-m", "dsft"], "other", "--against", str(folder / "alone"))
    assert "text: loss " in log
    found = compare(folder / "alone", folder / "other-results", seed=17)
    values = [_result(folder, out, "text")["loss"] for out in ("alone", "other-results")]
    assert found["text"]["loss"].value == pytest.approx(values[1] - values[0], rel=1e-9)
    assert set(found["qa"]) == {"loss", "token_accuracy", "exact_match", "f1", "rougeL", "pass_rate"}
    assert found["bias jobs"]["value"].low <= found["bias jobs"]["value"].value <= found["bias jobs"]["value"].high
    assert not any(one.is_significant for one in compare(folder / "alone", folder / "ranks", seed=17)["qa"].values())

    log_file = folder / "refused.log"
    command = [sys.executable, "-m", "dsft", "eval", "other", "run.yaml", "--out", str(folder / "alone")]
    assert exit_code(command, log_file, {}, LIMIT_SECONDS) == 2
    assert "results of another evaluation" in log_file.read_text()
    with pytest.raises(ConfigError, match="cannot read"):
        compare(folder, folder / "alone", seed=17)
