"""The JSON schema of a run's YAML file, from the same models that check it."""

from __future__ import annotations

from typing import Any

from dsft.config.models import RunConfig


def json_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) with the fields' docstrings as descriptions."""
    schema = RunConfig.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "A dsft run"}
