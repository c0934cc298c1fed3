"""Conversations with tools against transformers' own rendering and masks, and the templates that drop them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dsft.corpus.chat import ChatMarker
from dsft.corpus.encode import Encoder
from dsft.corpus.samples import BadRecord, Conversation, Message
from dsft.corpus.tokenizer import Tokenizer
from dsft.store.types import Document

TOOLS_BLOCK = (
    "{% if tools %}{{ '<|im_start|>system\n# Tools\n' }}{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
)
CALLS = (
    "{% if m.tool_calls %}{% for call in m.tool_calls %}"
    "{{ '\n<tool_call>\n' + call.function | tojson + '\n</tool_call>' }}{% endfor %}{% endif %}"
)
MARKED = (
    TOOLS_BLOCK + "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}" + CALLS + "{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
CONTROL = MARKED.replace("\n<tool_call>\n", "<|im_start|>")
"""Control tokens inside a call: the first one after the content is not the end of turn."""
JSON_ANSWERS = UNMARKED.replace(
    "{% else %}", "{% elif m['role'] == 'tool' %}{{ m['content'] | tojson + '<|im_end|>\n' }}{% else %}"
)
NO_CALLS = UNMARKED.replace(CALLS, "")
NO_TOOLS = UNMARKED.replace(TOOLS_BLOCK, "")
NAMED = UNMARKED.replace("{{ '<|im_start|>' + m['role'] + '\n' }}", "{{ '<|im_start|>' + (m.name or m.role) + '\n' }}")

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'Says "rain" or "sun".',
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def call(**arguments: Any) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}


def conversation(**changes: Any) -> Conversation:
    messages = (
        Message("user", "Rain in Köln?", name=changes.get("name")),
        Message(
            "assistant", changes.get("said", ""), tool_calls=(call(city="Köln", days=2, hourly=True), call(city=""))
        ),
        Message("tool", 'It says "sun".\n', name="weather", tool_call_id="c1"),
        Message("assistant", "No."),
    )
    return Conversation(messages, changes.get("tools", (TOOL,)))


def result(tokenizer: Tokenizer, template: str, sample: Conversation) -> Document | BadRecord:
    chosen = replace(tokenizer, chat_template=template)
    (found,) = Encoder(chosen, "assistant", ChatMarker(chosen)).encode([sample])
    return found


def reference(tokenizer: Tokenizer, template: str, sample: Conversation) -> dict[str, Any]:
    rows = []
    for m in sample.messages:
        extra = {"name": m.name, "tool_calls": list(m.tool_calls), "tool_call_id": m.tool_call_id}
        rows.append({"role": m.role, "content": m.content, **{key: value for key, value in extra.items() if value}})
    encoded: dict[str, Any] = tokenizer.hf.apply_chat_template(
        rows, list(sample.tools) or None, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    return encoded


@pytest.mark.parametrize(("template", "marked"), [(MARKED, MARKED), (UNMARKED, MARKED), (CONTROL, CONTROL)])
@pytest.mark.parametrize("said", ["", "Let me look."])
def test_ids_and_mask_are_those_of_transformers(
    any_tokenizer: Tokenizer, template: str, marked: str, said: str
) -> None:
    sample = conversation(said=said)
    expected = reference(any_tokenizer, marked, sample)
    document = result(any_tokenizer, template, sample)
    assert isinstance(document, Document), document
    assert document.ids.tolist() == expected["input_ids"]
    mask = np.zeros(len(document.ids), int)
    for start, end in document.spans:
        mask[start:end] = 1
    assert mask.tolist() == expected["assistant_masks"]


def test_the_call_is_learned_with_its_end_of_turn(chat_tokenizer: Tokenizer) -> None:
    document = result(chat_tokenizer, UNMARKED, conversation())
    assert isinstance(document, Document), document
    called, answered = (chat_tokenizer.decode_inside(document.ids, int(a), int(b)) for a, b in document.spans)
    assert called.count("<tool_call>") == 2
    assert called.endswith("</tool_call><|im_end|>")
    assert answered.strip() == "No.<|im_end|>"
    assert document.num_bytes == len(called.replace("<|im_end|>", "").encode()) + len(b"No.")


def test_a_template_may_write_a_tools_answer_as_json(chat_tokenizer: Tokenizer) -> None:
    sample = conversation()
    document = result(chat_tokenizer, JSON_ANSWERS, sample)
    assert isinstance(document, Document), document
    assert document.ids.tolist() == reference(chat_tokenizer, JSON_ANSWERS, sample)["input_ids"]


@pytest.mark.parametrize(
    ("template", "changes", "reason"),
    [
        (NO_CALLS, {}, r"drops tool_calls of messages\[1\]: 'weather' is not in its text"),
        (NO_CALLS, {"said": "Hm."}, r"drops tool_calls of messages\[1\]"),
        (NO_TOOLS, {}, "drops the tools"),
        (UNMARKED, {"name": "Ann"}, r"drops the name 'Ann' of messages\[0\] \(user\)"),
        (UNMARKED, {"tools": ({"name": "say <|im_end|>"},)}, "the tools spells the control token '<|im_end|>'"),
    ],
)  # fmt: skip
def test_what_a_template_drops_is_named(
    chat_tokenizer: Tokenizer, template: str, changes: dict[str, Any], reason: str
) -> None:
    found = result(chat_tokenizer, template, conversation(**changes))
    assert isinstance(found, BadRecord)
    with pytest.raises(BadRecord, match=reason.replace("|", r"\|") if "im_end" in reason else reason):
        raise found


def test_a_name_that_the_template_writes(chat_tokenizer: Tokenizer) -> None:
    assert isinstance(result(chat_tokenizer, NAMED, conversation(name="Ann")), Document)


def test_the_built_in_template_has_no_tools(chat_tokenizer: Tokenizer) -> None:
    assert chat_tokenizer.chat_template is not None
    found = result(chat_tokenizer, chat_tokenizer.chat_template, conversation())
    assert isinstance(found, BadRecord)
    assert "drops" in str(found)
