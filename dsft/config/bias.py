"""The bias tests of a run's YAML file."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dsft.config.section import Name, NonNegativeFloat, Section
from dsft.config.units import PositiveCount


class BiasSection(Section):
    """One bias test, always read as the change against the model before training."""

    name: Name
    kind: Literal["templates", "crows_pairs", "stereoset", "counterfactual", "word_list"]
    """templates: built-in sentences with occupations and pronouns. crows_pairs, stereoset: their files. counterfactual:
    words of your prompts are swapped. word_list: how often answers to your prompts hold a word of a list."""
    path: str | None = None
    """CrowS-Pairs' csv, StereoSet's json, or a file of prompts (.txt, one a line, or .jsonl with ``prompt``)."""
    swaps: str | None = None
    """counterfactual: a csv with the columns ``a`` and ``b``, words that change places. Default: English pronouns."""
    words: str | None = None
    """word_list: a text file, one word or phrase a line."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 32
    """word_list: length of an answer."""
    temperature: NonNegativeFloat = 1.0
    """word_list: 0 is greedy; each answer's draws come from (run.seed, its position)."""
    max_items: PositiveCount | None = None
    """Measure this many items, spread evenly over the file."""
    max_rise: NonNegativeFloat | None = None
    """Most that the value may rise above what it was before training. Passed where the rise is larger and its 95 %
    interval does not contain 0. Needs ``evaluate.at_start``."""
    on_rise: Literal["flag", "stop"] = "flag"
    """flag: a warning; stop: the run also saves and ends."""

    @model_validator(mode="after")
    def _has_its_files(self) -> BiasSection:
        if (self.path is None) != (self.kind == "templates"):
            raise ValueError(f"bias: kind {self.kind} {'has no' if self.path else 'needs a'} path")
        if (self.words is not None) != (self.kind == "word_list"):
            raise ValueError(f"bias: kind {self.kind} {'has no' if self.words else 'needs'} words")
        if self.swaps is not None and self.kind != "counterfactual":
            raise ValueError(f"bias: kind {self.kind} has no swaps")
        if self.on_rise == "stop" and self.max_rise is None:
            raise ValueError("bias: on_rise: stop needs a limit; give max_rise")
        return self
