from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from dsft.config.models import RunConfig


def run(
    sources: list[dict[str, Any]], sets: list[dict[str, Any]] | None = None, evaluate: Any = None, **data: Any
) -> RunConfig:
    named = [{"name": f"s{number}", "path": "a.jsonl", **source} for number, source in enumerate(sources)]
    return RunConfig.model_validate(
        {
            "run": {"name": "r", "dir": "run"},
            "model": {"path": "m"},
            "data": {"pack_tokens": 64, "sources": named, **data},
            "train": {"tokens": 100, "global_batch_packs": 1, "lr": 1e-3},
            "evaluate": {"sets": sets or [], **(evaluate or {})},
        }
    )


MLM = {"objective": {"kind": "mlm"}}


def test_defaults_are_those_of_bert() -> None:
    objective = run([MLM, MLM]).data.sources[0].objective
    assert objective.model_dump() == {"kind": "mlm", "rate": 0.15, "mask_share": 0.8, "random_share": 0.1}  # type: ignore[union-attr]
    assert run([MLM]).data.is_masked
    assert not run([{}, {"objective": {"kind": "fim"}}]).data.is_masked


@pytest.mark.parametrize(
    ("sources", "sets", "message"),
    [
        ([MLM, {}], [], "give all sources objective mlm, or none"),
        ([{**MLM, "format": "messages"}], [], "objective: mlm is for raw text"),
        ([{"objective": {"kind": "mlm", "mask_share": 0.9, "random_share": 0.2}}], [], "together are more than 1"),
        ([{"objective": {"kind": "mlm", "rate": 0.0}}], [], "greater than 0"),
        ([{"objective": {"kind": "mml"}}], [], "mml"),
        ([MLM], [{"name": "h", "path": "b", "format": "messages", "generate": 3}], "measure raw text only"),
        ([MLM], [{"name": "h", "path": "b", "memorisation": {}}], "measure raw text only"),
    ],
)
def test_what_cannot_be_meant(sources: list[dict[str, Any]], sets: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        run(sources, sets)


def test_bias_is_not_measured_of_an_encoder() -> None:
    bias = {"name": "b", "kind": "templates"}
    with pytest.raises(ValidationError, match=r"evaluate\.bias reads sentences from left to right"):
        run([MLM], evaluate={"bias": [bias]})
    assert run([{}], evaluate={"bias": [bias]}).evaluate.bias


def test_an_encoder_knows_beforehand_where_documents_are_cut() -> None:
    with pytest.raises(ValidationError, match=r"data\.packing: concat_and_split"):
        run([MLM], packing="concat_and_split")
    assert run([MLM], packing="next_fit").data.packing == "next_fit"
    assert run([{}], packing="concat_and_split").data.packing == "concat_and_split"
