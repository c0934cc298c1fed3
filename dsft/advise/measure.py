"""Measures data and model for ``dsft advise``: counts, copies, both parts written, the model on the part set aside."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsft.advise.evidence import GeneralEvidence, PairsEvidence, TextEvidence
from dsft.advise.pairs import pair_shapes
from dsft.advise.recipe import Facts, Part
from dsft.advise.shape import model_shape
from dsft.advise.split import SplitSource, find_pairs_format, split_source
from dsft.config.models import DataSection, ModelSection, SourceSection
from dsft.corpus.audit import SourceAudit, audit_source
from dsft.corpus.prepare import prepare_sources
from dsft.corpus.progress import ProgressLines
from dsft.corpus.statistics import source_statistics
from dsft.corpus.tokenizer import Tokenizer, load_tokenizer
from dsft.errors import ConfigError, DataError
from dsft.model.load import read_hf_config
from dsft.store.reader import SourceStore

logger = logging.getLogger(__name__)

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
_AUDIT_PACK_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the user gave.

    Attributes:
        model: folder or hub name. text, pairs, general: paths, globs or folders; empty where none.
        folder: where everything is written.
        device_type: where the run will be.
    """

    model: str
    text: tuple[str, ...]
    pairs: tuple[str, ...]
    general: tuple[str, ...]
    text_field: str
    folder: Path
    device_type: str


@dataclass(frozen=True, slots=True)
class Measured:
    """Before the model has seen any of it.

    Attributes:
        facts: for the recipe; its ``surprise`` is not known yet.
        audits: name -> what was found in the source as it was given.
    """

    facts: Facts
    audits: Mapping[str, SourceAudit]


def measure_data(inputs: Inputs, *, sensitivity: Any, deepspeed: str | dict[str, Any], num_ranks: int) -> Measured:
    """Audit the sources, set documents aside, tokenise the rest.

    Raises:
        ConfigError: neither text nor pairs. DataError, ModelError: what cannot be read or loaded.
    """
    if not inputs.text and not inputs.pairs:
        raise ConfigError("advise needs data: give --text, --pairs, or both.")
    tokenizer, template, added = _tokenizer(inputs)
    hf_config = read_hf_config(ModelSection(path=inputs.model), tokenizer.vocab_tokens)
    audits: dict[str, SourceAudit] = {}
    parts: dict[str, Part] = {}
    for section in _sections(inputs):
        logger.info("%s: counting, looking for copies, setting documents aside", section.name)
        data = DataSection(pack_tokens=_AUDIT_PACK_TOKENS, sources=(section,))
        audits[section.name] = audit_source(section, data, tokenizer, {}, lambda _: None)
        split = split_source(section, inputs.folder / "data" / section.name)
        parts[section.name] = _part(split, tokenizer, inputs.folder / "store")
    dtype = "fp32" if inputs.device_type == "cpu" else "bf16"
    shape = model_shape(hf_config, torch.float32 if dtype == "fp32" else torch.bfloat16, ())
    facts = Facts(
        model=inputs.model,
        num_parameters=shape.num_parameters,
        max_positions=_max_positions(hf_config),
        dtype=dtype,
        chat_template=template,
        add_tokens=added,
        text=parts.get("text"),
        pairs=parts.get("pairs"),
        general=parts.get("general"),
        surprise=None,
        sensitivity=sensitivity,
        folder=inputs.folder,
        deepspeed=deepspeed,
        num_ranks=num_ranks,
    )
    return Measured(facts, audits)


def text_evidence(measured: Measured, results: Path) -> TextEvidence | None:
    """Numbers of the raw text; ``results`` is where ``dsft eval`` wrote those of the model."""
    part = measured.facts.text
    if part is None:
        return None
    audit, result = measured.audits["text"], _result(results, "text")
    return TextEvidence(
        documents=part.split.train_documents,
        tokens=part.tokens,
        held_out_documents=part.split.held_out_documents,
        duplicate_share=audit.share(audit.duplicates),
        near_duplicate_share=audit.share(audit.near_duplicates),
        broken_share=audit.share(audit.broken_encoding),
        bits_per_byte=result["bits_per_byte"],
        bits_per_byte_interval=tuple(result["bits_per_byte_interval"]),
    )


def pairs_evidence(measured: Measured, results: Path) -> PairsEvidence | None:
    """Numbers of the pairs."""
    part, text = measured.facts.pairs, measured.facts.text
    if part is None:
        return None
    audit, result = measured.audits["pairs"], _result(results, "pairs")
    shapes = pair_shapes(part.split.section, None if text is None else text.split.section)
    return PairsEvidence(
        pairs=part.split.train_documents,
        tokens=part.tokens,
        held_out_pairs=part.split.held_out_documents,
        supervised_share=audit.supervised_share,
        duplicate_share=audit.share(audit.duplicates),
        near_duplicate_share=audit.share(audit.near_duplicates),
        unusable_share=audit.share(audit.bad + audit.refused + audit.empty + audit.unsupervised),
        conflicting_share=shapes.conflicting_share,
        distinct_answer_share=shapes.distinct_answer_share,
        common_answer_share=shapes.common_answer_share,
        found_in_text_share=shapes.found_in_text_share,
        response_loss=result["loss"],
        f1=result["f1"],
        f1_interval=tuple(result["intervals"]["f1"]),
        exact_match=result["exact_match"],
        shuffled_f1=result["shuffled_f1"],
    )


def general_evidence(measured: Measured, results: Path) -> GeneralEvidence | None:
    """Numbers of the general text."""
    part = measured.facts.general
    return None if part is None else GeneralEvidence(part.tokens, _result(results, "general")["bits_per_byte"])


def _result(results: Path, name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((results / f"held-out-{name}.json").read_bytes())
    return result


def _sections(inputs: Inputs) -> Sequence[SourceSection]:
    sections = []
    for name, paths in (("text", inputs.text), ("general", inputs.general)):
        if paths:
            sections.append(SourceSection(name=name, path=paths, text_field=inputs.text_field))
    if inputs.pairs:
        found: Any = find_pairs_format(list(inputs.pairs))
        sections.append(SourceSection(name="pairs", path=inputs.pairs, format=found))
    return sections


def _tokenizer(inputs: Inputs) -> tuple[Tokenizer, str | None, tuple[str, ...]]:
    """The model's tokenizer; with pairs and no chat template of its own, ChatML and the tokens that it lacks."""
    tokenizer = load_tokenizer(inputs.model)
    if not inputs.pairs or tokenizer.chat_template is not None:
        return tokenizer, None, ()
    known = tokenizer.hf.get_vocab()
    added = tuple(token for token in CHATML_TOKENS if token not in known)
    special = set(tokenizer.hf.all_special_tokens)
    added = tuple(token for token in CHATML_TOKENS if token in added or token not in special)
    return load_tokenizer(inputs.model, add_tokens=added, chat_template="chatml"), "chatml", added


def _part(split: SplitSource, tokenizer: Tokenizer, store_dir: Path) -> Part:
    folders = prepare_sources([split.section], tokenizer, store_dir, 0, 1, "skip", ProgressLines(logger.info))
    statistics = source_statistics(SourceStore(folders[0]))
    if not statistics.tokens:
        raise DataError(f"{split.section.name}: no document has a token to learn.")
    return Part(split, statistics.tokens, statistics.length_percentiles["95"])


def _max_positions(hf_config: Any) -> int:
    """Positions that the model has; where its config does not say, any number is taken to be allowed."""
    found = getattr(hf_config.get_text_config(), "max_position_embeddings", None)
    return int(found) if found else 1 << 20
