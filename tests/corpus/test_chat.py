"""Conversations against transformers' own chat templates, and the templates that lose text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsft.corpus.chat import ChatMarker, Supervise
from dsft.corpus.encode import Encoder
from dsft.corpus.samples import BadRecord, Completion, Conversation, Message, Text
from dsft.corpus.tokenizer import Tokenizer, load_tokenizer
from dsft.errors import DataError
from dsft.store.types import Document
from tests.support.tokenizers import tiny_tokenizer_folder

LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
PLAIN_TEXT = "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + '\n\n' }}{% endfor %}"
TURN = "{{ '<|im_start|>' + m['role'] + '\n' + c + '<|im_end|>\n' }}"
ROLE_DROPPER = (
    "{% for m in messages %}{% set c = m['content'] %}{% if m['role'] in ('user', 'assistant') %}"
    + TURN
    + "{% endif %}{% endfor %}"
)
THINKER = (
    "{% for m in messages %}{% set c = m['content'] %}"
    "{% if m['role'] == 'assistant' and not loop.last and '</think>' in c %}"
    "{% set c = c.split('</think>')[-1] %}{% endif %}" + TURN + "{% endfor %}"
)
MARKED_TOO_SHORT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}"
)
UNENDED = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"


def conversation(*pairs: tuple[str, str]) -> Conversation:
    return Conversation(tuple(Message(role, content) for role, content in pairs))


def with_template(tokenizer: Tokenizer, template: str) -> Tokenizer:
    return replace(tokenizer, chat_template=template)


def encode(tokenizer: Tokenizer, sample: Conversation, supervise: Supervise = "assistant") -> Document | BadRecord:
    (result,) = Encoder(tokenizer, supervise, ChatMarker(tokenizer)).encode([sample])
    return result


def document(tokenizer: Tokenizer, sample: Conversation, supervise: Supervise = "assistant") -> Document:
    result = encode(tokenizer, sample, supervise)
    assert isinstance(result, Document), result
    return result


def learned(tokenizer: Tokenizer, doc: Document) -> list[str]:
    return [tokenizer.decode_inside(doc.ids, int(start), int(end)) for start, end in doc.spans]


def as_dicts(sample: Conversation) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in sample.messages]


CHAT = conversation(
    ("system", "Be brief."), ("user", "What is déjà vu?\n\n "), ("assistant", "A feeling."), ("user", "你好 😀"),
    ("assistant", "  indented\n\tcode\n"),
)  # fmt: skip


def test_ids_and_mask_are_those_of_transformers(any_tokenizer: Tokenizer) -> None:
    any_tokenizer.hf.chat_template = any_tokenizer.chat_template
    reference = any_tokenizer.hf.apply_chat_template(
        as_dicts(CHAT), return_dict=True, return_assistant_tokens_mask=True
    )
    doc = document(any_tokenizer, CHAT)
    assert doc.ids.tolist() == reference["input_ids"]
    mask = np.zeros(len(doc.ids), int)
    for start, end in doc.spans:
        mask[start:end] = 1
    assert mask.tolist() == reference["assistant_masks"]
    assert doc.num_bytes == len(b"A feeling.") + len(b"  indented\n\tcode\n")


@pytest.mark.parametrize("template", [LLAMA2, PLAIN_TEXT, THINKER])
def test_unmarked_templates_give_transformers_ids(any_tokenizer: Tokenizer, template: str) -> None:
    tokenizer = with_template(any_tokenizer, template)
    sample = conversation(("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four five"))
    expected = tokenizer.hf.apply_chat_template(as_dicts(sample), chat_template=template, return_dict=True)["input_ids"]
    assert document(tokenizer, sample).ids.tolist() == expected


def test_end_of_turn_is_learned_and_what_follows_it_is_not(any_tokenizer: Tokenizer) -> None:
    sample = conversation(("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four"))
    texts = learned(any_tokenizer, document(any_tokenizer, sample))
    assert [text.lstrip() for text in texts] == ["two<|im_end|>", "four<|im_end|>"]
    llama = with_template(any_tokenizer, LLAMA2)
    end = f" {any_tokenizer.hf.eos_token}"
    assert [t.strip() for t in learned(llama, document(llama, sample))] == [f"two{end}", f"four{end}"]
    plain = with_template(any_tokenizer, PLAIN_TEXT)
    assert learned(plain, document(plain, sample)) == ["two\n\n", "four\n\n"]


def test_end_of_turn_id(any_tokenizer: Tokenizer) -> None:
    im_end = any_tokenizer.hf.convert_tokens_to_ids("<|im_end|>")
    assert ChatMarker(any_tokenizer).end_of_turn_id() == im_end
    assert ChatMarker(with_template(any_tokenizer, LLAMA2)).end_of_turn_id() == any_tokenizer.eos_id
    assert ChatMarker(with_template(any_tokenizer, PLAIN_TEXT)).end_of_turn_id() is None


def test_no_doubled_bos(tokenizer_folders: dict[str, str]) -> None:
    tokenizer = with_template(load_tokenizer(tokenizer_folders["legacy"]), LLAMA2)
    assert tokenizer.prefix_ids == (1,)
    doc = document(tokenizer, conversation(("user", "one"), ("assistant", "two")))
    assert doc.ids.tolist().count(1) == 1
    assert doc.ids[0] == 1


@pytest.mark.parametrize(
    ("template", "sample", "reason"),
    [
        (ROLE_DROPPER, (("tool", "42"), ("user", "a"), ("assistant", "b")), r"drops messages\[0\] \(tool\)"),
        (
            THINKER,
            (("user", "a"), ("assistant", "<think>x</think>b"), ("user", "c"), ("assistant", "d")),
            "trims, drops",
        ),
        (LLAMA2, (("user", "a"), ("assistant", "  indented")), r"messages\[1\] \(assistant\) exactly"),
        (LLAMA2, (("system", "s"), ("user", "a"), ("assistant", "b")), "only user and assistant"),
        (MARKED_TOO_SHORT, (("user", "a"), ("assistant", "b")), "before the end of turn '<|im_end|>'"),
        (UNENDED, (("user", "a"), ("assistant", "b")), "would never learn to stop"),
    ],
)
def test_a_template_that_loses_text_is_refused_by_name(
    base_tokenizer: Tokenizer, template: str, sample: tuple[tuple[str, str], ...], reason: str
) -> None:
    import re

    result = encode(with_template(base_tokenizer, template), conversation(*sample))
    assert isinstance(result, BadRecord)
    assert re.search(reason.replace("|", r"\|"), str(result)), result


def test_content_that_a_template_treats_specially_but_keeps_is_accepted(base_tokenizer: Tokenizer) -> None:
    tokenizer = with_template(base_tokenizer, THINKER)
    sample = conversation(("user", "a"), ("assistant", "<think>why</think>because"))
    assert learned(tokenizer, document(tokenizer, sample)) == ["<think>why</think>because<|im_end|>"]


def test_trimmed_user_text_is_accepted(base_tokenizer: Tokenizer) -> None:
    tokenizer = with_template(base_tokenizer, LLAMA2)
    doc = document(tokenizer, conversation(("user", " a \n"), ("assistant", "b")))
    assert tokenizer.decode(doc.ids) == "<s>[INST] a [/INST] b </s>"


def test_supervise_and_message_flags(chat_tokenizer: Tokenizer) -> None:
    pairs = (("user", "u1"), ("assistant", "a1"), ("user", "u2"), ("assistant", "a2"))
    sample = conversation(*pairs)
    assert learned(chat_tokenizer, document(chat_tokenizer, sample, "last_assistant")) == ["a2<|im_end|>"]
    everything = document(chat_tokenizer, sample, "all")
    covered = sum(int(end - start) for start, end in everything.spans)
    assert covered == len(everything.ids)
    flagged = Conversation(
        (
            Message("user", "u1", train=True),
            Message("assistant", "a1", train=False),
            Message("user", "u2"),
            Message("assistant", "a2", loss_weight=0.5),
            Message("user", "u3"),
            Message("assistant", "a3", loss_weight=0.0),
        )
    )
    doc = document(chat_tokenizer, flagged)
    assert learned(chat_tokenizer, doc) == ["u1<|im_end|>", "a2<|im_end|>"]
    assert doc.span_weights.tolist() == [1.0, 0.5]
    excluded = document(chat_tokenizer, flagged, "all")
    text = "".join(learned(chat_tokenizer, excluded))
    assert "a1" not in text
    assert "a3" not in text
    assert "u2" in text


def test_chat_data_need_a_template(base_tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"no chat template \(base models have none\)"):
        ChatMarker(base_tokenizer)
    with pytest.raises(DataError, match="not valid Jinja: line 1"):
        ChatMarker(with_template(base_tokenizer, "{% for %}"))


def test_a_completion_is_plain_text_with_an_end(any_tokenizer: Tokenizer) -> None:
    (doc,) = Encoder(any_tokenizer, "assistant", None).encode([Completion("Q: one?\nA:", " yes </s>")])
    assert isinstance(doc, Document)
    hf = any_tokenizer.hf
    plain = hf.encode("Q: one?\nA:", add_special_tokens=True)
    assert doc.ids[: len(plain)].tolist() == plain
    eos = hf.eos_token
    assert learned(any_tokenizer, doc) == [f" yes </s>{eos}"]
    assert doc.ids.tolist().count(any_tokenizer.eos_id) == 1
    assert doc.num_bytes == len(" yes </s>")


def test_a_token_across_the_border_is_refused(base_tokenizer: Tokenizer) -> None:
    (result,) = Encoder(base_tokenizer, "assistant", None).encode([Completion("The stat", "ement is")])
    assert isinstance(result, BadRecord)
    assert "straddles the border of the completion" in str(result)


def test_a_control_token_that_swallows_white_space_is_refused(tmp_path: Path) -> None:
    """As Phi 3's <|assistant|>, which strips what follows it."""
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    hf = AutoTokenizer.from_pretrained(tiny_tokenizer_folder(tmp_path))
    hf.add_tokens([AddedToken("<|assistant|>", rstrip=True, special=True)], special_tokens=True)
    hf.save_pretrained(tmp_path / "phi")
    template = tmp_path / "phi.jinja"
    template.write_text(
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    )
    tokenizer = load_tokenizer(str(tmp_path / "phi"), chat_template=str(template))
    kept = document(tokenizer, conversation(("user", "a"), ("assistant", "plain")))
    assert learned(tokenizer, kept) == ["plain<|im_end|>"]
    for answer in ("  indented", "\n"):
        result = encode(tokenizer, conversation(("user", "a"), ("assistant", answer)))
        assert isinstance(result, BadRecord), answer


def test_a_tokenizer_that_normalises_is_accepted_for_what_it_gives_back(tokenizer_folders: dict[str, str]) -> None:
    tokenizer = load_tokenizer(tokenizer_folders["byte_level"], chat_template="chatml")
    doc = document(tokenizer, conversation(("user", "a"), ("assistant", " de\u0301ja\u0300")))
    assert learned(tokenizer, doc) == [" d\u00e9j\u00e0<|im_end|>"]


def test_raw_text_is_learned_whole(any_tokenizer: Tokenizer) -> None:
    text = "Héllo </s> <|im_end|>\n"
    (doc,) = Encoder(any_tokenizer, "assistant", None).encode([Text(text)])
    assert isinstance(doc, Document)
    assert doc.spans.tolist() == [[0, len(doc.ids)]]
    assert doc.num_bytes == len(text.encode())
    inner = doc.ids[len(any_tokenizer.prefix_ids) : -1]
    assert any_tokenizer.decode(inner) == text
    assert doc.ids[-1] == any_tokenizer.eos_id
    assert not any_tokenizer.control.ids & set(inner.tolist())


def test_dates_in_templates_do_not_change_from_day_to_day(base_tokenizer: Tokenizer) -> None:
    dated = "{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}" + PLAIN_TEXT
    tokenizer = with_template(base_tokenizer, dated)
    doc = document(tokenizer, conversation(("user", "a"), ("assistant", "b")))
    assert tokenizer.decode(doc.ids).startswith("Today: 26 Jul 2024\n")


def test_the_sandbox_keeps_templates_in(base_tokenizer: Tokenizer) -> None:
    evil = "{{ messages.__class__.__mro__ }}{{ ''.__class__ }}" + PLAIN_TEXT
    result = encode(with_template(base_tokenizer, "{{ cycler.__init__.__globals__.os.getcwd() }}" + PLAIN_TEXT), CHAT)
    assert isinstance(result, BadRecord)
    rendered = encode(with_template(base_tokenizer, evil), CHAT)
    assert isinstance(rendered, BadRecord) or "class" not in base_tokenizer.decode(rendered.ids)


PIECES = st.sampled_from(
    [
        *("", " ", "  ", "\n", "\t", "\r\n", "\u2028", "\u00a0", "a", "word ", " word", "1234", "é", "你", "😀", "▁"),
        *("<|im_end|>", "<|im_start|>assistant\n", "</s>", "<s>", "<unk>", "<|im_end", "|>", "</think>"),
        *("{{ x }}", "{% generation %}"),
    ]
)
CONTENTS = st.lists(PIECES, max_size=6).map("".join)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=st.lists(st.tuples(CONTENTS, CONTENTS), min_size=1, max_size=3))
def test_spans_decode_to_what_the_assistant_said(any_tokenizer: Tokenizer, turns: list[tuple[str, str]]) -> None:
    sample = conversation(*(pair for user, answer in turns for pair in (("user", user), ("assistant", answer))))
    doc = encode(any_tokenizer, sample)
    if isinstance(doc, BadRecord):  # SentencePiece writes a space as U+2581, so it cannot give that character back
        assert any("▁" in answer for _, answer in turns), doc
        return
    texts = learned(any_tokenizer, doc)
    assert len(texts) == len(turns)
    for text, (_, answer) in zip(texts, turns, strict=True):
        if "▁" not in answer:
            before = text.removesuffix(f"{answer}<|im_end|>")
            assert before != text
            # The template's line break before an answer that begins with white space may be in the same token.
            assert before in (("", "\n") if answer[:1].isspace() else ("",))
    # Every control token is the template's own.
    controls = [int(i) for i in doc.ids if int(i) in any_tokenizer.control.ids]
    assert len(controls) == 4 * len(turns)
    assert doc.num_bytes == sum(len(answer.encode()) for _, answer in turns)
