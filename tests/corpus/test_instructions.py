"""Hand-made rows in the formats of Alpaca and ShareGPT, with the variants that data sets of the field have."""

from __future__ import annotations

from typing import Any

import pytest

from dsft.corpus.instructions import parse_alpaca, parse_sharegpt
from dsft.corpus.samples import BadRecord, Conversation, Message

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def pairs(sample: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in sample.messages]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"instruction": "i", "output": "o"}, [("user", "i"), ("assistant", "o")]),
        ({"instruction": "i", "input": "", "output": "o"}, [("user", "i"), ("assistant", "o")]),
        ({"instruction": "i", "input": "more", "output": "o"}, [("user", "i\nmore"), ("assistant", "o")]),
        ({"instruction": "", "input": "only", "output": "o"}, [("user", "only"), ("assistant", "o")]),
        (
            {"instruction": "i", "input": None, "output": "o", "system": "s", "history": [["u1", "a1"], ["u2", "a2"]]},
            [
                ("system", "s"),
                ("user", "u1"),
                ("assistant", "a1"),
                ("user", "u2"),
                ("assistant", "a2"),
                ("user", "i"),
                ("assistant", "o"),
            ],
        ),
        ({"instruction": "i", "output": "o", "history": None, "system": None}, [("user", "i"), ("assistant", "o")]),
    ],
)
def test_alpaca(record: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert pairs(parse_alpaca(record)) == expected


def test_sharegpt() -> None:
    turns = [
        {"from": "human", "value": "h"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}', "train": False},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "g", "weight": 0.5},
    ]
    sample = parse_sharegpt({"conversations": turns, "system": "s", "tools": '[{"name": "f"}]'})
    assert sample == Conversation(
        (
            Message("system", "s"),
            Message("user", "h"),
            Message("assistant", "", train=False, tool_calls=(CALL,)),
            Message("tool", "2"),
            Message("assistant", "g", loss_weight=0.5),
        ),
        ({"name": "f"},),
    )


@pytest.mark.parametrize(
    "record",
    [
        {"conversation": [{"from": "user", "value": "h"}, {"from": "chatgpt", "value": "g"}]},
        {"conversations": [{"role": "user", "content": "h"}, {"role": "assistant", "content": "g"}]},
        {"conversations": [{"from": None, "role": "human", "content": "h"}, {"from": "bard", "value": "g"}]},
    ],
)  # fmt: skip
def test_sharegpt_variants(record: dict[str, Any]) -> None:
    assert pairs(parse_sharegpt(record)) == [("user", "h"), ("assistant", "g")]


def test_several_calls_in_one_turn() -> None:
    value = '[{"name": "f", "arguments": {"x": 1}}, {"name": "f", "arguments": "{\\"x\\": 1}"}]'
    (message,) = parse_sharegpt({"conversations": [{"from": "tool_call", "value": value}]}).messages
    assert message.tool_calls == (CALL, CALL)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"instruction": "i"}, "no field 'output'"),
        ({"instruction": 3, "output": "o"}, "field 'instruction' is a number"),
        ({"instruction": "i", "output": None}, "field 'output' is null"),
        ({"instruction": "i", "output": "o", "history": [["u"]]}, r"not a list of \[user, assistant\] pairs"),
        ({"instruction": "i", "output": "o", "history": [["u", None]]}, r"history\[0\]\[1\] is null"),
    ],
)
def test_alpaca_rows_that_cannot_be_used(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRecord, match=reason):
        parse_alpaca(record)


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([], "is an empty list, not a list of turns"),
        (["hi"], r"conversations\[0\] is a string, not an object with 'from' and 'value'"),
        ([{"from": "narrator", "value": "x"}], "from is 'narrator'; the speakers of the sharegpt format are human"),
        ([{"value": "x"}], "from is None"),
        ([{"from": "gpt", "value": None}], "value is null"),
        ([{"from": "function_call", "value": "f(1)"}], "is a string that is not JSON"),
        ([{"from": "function_call", "value": "3"}], "is a number, not an object"),
    ],
)
def test_sharegpt_rows_that_cannot_be_used(turns: list[Any], reason: str) -> None:
    with pytest.raises(BadRecord, match=reason):
        parse_sharegpt({"conversations": turns})
