"""Data paths that are URLs: which schemes there are, and that no credentials are in them."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

SCHEMES = ("s3", "gs", "hf", "http", "https")
"""Schemes of remote sources."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


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
    is_web = scheme in ("http", "https")
    if "@" in urlsplit(path).netloc or (is_web and ("?" in path or "#" in path)):
        raise ValueError(
            f"a {scheme}:// path must not hold a user, a password or a query (such as a signature): the configuration "
            "is logged and saved. Credentials are taken from the environment: AWS_*, HF_TOKEN, "
            "GOOGLE_APPLICATION_CREDENTIALS, or ~/.netrc for http"
        )
    return path
