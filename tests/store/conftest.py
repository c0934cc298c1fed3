"""A web server that stands for an object store."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dsft import remote
from tests.support.web_server import WebServer, web_server


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.001)
    with web_server() as running:
        yield running
