"""Data paths that are URLs: their schemes, the names of the hub's datasets, and that no credentials are in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

SCHEMES = ("s3", "gs", "hf", "hub", "http", "https")
"""Schemes of remote sources."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_HUB = re.compile(
    r"hub://(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^/@]+))?(/(?P<config>[^/@]+)(/(?P<split>\w+(\.\w+)*))?)?/?"
)


@dataclass(frozen=True, slots=True)
class HubDataset:
    """A split of a dataset of the Hugging Face Hub, by name; None: not said.

    Attributes:
        repo: ``OWNER/NAME``.
        revision: a commit, a branch or a tag.
        config, split: as the dataset's page shows them.
    """

    repo: str
    revision: str | None
    config: str | None
    split: str | None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return "/".join([f"hub://{self.repo}{revision}", *filter(None, [self.config, self.split])])


def is_hub(path: str) -> bool:
    """Whether a data path names a dataset of the hub."""
    return path.startswith("hub://")


def parse_hub_path(path: str) -> HubDataset:
    """What a ``hub://`` path names. Raises ValueError where it is none."""
    match = _HUB.fullmatch(path)
    if match is None:
        raise ValueError("a dataset of the hub is named hub://OWNER/NAME@COMMIT/CONFIG/SPLIT, without globs or slices")
    return HubDataset(match["repo"], match["revision"], match["config"], match["split"])


def is_remote(path: str) -> bool:
    """Whether a data path is a URL."""
    return _URL.match(path) is not None


def check_data_path(path: str) -> str:
    """Refuse a URL of another scheme, and one that carries a secret.

    Configurations are printed, logged and saved with each checkpoint, so a password or a signed query would be too.

    Raises:
        ValueError: says what is wrong without repeating what may be secret.
    """
    if not is_remote(path):
        return path
    scheme = path.partition("://")[0]
    if scheme not in SCHEMES:
        raise ValueError(f"there is no scheme {scheme}://; data is read from {', '.join(SCHEMES)} and local paths")
    if is_hub(path):
        parse_hub_path(path)
        return path
    is_web = scheme in ("http", "https")
    if "@" in urlsplit(path).netloc or (is_web and ("?" in path or "#" in path)):
        raise ValueError(
            f"a {scheme}:// path must not hold a user, a password or a query (such as a signature): the configuration "
            "is logged and saved. Credentials are taken from the environment: AWS_*, HF_TOKEN, "
            "GOOGLE_APPLICATION_CREDENTIALS, or ~/.netrc for http"
        )
    return path


def check_store_path(path: str) -> str:
    """``check_data_path`` of a place for stores. Raises ValueError too where that is a dataset's name."""
    if is_hub(path):
        raise ValueError(
            "a store has files, which hub:// does not name; a repository's folder is hf://datasets/O/N/..."
        )
    return check_data_path(path)
