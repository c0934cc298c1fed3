"""The root manifest of a token store: what made it, and one small record a shard."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsft.constants import STORE_VERSION
from dsft.errors import DataError
from dsft.fsio import write_bytes
from dsft.store.layout import MANIFEST_NAME

RAW = "raw:"
"""A raw identity begins with this, so that nobody takes it for a fingerprint of contents."""

UNKNOWN = -1
"""In a column of a store whose shards are still made; never in a file."""

_COLUMNS = ("num_documents", "num_tokens", "num_targets", "num_bytes", "index_crc32")


@dataclass(frozen=True, slots=True)
class Manifest:
    """A whole source after preparation. Columns over shards, in the listing's order.

    Attributes:
        name: the source's name.
        recipe: all that decides the token ids (tokenizer, format, template, ...).
        listing: hash of the raw files' names, sizes and times; says whether the manifest is of the files of today.
        token_dtype: "uint16" or "uint32".
        vocab_tokens: size of the tokenizer that made the ids.
        raw_names: name of each raw shard.
        num_documents, num_tokens, num_targets, num_bytes: int64[S]; documents, their tokens, the supervised ones among
            them that are predicted, and the supervised text's length in UTF-8 bytes.
        index_crc32: int64[S], crc32 of each index's arrays (which hold the crc32 of the tokens).
        counts: records that became no document, by reason, over all shards.
    """

    name: str
    recipe: Mapping[str, Any]
    listing: str
    token_dtype: str
    vocab_tokens: int
    raw_names: tuple[str, ...]
    num_documents: npt.NDArray[np.int64]
    num_tokens: npt.NDArray[np.int64]
    num_targets: npt.NDArray[np.int64]
    num_bytes: npt.NDArray[np.int64]
    index_crc32: npt.NDArray[np.int64]
    counts: Mapping[str, int]

    @property
    def fingerprint(self) -> str:
        """Hash of the content: recipe and every shard's documents. Does not change when a raw file is only touched."""
        return self.fingerprint_of(len(self.raw_names))

    def fingerprint_of(self, num_shards: int) -> str:
        """The fingerprint that the store had when it held only its first shards: for sources that have grown."""
        content = {
            "version": STORE_VERSION,
            "recipe": self.recipe,
            "shards": [getattr(self, column)[:num_shards].tolist() for column in _COLUMNS],
        }
        return fingerprint(content)

    @property
    def raw_identity(self) -> str:
        """Hash of the recipe and of the raw files' names, sizes and times: known before any shard is made."""
        return raw_identity(self.recipe, self.listing)


def raw_identity(recipe: Mapping[str, Any], listing: str) -> str:
    """What a store is known by before its shards are made: by what, and from which raw files."""
    return f"{RAW}{fingerprint([recipe, listing])}"


def fingerprint(value: Any) -> str:
    """The first 128 bits of SHA-256 over the value's canonical JSON, in hexadecimal."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` atomically: the same bytes for the same store. Raises SaveError."""
    value = {
        "version": STORE_VERSION,
        "fingerprint": manifest.fingerprint,
        "name": manifest.name,
        "recipe": dict(manifest.recipe),
        "listing": manifest.listing,
        "token_dtype": manifest.token_dtype,
        "vocab_tokens": manifest.vocab_tokens,
        "counts": dict(manifest.counts),
        "raw_names": list(manifest.raw_names),
        **{column: getattr(manifest, column).tolist() for column in _COLUMNS},
    }
    lines = [f'"{key}":{json.dumps(value[key], sort_keys=True, separators=(",", ":"))}' for key in value]
    write_bytes(folder / MANIFEST_NAME, ("{" + ",\n".join(lines) + "}\n").encode())


def read_manifest(folder: Path) -> Manifest:
    """Read and check ``manifest.json`` of a store in a folder.

    Raises:
        DataError: absent, damaged, or of another version; names the file.
    """
    path = folder / MANIFEST_NAME
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(
            f"{path} is missing, so the store was not prepared to its end; run `dsft prepare` (it continues where "
            "it was)."
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); remove that file and run `dsft prepare` again.") from error
    return parse_manifest(data, str(path))


def parse_manifest(data: bytes, path: str) -> Manifest:
    """Check the content of a ``manifest.json``. Raises DataError as :func:`read_manifest`; ``path`` is for messages."""
    try:
        value = json.loads(data)
    except ValueError as error:
        raise DataError(f"{path} cannot be read ({error}); remove that file and run `dsft prepare` again.") from error
    if not isinstance(value, dict) or value.get("version") != STORE_VERSION:
        found = value.get("version") if isinstance(value, dict) else "none"
        raise DataError(
            f"{path} is of store version {found} and this dsft reads version {STORE_VERSION}; remove its folder and "
            "run `dsft prepare` again."
        )
    try:
        manifest = Manifest(
            name=value["name"],
            recipe=value["recipe"],
            listing=value["listing"],
            token_dtype=value["token_dtype"],
            vocab_tokens=value["vocab_tokens"],
            raw_names=tuple(value["raw_names"]),
            counts=value["counts"],
            **{column: np.array(value[column], np.int64) for column in _COLUMNS},
        )
        whole = manifest.fingerprint == value["fingerprint"]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error!r}); remove it and run `dsft prepare` again.") from error
    if not whole:
        raise DataError(
            f"{path} is damaged: its fingerprint is not that of its content; remove it and run `dsft prepare`."
        )
    return manifest
