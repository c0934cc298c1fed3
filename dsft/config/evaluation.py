"""The evaluation section of a run's YAML file."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dsft.config.bias import BiasSection
from dsft.config.columns import RecordFormat, check_columns
from dsft.config.section import DataPath, Items, Name, NonNegativeFloat, PositiveFloat, Section
from dsft.config.units import PositiveCount


class MemorisationSection(Section):
    """Whether the model continues documents of a set word for word (the path may name training data, or canaries)."""

    documents: Annotated[int, Field(ge=1)] = 100
    """Most documents to probe."""
    prefix_tokens: Annotated[int, Field(ge=1)] = 32
    continue_tokens: Annotated[int, Field(ge=1)] = 32
    """Tokens that must be the document's own, all of them."""
    max_share: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    """Warn where more than this share of the documents is reproduced."""


class EvaluationSetSection(Section):
    """One held-out set."""

    name: Name
    path: DataPath
    format: RecordFormat = "text"
    text_field: str = "text"
    columns: dict[str, str] = Field(default_factory=dict)
    """As for a source."""
    supervise: Literal["assistant", "last_assistant", "all"] = "assistant"
    source: str | None = None
    """The training source this set is held out from; its training loss is shown beside the held-out loss."""
    max_documents: PositiveCount | None = None
    max_rise: NonNegativeFloat | None = None
    """Most that the loss may rise above what it was before training (nats a token): beyond it the run ends early,
    because it forgets. Needs ``evaluate.at_start``."""
    memorisation: MemorisationSection | None = None
    generate: Annotated[int, Field(ge=0)] = 0
    """Number of prompts answered for exact match and token F1 (instruction formats only)."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 128
    temperature: NonNegativeFloat = 0.0
    """0: greedy. Above: sampled, each answer from (run.seed, its position), so equal on every number of ranks."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Sample from the most likely tokens that together have this probability."""
    metrics: Items[Literal["rouge1", "rouge2", "rougeL", "bleu", "chrf"]] = ()
    """Further scores of the answers, by rouge-score and sacrebleu (extra ``eval``)."""
    checker: str | None = None
    """A Python file with ``check(prompt, answer, reference) -> bool``; its pass rate is measured. It runs the user's
    own code in a process of its own."""
    checker_seconds: PositiveFloat = 10.0
    """Limit for one answer; an answer that takes longer has not passed."""

    @model_validator(mode="after")
    def _known_columns(self) -> EvaluationSetSection:
        check_columns(self.format, self.columns)
        if self.generate and self.format == "text":
            raise ValueError("generate answers prompts, and raw text has none; remove it, or give another format")
        if not self.generate and (self.metrics or self.checker or self.temperature or self.top_p < 1.0):
            raise ValueError("metrics, checker, temperature and top_p are about answers; say how many with generate")
        if self.top_p < 1.0 and not self.temperature:
            raise ValueError("top_p limits what is sampled, and temperature 0 samples nothing; give a temperature")
        return self


class LmEvalSection(Section):
    """Tasks of lm-evaluation-harness, measured by ``dsft eval`` (never in training)."""

    path: str
    """Folder of the tasks' YAML files; nothing is taken from the network unless they name it."""
    tasks: Items[str]
    """Names of tasks or groups."""
    limit: PositiveCount | None = None
    """Documents of each task; default: all."""
    chat_template: bool = False
    """Give the prompts as messages, in the model's chat template."""


class EarlyStopSection(Section):
    """Stop when a held-out loss rises while its training loss falls."""

    patience: Annotated[int, Field(ge=1)] = 3
    """Evaluations in a row that the held-out loss must be above its best while training loss still falls."""


class EvaluateSection(Section):
    """Held-out sets and when they are measured."""

    every_steps: PositiveCount | None = None
    at_start: bool = False
    at_stage_ends: bool = True
    at_end: bool = True
    sets: Items[EvaluationSetSection] = ()
    bias: Items[BiasSection] = ()
    """Bias tests, measured whenever the sets are."""
    lm_eval: LmEvalSection | None = None
    early_stop: EarlyStopSection | None = None
    """Absent: overfitting is only warned about."""

    @model_validator(mode="after")
    def _can_decide(self) -> EvaluateSection:
        for key, names in (("sets", [one.name for one in self.sets]), ("bias", [one.name for one in self.bias])):
            if len(set(names)) != len(names):
                repeated = sorted(n for n in names if names.count(n) > 1)[0]
                raise ValueError(f"evaluate.{key}: two {key} share a name: {repeated!r}")
        for test in self.bias:
            if test.max_rise is not None and not self.at_start:
                raise ValueError(
                    f"evaluate.bias: max_rise of {test.name!r} is measured from before training: set at_start: true"
                )
        for held_out in self.sets:
            if held_out.max_rise is not None and not self.at_start:
                raise ValueError(
                    f"evaluate.sets: max_rise of {held_out.name!r} is measured from before training: set at_start: true"
                )
        if self.early_stop is not None and not any(held_out.source for held_out in self.sets):
            raise ValueError(
                "evaluate.early_stop compares held-out with training loss, so it needs a set whose source is given"
            )
        return self
