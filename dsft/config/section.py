"""What the sections of a run's YAML file share: their base class, and the kinds of numbers in them."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from dsft.config.remote_path import check_data_path, check_store_path

_Item = TypeVar("_Item")
Items = Annotated[tuple[_Item, ...], Field(strict=False)]
"""A YAML list. Not strict about list against tuple; the items stay strict."""


def _check_paths(paths: str | tuple[str, ...]) -> str | tuple[str, ...]:
    for path in (paths,) if isinstance(paths, str) else paths:
        check_data_path(path)
    return paths


DataPath = Annotated[
    Annotated[str, Field(min_length=1)] | Annotated[Items[Annotated[str, Field(min_length=1)]], Field(min_length=1)],
    AfterValidator(_check_paths),  # of the whole: a failed member of a union would show what it was given
]
"""A path, glob or URL, or a list of them."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]
UnitInterval = Annotated[float, Field(ge=0.0, le=1.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
"""Decay of a running mean; with 1 Adam would divide by zero."""
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


def _written_out(path: str) -> str:
    if path[:1] in ("~", "$"):
        raise ValueError(f"{path!r} begins with {path[0]!r}, which no shell expands here; the path must be written out")
    return path


FolderPath = Annotated[str, Field(min_length=1), AfterValidator(_written_out)]
"""A folder that dsft makes where it is missing, so that a path that cannot be meant would not be noticed."""
StorePath = Annotated[FolderPath, AfterValidator(check_store_path)]
"""The same, or a URL."""


class Section(BaseModel):
    """Base of every section: frozen, and no key that is not declared."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        protected_namespaces=(),
        use_attribute_docstrings=True,  # the docstrings below fields are the descriptions of `dsft config schema`
    )
