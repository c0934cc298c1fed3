"""What is learned of a raw-text source, other than the next token."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dsft.config.section import Section, UnitInterval


class FillInTheMiddleSection(Section):
    """Objective of a raw-text source whose documents are rearranged in part (arXiv:2207.14255)."""

    kind: Literal["fim"]
    rate: UnitInterval = 0.5
    """Share of the documents that are rearranged; the others are learned as they are."""
    spm_rate: UnitInterval = 0.5
    """Share of these in which the suffix comes first (SPM); the others begin with the prefix (PSM)."""
    prefix: str = "<|fim_prefix|>"
    """Sentinels: tokens that the tokenizer has, or that model.add_tokens adds."""
    suffix: str = "<|fim_suffix|>"
    middle: str = "<|fim_middle|>"

    @property
    def sentinels(self) -> tuple[str, str, str]:
        """Prefix, suffix and middle sentinel."""
        return self.prefix, self.suffix, self.middle

    @model_validator(mode="after")
    def _distinct(self) -> FillInTheMiddleSection:
        if len(set(self.sentinels)) < len(self.sentinels):
            raise ValueError(f"objective: the sentinels must differ, and are {', '.join(self.sentinels)}")
        return self


class MaskedLanguageModellingSection(Section):
    """Objective of a raw-text source for an encoder: predict hidden tokens (BERT, arXiv:1810.04805)."""

    kind: Literal["mlm"]
    rate: Annotated[float, Field(gt=0.0, le=1.0)] = 0.15
    """Share of the tokens that are chosen, and predicted."""
    mask_share: UnitInterval = 0.8
    """Share of the chosen tokens that are hidden behind the tokenizer's mask token."""
    random_share: UnitInterval = 0.1
    """Share of them in whose place stands a random token; the others stay as they are."""

    @model_validator(mode="after")
    def _shares(self) -> MaskedLanguageModellingSection:
        if self.mask_share + self.random_share > 1.0:
            raise ValueError("objective: mask_share and random_share together are more than 1")
        return self
