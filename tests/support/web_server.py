"""A web server on loopback that serves bytes by name, with ranges and ETags, and fails as it is told to."""

from __future__ import annotations

import hashlib
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, TypeVar

Fault = Literal["none", "503", "403", "404", "reset", "stall", "short", "wrong"] | Callable[[], None]
"""What one GET of a file meets; a function is called before the file is sent as it should be."""


class WebServer(ThreadingHTTPServer):
    """Serves ``files``; each GET of a file takes the next of ``faults``."""

    daemon_threads = True

    def __init__(self, handler: type[FileHandler] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), handler or FileHandler)
        self.files: dict[str, bytes] = {}
        self.faults: deque[Fault] = deque()
        self.ranges, self.says_no_ranges = True, False
        self.gets: list[tuple[str, int, int]] = []  # name, first byte, end
        self.released = threading.Event()  # ends stalled requests

    def url(self, name: str = "") -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is what some tests are about."""


class FileHandler(BaseHTTPRequestHandler):
    """Answers HEAD and GET, of files and of index pages of folders."""

    server: WebServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        data = self._found()
        if data is not None:
            self._head(200, data, len(data))

    def do_GET(self) -> None:
        data = self._found()
        if data is None:
            return
        start, end = 0, len(data)
        given = self.headers.get("Range")
        is_range = given is not None and self.server.ranges and self.path.rsplit("/", 1)[-1] != ""
        if is_range:
            first, last = given.removeprefix("bytes=").split("-")
            start, end = int(first), min(len(data), int(last) + 1)
        name = self.path.lstrip("/")
        fault: Fault = "none"
        if name in self.server.files:
            self.server.gets.append((name, start, end))
            fault = self.server.faults.popleft() if self.server.faults else "none"
        if callable(fault):
            fault()
            data = self.server.files[name]
        body = data[start:end]
        if fault in ("503", "403", "404"):
            self.send_error(int(str(fault)))
            return
        if fault == "wrong":
            body = bytes(255 - byte for byte in body[:64]) + body[64:]
        self._head(206 if is_range else 200, data, len(body), f"bytes {start}-{end - 1}/{len(data)}")
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        if fault in ("short", "stall"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if fault == "stall":
                self.server.released.wait(60)
            self.close_connection = True
            return
        self.wfile.write(body)

    def more_headers(self) -> None:
        """What another kind of server says of a file besides."""

    def _found(self) -> bytes | None:
        name = self.path.lstrip("/")
        if name in self.server.files:
            return self.server.files[name]
        folder = name.rstrip("/") + "/" if name else ""
        inside = [file.removeprefix(folder) for file in self.server.files if file.startswith(folder)]
        if inside:
            here = sorted({file.split("/")[0] + "/" * ("/" in file) for file in inside})
            return "".join(f'<a href="{item}">{item}</a>\n' for item in here).encode()
        self.send_error(404)
        return None

    def _head(self, status: int, data: bytes, length: int, content_range: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.send_header("ETag", f'"{hashlib.md5(data).hexdigest()}"')
        self.more_headers()
        if self.server.says_no_ranges:
            self.send_header("Accept-Ranges", "none")
        if status == 206 and content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()


_Server = TypeVar("_Server", bound=WebServer)


@contextmanager
def web_server() -> Iterator[WebServer]:
    """A running server; ended with the context."""
    with serving(WebServer()) as server:
        yield server


@contextmanager
def serving(server: _Server) -> Iterator[_Server]:
    """Run a server; ended with the context."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        thread.join(10)
