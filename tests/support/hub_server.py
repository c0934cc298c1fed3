"""The part of the Hugging Face Hub's interface that reading a dataset needs, on loopback: commits, trees, files.

Tests point the real clients (huggingface_hub, datasets) at it. Files are served, and fail, as ``web_server`` has it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import datasets
import pytest
from huggingface_hub import HfFileSystem, constants

from tests.support.web_server import FileHandler, WebServer, serving

_RESOLVE = re.compile(r"/datasets/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
_API = re.compile(
    r"/api/datasets/(?P<repo>[^/]+/[^/]+)(/(?P<what>revision|tree|paths-info)/(?P<revision>[^/]+)(/(?P<path>.*))?)?"
)


class HubServer(WebServer):
    """Serves the datasets in ``commits``: files of each commit, by repository; ``branches`` name commits."""

    def __init__(self) -> None:
        super().__init__(_HubHandler)
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.branches: dict[str, dict[str, str]] = {}

    def commit(self, repo: str, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Add a commit that holds these files, move the branch to it, and return its name."""
        name = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits.setdefault(repo, {})[name] = dict(files)
        self.branches.setdefault(repo, {})[branch] = name
        for path, data in files.items():
            self.files[f"datasets/{repo}/resolve/{name}/{path}"] = data
        return name


class _HubHandler(FileHandler):
    server: HubServer
    commit = ""

    def do_HEAD(self) -> None:
        if self._resolved():
            super().do_HEAD()

    def do_GET(self) -> None:
        if _API.fullmatch(self._route()):
            self._api({})
        elif self._resolved():
            super().do_GET()

    def do_POST(self) -> None:
        self._api(parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode()))

    def more_headers(self) -> None:
        self.send_header("X-Repo-Commit", self.commit)

    def _route(self) -> str:
        return unquote(urlsplit(self.path).path)

    def _resolved(self) -> bool:
        """Whether the path names a file; then it is made the path of the file of a commit."""
        match = _RESOLVE.fullmatch(self._route())
        files = match and self._commit(match["repo"], match["revision"])
        if match is None or files is None:
            return False
        if match["path"] not in files:
            self._missing("EntryNotFound")
            return False
        self.path = f"/datasets/{match['repo']}/resolve/{self.commit}/{match['path']}"
        return True

    def _commit(self, repo: str, revision: str) -> dict[str, bytes] | None:
        """Files of a commit, of which ``commit`` is then the name. None where there is none; the client is told so."""
        if repo not in self.server.commits:
            self._missing("RepoNotFound")
            return None
        self.commit = self.server.branches[repo].get(revision, revision)
        if self.commit not in self.server.commits[repo]:
            self._missing("RevisionNotFound")
            return None
        return self.server.commits[repo][self.commit]

    def _missing(self, code: str) -> None:
        self.send_response(HTTPStatus.NOT_FOUND)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _api(self, body: Mapping[str, list[str]]) -> None:
        match = _API.fullmatch(self._route())
        assert match is not None, self.path
        files = self._commit(match["repo"], match["revision"] or "main")
        if files is None:
            return
        entries = _entries(files)
        if match["what"] == "paths-info":
            answer: Any = [entry for entry in entries if entry["path"] in body["paths"]]
        elif match["what"] == "tree":
            folder = PurePosixPath(match["path"] or ".")
            is_deep = "recursive=true" in urlsplit(self.path).query.lower()
            answer = [
                entry
                for entry in entries
                for parents in [PurePosixPath(entry["path"]).parents]
                if parents[0] == folder or (is_deep and folder in parents)
            ]
        else:
            answer = {
                "id": match["repo"],
                "sha": self.commit,
                "tags": [],
                "siblings": [{"rfilename": n} for n in files],
            }
        data = json.dumps(answer).encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _entries(files: Mapping[str, bytes]) -> list[dict[str, Any]]:
    folders = {str(parent) for path in files for parent in PurePosixPath(path).parents if str(parent) != "."}
    found = [{"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest()} for path in folders]
    for path, data in files.items():
        found.append({"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()})
    return sorted(found, key=lambda entry: str(entry["path"]))


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """A running hub; ended with the context."""
    with serving(HubServer()) as server:
        yield server


def connect(server: HubServer, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Make this process's clients use the server (as ``HF_ENDPOINT`` does at their import) and caches in a folder."""
    endpoint = server.url().rstrip("/")
    patch.setattr(constants, "ENDPOINT", endpoint)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_OFFLINE", False)  # conftest sets it, so that no test asks the real hub
    patch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    patch.setattr(datasets.config, "HF_ENDPOINT", endpoint)
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
    HfFileSystem.clear_instance_cache()  # it keeps the client of another server
