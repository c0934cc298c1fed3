from __future__ import annotations

from dsft.config.models import RunConfig
from dsft.config.schema import json_schema


def test_the_schema_names_every_section_and_refuses_other_keys() -> None:
    schema = json_schema()
    assert schema["properties"].keys() == RunConfig.model_fields.keys()
    assert schema["required"] == ["run", "model", "data", "train"]
    assert all(section["additionalProperties"] is False for section in schema["$defs"].values())


def test_fields_have_their_docstrings_and_counts_their_two_spellings() -> None:
    train = json_schema()["$defs"]["TrainSection"]["properties"]
    assert "May be raised on resume" in train["tokens"]["description"]
    kinds = [choice.get("type") for choice in train["global_batch_packs"]["anyOf"]]
    assert kinds == ["number", "string"]
