"""What a record says, whatever its format: a text, a prompt with its completion, or a conversation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class BadRecord(Exception):  # noqa: N818  (a finding about the data; becomes a DataError or a count, by policy)
    """A record that cannot be used; the message says why, the caller knows where."""


@dataclass(frozen=True, slots=True)
class Text:
    """Raw text, learned whole."""

    text: str


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and what follows it, as plain text; only the completion is learned."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: as the chat template knows it.
        content: its text.
        train: True or False where the data says so; None leaves it to ``supervise``.
        loss_weight: factor in the loss, >= 0; 0 means not learned.
        name: of the speaker, or of the tool that answers; None: not said.
        tool_calls: functions that the assistant calls, as chat templates expect them:
            ``{"type": "function", "function": {"name": ..., "arguments": {...}}}``, with ``id`` where the data has one.
        tool_call_id: the call that a tool's message answers; None: not said.
    """

    role: str
    content: str
    train: bool | None = None
    loss_weight: float = 1.0
    name: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    tool_call_id: str | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages for the chat template, and the tools it tells the model of (JSON schemas, as chat templates expect)."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


Sample = Text | Completion | Conversation


def sample_text(sample: Sample) -> str:
    """All that a row says, as one text."""
    if isinstance(sample, Text):
        return sample.text
    if isinstance(sample, Completion):
        return f"{sample.prompt}\n{sample.completion}"
    return "\n".join(message.content for message in sample.messages)
