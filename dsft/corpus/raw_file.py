"""A raw file of a source, on this machine's file system or in an object store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import BinaryIO

from dsft.config.remote_path import is_hub, is_remote
from dsft.remote import open_remote


@dataclass(frozen=True, slots=True)
class RawFile:
    """One raw file, as the listing found it.

    Attributes:
        name: path relative to what the configuration names.
        path: where it is: a path, or a URL (``s3://``, ``gs://``, ``hf://``, ``http(s)://``) without credentials; or,
            after ``hub://``, which part of a dataset ``datasets`` has to stream.
        num_bytes: its size.
        version: what changes when the file does: its ETag, or the time of its last change.
    """

    name: str
    path: str
    num_bytes: int
    version: str

    def __str__(self) -> str:
        return self.path

    @property
    def is_remote(self) -> bool:
        """Whether it is read over the network."""
        return is_remote(self.path)

    @property
    def is_hub_shard(self) -> bool:
        """Whether it is no file that can be opened, but a shard of a dataset (``dsft.corpus.hub``)."""
        return is_hub(self.path)

    def open(self) -> BinaryIO:
        """A readable, seekable binary stream; of a remote file it never holds more than a block.

        Raises:
            DataError: a remote file cannot be reached (also while it is read).
            OSError: a local file cannot be read.
        """
        if self.is_remote:
            return open_remote(self.path, self.num_bytes)
        return open(self.path, "rb")
