"""Files in object stores and on web servers, through fsspec: listed with what identifies them, read block by block.

A network fails in parts: a server is busy (503), a connection is reset, a transfer stalls, an answer is shorter than it
said. Each request is repeated with growing pauses; what still fails is an error that names the file. A file that
changed while it was read is an error too, since its blocks may be of two versions.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn, TypeVar, cast

from dsft.errors import DamagedFileError, DataError

logger = logging.getLogger(__name__)

BLOCK_BYTES = 4 << 20
"""Length of one request: some hundredths of a second of transfer, some seconds of tokenising."""
STALL_SECONDS = 60.0
"""A connection that brings no byte for this long has stalled."""
FIRST_PAUSE_SECONDS = 0.5
MAX_ATTEMPTS = 6
"""Pauses double: with 0.5 s first, a server may be away for 15 s."""
_GCSFS_ROUNDS = 2
"""gcsfs makes six attempts itself, with pauses of 31 s in all, and has no setting for it."""

_LISTING_THREADS = 16
_VERSION_KEYS = ("ETag", "etag", "blob_id", "md5Hash", "Content-MD5", "generation", "Last-Modified", "mtime", "created")
"""What file systems call that which changes with a file, the most exact first."""

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class RemoteEntry:
    """A file of a listing: its URL, its size in bytes and what changes when the file does."""

    url: str
    num_bytes: int
    version: str


def list_remote(url: str, suffixes: tuple[str, ...]) -> Iterator[RemoteEntry]:
    """The files that a URL names: itself, those under it (a folder), or those that match (a glob), sorted.

    Args:
        suffixes: of files that are wanted.

    Raises:
        DataError: there is nothing, it cannot be reached, or a library for the scheme is missing.
    """
    system = _file_system(url)
    system.invalidate_cache()
    is_web = url.startswith("http")
    if any(character in url for character in "*?["):
        found = retried(url, lambda: system.glob(url, detail=True))
    elif is_web and url.endswith(suffixes):
        found = {url: {}}  # asked for its size below
    elif is_web or retried(url, lambda: system.isdir(url)):
        found = retried(url, lambda: system.find(url, detail=True))
    else:
        found = {url: retried(url, lambda: system.info(url))}
    infos = {system.unstrip_protocol(path): info for path, info in found.items() if path.endswith(suffixes)}
    if is_web:  # an index page has neither sizes nor versions
        with ThreadPoolExecutor(_LISTING_THREADS) as threads:
            asked = threads.map(lambda path: retried(path, lambda: system.info(path)), infos)
            infos = dict(zip(infos, asked, strict=True))
    for path, info in sorted(infos.items()):
        if info["type"] == "file":
            yield RemoteEntry(path, _size(path, info), _version(info))


def open_remote(url: str, num_bytes: int) -> BinaryIO:
    """A seekable stream of a remote file of that size; holds one block.

    Raises:
        DataError: a library for the scheme is missing; while it is read, that a block cannot be had.
    """
    return cast(BinaryIO, io.BufferedReader(_RemoteFile(_file_system(url), url, num_bytes), buffer_size=1 << 20))


def remote_size(url: str) -> int:
    """Size of a remote file in bytes. Raises DataError: there is none, or it cannot be reached."""
    system = _file_system(url)
    system.invalidate_cache()
    return _size(url, retried(url, lambda: system.info(url)))


def check_unchanged(url: str, num_bytes: int, version: str) -> None:
    """Raise DamagedFileError where a remote file is no longer the one that was listed, and then read."""
    system = _file_system(url)
    system.invalidate_cache()
    info = retried(url, lambda: system.info(url))
    if (_size(url, info), _version(info)) != (num_bytes, version):
        raise DamagedFileError(f"{url} was changed while it was read; start again, so that it is listed and read anew.")


class _RemoteFile(io.RawIOBase):
    """Reads ranges of a file, each with as many attempts as it takes."""

    def __init__(self, system: Any, url: str, num_bytes: int) -> None:
        super().__init__()
        self._system, self._url, self._num_bytes = system, url, num_bytes
        self._position = 0
        self._block, self._block_start = b"", 0
        self._handle: Any = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._num_bytes}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        at = self._position - self._block_start
        if not 0 <= at < len(self._block):
            end = min(self._num_bytes, self._position + BLOCK_BYTES)
            if self._position >= end:
                return 0
            self._block = retried(self._url, lambda: self._fetch(self._position, end))
            self._block_start, at = self._position, 0
        count = min(len(buffer), len(self._block) - at)
        buffer[:count] = self._block[at : at + count]
        self._position += count
        return count

    def _fetch(self, start: int, end: int) -> bytes:
        if self._handle is None:
            self._handle = self._system.open(self._url, "rb", block_size=BLOCK_BYTES, cache_type="none")
        try:
            data: bytes = self._handle._fetch_range(start, end)
        except IndexError as error:  # s3fs looks into the arguments of an OSError; those of a timeout are empty
            self._handle = None
            raise TimeoutError("the connection stalled") from error
        except BaseException:
            self._handle = None  # the next attempt asks for the file anew
            raise
        if len(data) > end - start:
            raise ValueError(f"it sent {len(data):,} bytes for {end - start:,}")
        if len(data) < end - start:
            self._handle = None
            raise OSError(f"bytes {start} to {end} came as {len(data)} bytes instead of {end - start}")
        return data


def retried(url: str, request: Callable[[], _Result]) -> _Result:
    """What ``request`` gives, at the first attempt that succeeds.

    Raises:
        DataError: it failed in a way that no attempt can change, or each time.
    """
    began = time.monotonic()
    most = _GCSFS_ROUNDS if url.startswith("gs://") else MAX_ATTEMPTS
    for attempt in range(1, most + 1):
        try:
            return request()
        except _failures() as error:
            _raise_if_final(url, error)
            reason = _reason(error)
            if attempt == most:
                raise DataError(
                    f"{url} cannot be read: {reason}. {attempt} attempts in {time.monotonic() - began:.0f} s failed; "
                    "what is prepared is kept, so start again when the server answers."
                ) from error
            # Ranks that met the same failure come back at different times.
            pause = FIRST_PAUSE_SECONDS * 2 ** (attempt - 1) * (1 + os.getpid() % 16 / 16)
            logger.warning("%s: %s; attempt %d of %d in %.1f s", url, reason, attempt + 1, most, pause)
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def _failures() -> tuple[type[Exception], ...]:
    """What the libraries in use raise for a failed request."""
    found: list[type[Exception]] = [OSError, EOFError, ValueError, TimeoutError]
    names = {"aiohttp": ("ClientError",), "botocore.exceptions": ("BotoCoreError", "ClientError")}
    names |= {"asyncio": ("TimeoutError",), "httpx": ("HTTPError",), "httpx2": ("HTTPError",)}
    names |= {"gcsfs.retry": ("HttpError",)}
    for module, classes in names.items():
        found += [getattr(sys.modules[module], name) for name in classes if module in sys.modules]
    return tuple(found)


def _raise_if_final(url: str, error: Exception) -> None:
    """Raise DataError for what no further attempt can change."""
    status = _status(error)
    if isinstance(error, OSError) and error.errno == errno.ESTALE:
        raise DamagedFileError(
            f"{url} was changed while it was read; start again, so that it is listed and read anew."
        ) from error
    if isinstance(error, PermissionError) or status in (401, 403) or type(error).__name__ == "NoCredentialsError":
        _refuse(url, "access is denied; check the credentials in the environment", error)
    if (isinstance(error, FileNotFoundError) and status is None and _cause(error) is error) or status in (404, 410):
        _refuse(url, "there is no such file or folder", error)
    if isinstance(error, ValueError):  # fsspec's own error for a server that sends the whole file
        _refuse(url, f"the server does not answer requests for a part of a file ({error})", error)


def _refuse(url: str, reason: str, error: Exception) -> NoReturn:
    raise DataError(f"{url} cannot be read: {reason}.") from error


def _cause(error: BaseException) -> BaseException:
    """The first error of a chain: fsspec's http turns every failure to ask for a size into FileNotFoundError."""
    while error.__cause__ is not None and not isinstance(error, TimeoutError):
        error = error.__cause__
    return error


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error, if there is one."""
    cause = _cause(error)
    response = getattr(cause, "response", None)
    if isinstance(response, Mapping):  # botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        status = getattr(cause, "status", None) or getattr(response, "status_code", None)
    return status if isinstance(status, int) else None


def _reason(error: BaseException) -> str:
    cause = _cause(error)
    status = _status(error)
    if status is not None:
        return f"HTTP {status}"
    text = str(cause).split("\n")[0].split("?")[0].rstrip(".")[:200]  # what follows a question mark may be a signature
    return f"{type(cause).__name__}: {text}" if text else type(cause).__name__


def _size(url: str, info: Mapping[str, Any]) -> int:
    size = info.get("size")
    if size is None:
        raise DataError(f"{url}: the server does not say how long it is, so a transfer that ends early would pass.")
    return int(size)


def _version(info: Mapping[str, Any]) -> str:
    return next((str(info[key]).strip('"') for key in _VERSION_KEYS if info.get(key)), "")


def _file_system(url: str) -> Any:
    """fsspec's file system of a URL (it keeps one for each set of options). Credentials come from the environment."""
    import fsspec

    scheme = url.partition("://")[0]
    try:
        system = fsspec.filesystem(scheme, **_options(scheme))
    except ImportError as error:
        raise DataError(
            f"{url}: {scheme}:// needs a library that is not installed ({error.name}): pip install 'dsft[remote]'."
        ) from error
    if hasattr(system, "retries"):
        system.retries = 1  # s3fs repeats in silence; six times its attempts would take half an hour
    return system


def _options(scheme: str) -> dict[str, Any]:
    """Timeouts in each library's own words."""
    if scheme == "s3":
        timeouts = {"connect_timeout": STALL_SECONDS, "read_timeout": STALL_SECONDS}
        return {"config_kwargs": {**timeouts, "retries": {"total_max_attempts": 1}}}
    if scheme in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALL_SECONDS, sock_read=STALL_SECONDS)
        return {"client_kwargs": {"timeout": timeout, "trust_env": True}}
    return {"requests_timeout": STALL_SECONDS} if scheme == "gs" else {}
