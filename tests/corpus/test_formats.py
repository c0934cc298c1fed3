from __future__ import annotations

from typing import Any

import pytest

from dsft.corpus.formats import BadRecord, Completion, Conversation, Format, Message, Text, parse_record


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
        ({"messages": [{**USER, "train": "yes"}]}, "messages", r"messages\[0\].train is a string, not true or false"),
        ({"messages": [{**USER, "loss_weight": True}]}, "messages", "loss_weight is a boolean"),
        ({"messages": [{**USER, "loss_weight": -1}]}, "messages", "must be finite and not negative"),
        ({"messages": [{**USER, "loss_weight": float("inf")}]}, "messages", "must be finite"),
        ({"messages": [{**USER, "tool_calls": [{"id": 1}]}]}, "messages", "has 'tool_calls', which is not supported"),
        ({"messages": [USER], "tools": [{"name": "f"}]}, "messages", "field 'tools' is not supported"),
        ({"prompt": "p", "completion": [USER]}, "prompt_completion", "must both be strings or both be lists"),
        ({"prompt": "p"}, "prompt_completion", "no field 'completion'"),
    ],
)
def test_what_cannot_be_used_is_named(record: Any, record_format: Format, reason: str) -> None:
    with pytest.raises(BadRecord, match=reason):
        parse_record(record, record_format, "text", True)
