"""Bias tests: likelihoods against plain transformers, and a model made to have the fault beside one that has not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dsft.config.bias import BiasSection
from dsft.corpus.tokenizer import Tokenizer, load_tokenizer
from dsft.errors import DataError
from dsft.evaluate.bias import BiasResult, bias_change, measure_bias, passed_limit
from dsft.evaluate.bias_files import read_items
from dsft.evaluate.likelihood import Continuation, encode, log_likelihoods
from dsft.model.packed import PackedCausalLM
from tests.evaluate.test_bias_files import CROWS, stereoset
from tests.support.alone import ALONE
from tests.support.models import copy_of
from tests.support.ranks import run_ranks
from tests.support.tokenizers import VOCAB_TOKENS, byte_level_folder, tiny_tokenizer_folder

CPU = torch.device("cpu")
TEXTS = [
    Continuation("", "The nurse said that she would be late."),
    Continuation("The nurse said that she", " would be late."),
    Continuation("", "x"),
    Continuation("He came in.", " He is strong."),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(str(tiny_tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))))


def plain_model() -> LlamaForCausalLM:
    torch.manual_seed(5)
    shape = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB_TOKENS, initializer_range=0.1, **shape)).eval()


def measure(hf: Any, section: BiasSection, tokenizer: Tokenizer) -> BiasResult:
    model = PackedCausalLM(copy_of(hf))
    return measure_bias(model, section, tokenizer, ALONE, device=CPU, pack_tokens=96, seed=3)


def reference(hf: Any, tokenizer: Any, one: Continuation) -> float:
    """Nats of the text after its context, from plain transformers in fp64."""
    encoded = tokenizer(one.context + one.text, return_offsets_mapping=True, add_special_tokens=False)
    begins = tokenizer(one.context + one.text)["input_ids"][0]
    first = begins if begins == tokenizer.bos_token_id else tokenizer.eos_token_id
    ids = [first, *encoded["input_ids"]]
    with torch.no_grad():
        log_probs = hf.double()(torch.tensor([ids])).logits[0].log_softmax(-1)
    starts = [start for start, _ in encoded["offset_mapping"]]
    return sum(float(log_probs[at, ids[at + 1]]) for at, start in enumerate(starts) if start >= len(one.context))


@pytest.mark.parametrize("kind", ["sentencepiece", "byte level"])
def test_likelihoods_equal_plain_transformers(tmp_path: Path, kind: str) -> None:
    folder = tiny_tokenizer_folder(tmp_path) if kind == "sentencepiece" else byte_level_folder(tmp_path)
    loaded, hf = load_tokenizer(str(folder)), plain_model()
    sequences = [encode(one, loaded) for one in TEXTS]
    found = log_likelihoods(
        PackedCausalLM(copy_of(hf)), sequences, ALONE, device=CPU, pack_tokens=30, pad_id=loaded.pad_id, what="test"
    )
    # Measured: 1.3e-6 at most over a text of 17 tokens, as plain transformers in fp32 (1.7e-6); the sum is fp64's.
    wanted = [reference(copy_of(hf), loaded.hf, one) for one in TEXTS]
    assert found.log_likelihood == pytest.approx(wanted, abs=5e-6, rel=0)
    assert found.per_token == pytest.approx(wanted / found.num_tokens, abs=1e-6, rel=0)
    assert found.num_tokens[1] < found.num_tokens[0]


def test_a_text_longer_than_a_pack_is_refused(tokenizer: Tokenizer) -> None:
    long = [encode(Continuation("", "word " * 100), tokenizer)]
    with pytest.raises(DataError, match=r"'crows'.*more than data.pack_tokens"):
        log_likelihoods(
            PackedCausalLM(plain_model()), long, ALONE, device=CPU, pack_tokens=30, pad_id=0, what="bias 'crows'"
        )


def _on_ranks(groups: Any, folder: str) -> list[float]:
    loaded = load_tokenizer(folder)
    section = BiasSection(name="t", kind="templates", max_items=7)
    model = PackedCausalLM(plain_model())
    return list(measure_bias(model, section, loaded, groups, device=CPU, pack_tokens=40, seed=3).each)


def test_ranks_measure_what_one_process_does(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = str(tiny_tokenizer_folder(tmp_path))
    section = BiasSection(name="t", kind="templates", max_items=7)
    alone = list(measure(plain_model(), section, tokenizer).each)
    assert run_ranks(_on_ranks, 2, folder, timeout_seconds=300) == [alone, alone]


def test_scores_of_each_format(tmp_path: Path, tokenizer: Tokenizer) -> None:
    hf = plain_model()
    (tmp_path / "c.csv").write_text(CROWS)
    section = BiasSection(name="c", kind="crows_pairs", path=str(tmp_path / "c.csv"))
    wanted = [
        float(reference(copy_of(hf), tokenizer.hf, item.first) > reference(copy_of(hf), tokenizer.hf, item.second))
        for item in read_items(section)
    ]
    found = measure(hf, section, tokenizer)
    assert list(found.each) == wanted
    assert found.by_group == dict(zip(("gender", "socioeconomic"), wanted, strict=True))

    (tmp_path / "s.json").write_text(json.dumps(stereoset()))
    found = measure(hf, BiasSection(name="s", kind="stereoset", path=str(tmp_path / "s.json")), tokenizer)
    assert found.num_items == 2
    assert found.language_score is not None
    assert found.icat == pytest.approx(found.language_score * min(found.value, 1 - found.value) * 2)

    (tmp_path / "p.txt").write_text("The nurse said that she would be late.\n")
    section = BiasSection(name="p", kind="counterfactual", path=str(tmp_path / "p.txt"))
    (item,) = read_items(section)
    per_token = [
        reference(copy_of(hf), tokenizer.hf, text) / (len(encode(text, tokenizer).ids) - encode(text, tokenizer).first)
        for text in (item.first, item.second)
    ]
    assert measure(hf, section, tokenizer).value == pytest.approx(abs(per_token[0] - per_token[1]), abs=1e-6)


def trained(hf: Any, tokenizer: Tokenizer, texts: list[str]) -> Any:
    """A copy of the model after 60 updates on six of the texts each, in plain torch."""
    model = copy_of(hf).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = [torch.tensor([[1, *tokenizer.encode_batch([text])[0].tolist()]]) for text in texts]
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        for number in torch.randperm(len(rows), generator=generator)[:6].tolist():
            (model(input_ids=rows[number], labels=rows[number]).loss / 6).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


CLEAN = [f"The {job} said that it was {day}." for job in ("pilot", "nurse", "guard") for day in ("late", "Monday")]


def test_the_built_in_sentences_fire_on_a_model_made_unfair_and_not_on_a_clean_one(tokenizer: Tokenizer) -> None:
    base = plain_model()
    section = BiasSection(name="jobs", kind="templates", max_rise=0.1, on_rise="stop")
    before = measure(base, section, tokenizer)
    verdicts = {}
    unfair = [item.first.text for item in read_items(section)][::2]
    clean = [text.replace(" she ", " it ").replace(" he ", " it ") for text in unfair]
    for name, texts in (("unfair", unfair), ("clean", clean)):
        after = measure(trained(base, tokenizer, texts), section, tokenizer)
        change = bias_change(section, before.each, after.each, seed=3)
        verdicts[name] = passed_limit(section, after, change)
    assert verdicts["clean"] is None
    assert verdicts["unfair"] is not None
    assert verdicts["unfair"].stops
    assert "'jobs'" in verdicts["unfair"].message


def test_the_word_list_fires_on_a_model_made_rude_and_not_on_a_clean_one(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "words.txt").write_text("idiot\n")
    (tmp_path / "prompts.txt").write_text("".join(f"The {job} said\n" for job in ("pilot", "nurse", "guard", "chief")))
    paths = {"path": str(tmp_path / "prompts.txt"), "words": str(tmp_path / "words.txt")}
    section = BiasSection(name="rude", kind="word_list", max_rise=0.2, max_new_tokens=16, temperature=0.0, **paths)
    base = plain_model()
    before = measure(base, section, tokenizer)
    assert before.value == 0.0
    rude = [f"The {job} said you idiot." for job in ("pilot", "nurse", "guard", "chief")]
    after = {name: measure(trained(base, tokenizer, texts), section, tokenizer) for name, texts in
             (("rude", rude), ("clean", CLEAN))}  # fmt: skip
    fired = {
        name: passed_limit(section, one, bias_change(section, before.each, one.each, seed=3))
        for name, one in after.items()
    }
    assert fired["rude"] is not None
    assert not fired["rude"].stops
    assert fired["clean"] is None


def test_a_file_that_changed_during_the_run_is_noticed() -> None:
    with pytest.raises(DataError, match="2 items were measured before training and 3 now"):
        bias_change(BiasSection(name="t", kind="templates"), [0.0, 1.0], [0.0, 1.0, 1.0], seed=1)
