from __future__ import annotations

from typing import Any

import pytest

from dsft.corpus.formats import Format, parse_record
from dsft.corpus.samples import BadRecord, Completion, Conversation, Message, Text


def test_samples_of_every_format() -> None:
    assert parse_record({"body": "x", "id": 1}, "text", "body", False) == Text("x")
    pair = {"prompt": "p", "completion": "c"}
    assert parse_record(pair, "prompt_completion", "text", False) == Completion("p", "c")
    chat = Conversation((Message("user", "p"), Message("assistant", "c")))
    assert parse_record(pair, "prompt_completion", "text", True) == chat
    messages = [
        {"role": "user", "content": "p"},
        {"role": "assistant", "content": "c", "train": True, "loss_weight": 2},
    ]
    assert parse_record({"messages": messages}, "messages", "text", True) == Conversation(
        (Message("user", "p"), Message("assistant", "c", True, 2.0))
    )


def test_messages_of_a_prompt_are_learned_only_where_they_say_so() -> None:
    turn = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    sample = parse_record({"prompt": turn, "completion": turn[1:]}, "prompt_completion", "text", True)
    assert isinstance(sample, Conversation)
    assert [message.train for message in sample.messages] == [False, False, None]
    turn[1] = {**turn[1], "train": True}  # type: ignore[dict-item]
    sample = parse_record({"prompt": turn, "completion": turn[1:]}, "prompt_completion", "text", True)
    assert isinstance(sample, Conversation)
    assert [message.train for message in sample.messages] == [False, True, True]


def test_nulls_that_tables_put_in_are_not_there() -> None:
    row = {"role": "user", "content": "u", "train": None, "loss_weight": None, "tool_calls": None, "name": None}
    sample = parse_record({"messages": [row], "tools": None}, "messages", "text", True)
    assert sample == Conversation((Message("user", "u"),))


USER = {"role": "user", "content": "u"}
SAID = {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    ("record", "record_format", "reason"),
    [
        (["a"], "text", "the record is a list, not an object"),
        ("a", "text", "the record is a string"),
        (None, "text", "the record is null"),
        ({"body": "x"}, "text", "no field 'text'; the record's fields are: body"),
        ({"text": None}, "text", "field 'text' is null, not a string"),
        ({"text": 3}, "text", "field 'text' is a number"),
        ({"text": "half \ud83d"}, "text", "half of a surrogate pair"),
        ({"messages": []}, "messages", "an empty list"),
        ({"messages": "hi"}, "messages", "is a string, not a list of messages"),
        ({"messages": [USER, "hi"]}, "messages", r"messages\[1\] is a string"),
        ({"messages": [{"from": "human", "value": "hi"}]}, "messages", "looks like the sharegpt format"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages",
            "content is a list, not a string",
        ),
        (
            {"messages": [{**USER, "role": "Assistant"}]},
            "messages",
            r"messages\[0\].role is 'Assistant'; the roles are",
        ),
        ({"messages": [{**USER, "role": "human"}]}, "messages", "is 'human'; the roles are system, developer, user"),
        ({"messages": [{**USER, "train": "yes"}]}, "messages", r"messages\[0\].train is a string, not true or false"),
        ({"messages": [{**USER, "loss_weight": True}]}, "messages", "loss_weight is a boolean"),
        ({"messages": [{**USER, "loss_weight": -1}]}, "messages", "must be finite and not negative"),
        ({"messages": [{**USER, "loss_weight": float("inf")}]}, "messages", "must be finite"),
        ({"messages": [{**USER, "reasoning": "hm"}]}, "messages", "has 'reasoning', which is not supported"),
        ({"messages": [{**USER, "tool_calls": [CALL]}]}, "messages", "role is 'user'; only the assistant calls tools"),
        ({"messages": [{**SAID, "tool_calls": [{"id": "1"}]}]}, "messages", r"tool_calls\[0\] has no 'name'"),
        ({"messages": [{**SAID, "tool_calls": {"name": "f"}}]}, "messages", "tool_calls is an object, not a list"),
        ({"messages": [{**SAID, "function_call": {"name": "f", "arguments": "{x"}}]}, "messages", "is not JSON"),
        ({"messages": [{**SAID, "function_call": {"name": "f", "arguments": "[1]"}}]}, "messages", "not an object"),
        ({"messages": [{**SAID, "content": None}]}, "messages", "content is null, not a string"),
        ({"messages": [{**USER, "weight": 0.5, "loss_weight": 1.0}]}, "messages", "they mean the same"),
        ({"messages": [{**USER, "content": [{"type": "image"}]}]}, "messages", "not all of it is text"),
        ({"messages": [USER], "tools": {"name": "f"}}, "messages", "'tools' is an object, not a list of objects"),
        ({"messages": [USER], "documents": ["d"]}, "messages", "'documents' is not supported"),
        ({"prompt": "p", "completion": [USER]}, "prompt_completion", "must both be strings or both be lists"),
        ({"prompt": "p"}, "prompt_completion", "no field 'completion'"),
    ],
)
def test_what_cannot_be_used_is_named(record: Any, record_format: Format, reason: str) -> None:
    with pytest.raises(BadRecord, match=reason):
        parse_record(record, record_format, "text", True)


def messages_of(record: Any, record_format: Format = "messages", **columns: str) -> tuple[Message, ...]:
    sample = parse_record(record, record_format, "text", True, columns)
    assert isinstance(sample, Conversation)
    return sample.messages


@pytest.mark.parametrize(
    "calls",
    [
        {"tool_calls": [{**CALL, "id": "c1"}]},
        {"tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"tool_calls": [{"id": "c1", "name": "f", "arguments": {"x": 1, "y": None}}]},
        {"tool_calls": '[{"id": "c1", "name": "f", "arguments": {"x": 1}}]'},
        {"function_call": {"id": "c1", "name": "f", "arguments": '{"x": 1}'}},
    ],
)
def test_tool_calls_in_every_spelling(calls: dict[str, Any]) -> None:
    rows = [
        USER,
        {"role": "assistant", "content": None, **calls},
        {"role": "function", "name": "f", "tool_call_id": "c1", "content": "2"},
    ]
    assert messages_of({"messages": rows})[1:] == (
        Message("assistant", "", tool_calls=({"id": "c1", **CALL},)),
        Message("tool", "2", name="f", tool_call_id="c1"),
    )


def test_tools_text_parts_and_weights() -> None:
    tool = {"name": "f", "description": None, "parameters": {}}
    rows = [{"role": "user", "name": "Ann", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    sample = parse_record({"messages": [*rows, {**SAID, "weight": 0}], "functions": [tool]}, "messages", "text", True)
    assert sample == Conversation(
        (Message("user", "ab", name="Ann"), Message("assistant", "a", loss_weight=0.0)),
        ({"name": "f", "parameters": {}},),
    )


def test_columns_give_the_fields_their_own_names() -> None:
    row = {"question": "q", "answer": "a", "prompt": "not this", "note": 1}
    mapped = {"prompt": "question", "completion": "answer"}
    assert messages_of(row, "prompt_completion", **mapped) == (Message("user", "q"), Message("assistant", "a"))
    swapped = parse_record({"prompt": "a", "completion": "q"}, "prompt_completion", "text", False, {
        "prompt": "completion", "completion": "prompt"
    })  # fmt: skip
    assert swapped == Completion("q", "a")
    dialog = {"dialog": [{"speaker": "user", "said": "u"}]}
    assert messages_of(dialog, messages="dialog", role="speaker", content="said") == (Message("user", "u"),)
    turns = {"turns": [{"who": "human", "what": "u"}]}
    columns = {"conversations": "turns", "from": "who", "value": "what"}
    assert messages_of(turns, "sharegpt", **columns) == (Message("user", "u"),)
    with pytest.raises(BadRecord, match="no field 'question'; the record's fields are: prompt"):
        messages_of({"prompt": "p"}, "prompt_completion", **mapped)


def test_system_beside_a_prompt() -> None:
    row = {"system": "s", "prompt": "p", "completion": "c"}
    assert messages_of(row, "prompt_completion")[0] == Message("system", "s")
    with pytest.raises(BadRecord, match="need a chat template"):
        parse_record(row, "prompt_completion", "text", False)
    with pytest.raises(BadRecord, match="make it the first message"):
        messages_of({"system": "s", "prompt": [USER], "completion": [SAID]}, "prompt_completion")
