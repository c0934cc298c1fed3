"""A page in headless Chromium, at some widths, without any network but the one server that hands it out.

    visit(chromium(), page, (400, 1400)).views

The page stands in a frame of each width, because Chromium's own window cannot be narrower than some 500 pixels. Another
page around it, from the same server, measures it and is read from Chromium's output.
"""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT_SECONDS = 120.0
_AROUND = """<!doctype html><meta charset="utf-8"><style>body{margin:0;display:flex;align-items:flex-start}
iframe{border:0;height:%(height)dpx}</style>%(frames)s<pre id="result" hidden></pre><script>
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, root = page.scrollingElement, width = frame.clientWidth
    const outside = [...page.body.querySelectorAll("*")].filter(one => !one.closest(".wide") &&
      (one.getBoundingClientRect().right > width + 0.5 || one.getBoundingClientRect().left < -0.5))
    const texts = [...page.querySelectorAll("svg:not(.key)")].map(svg => {
      const text = svg.querySelector("text")
      return parseFloat(getComputedStyle(text).fontSize) * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width
    })
    const boxes = [...page.querySelectorAll(".wide")].map(box => box.scrollWidth)
    return {boxes: boxes, width: frame.contentWindow.innerWidth, scroll: root.scrollWidth, height: root.scrollHeight,
      outside: outside.map(one => one.tagName), text: page.body.innerText, texts: texts, title: page.title}
  })
  document.getElementById("result").textContent = JSON.stringify(found)
})
</script>"""


@dataclass(frozen=True, slots=True)
class View:
    """The page as laid out at one width.

    Attributes:
        inner_width, scroll_width, height: CSS pixels of the frame and of the page's content.
        outside: elements that reach over an edge, except inside boxes that scroll by themselves (class ``wide``).
        smallest_chart_text: CSS pixels, of the text in charts as it is scaled; None without a chart.
        widest_box: CSS pixels of the widest content of a box that scrolls by itself.
    """

    inner_width: int
    scroll_width: int
    height: int
    outside: tuple[str, ...]
    smallest_chart_text: float | None
    widest_box: int
    text: str
    title: str


@dataclass(frozen=True, slots=True)
class Visit:
    """What a browser made of a page: its views, what it complained of, and what it asked the server for."""

    views: tuple[View, ...]
    console: tuple[str, ...]
    requested: tuple[str, ...]


def chromium() -> str | None:
    """Path of the browser, or None."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def visit(program: str, page: bytes, widths: Sequence[int], *, picture: Path | None = None) -> Visit:
    """Open ``page`` once in frames of these widths; ``picture``: write a PNG of all side by side, 4,000 high."""
    frames = "".join(f'<iframe src="/page.html" style="flex:0 0 {width}px"></iframe>' for width in widths)
    around = (_AROUND % {"height": 4000, "frames": frames}).encode()
    requested: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requested.append(self.path)
            known = {"/": around, "/page.html": page}.get(self.path)
            self.send_response(204 if known is None else 200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(known or b"")

        def log_message(self, format: str, *values: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            output, console = _run(program, f"http://127.0.0.1:{server.server_port}/", sum(widths), picture)
        finally:
            server.shutdown()
    if picture is not None:
        return Visit((), console, tuple(requested))
    found = re.search(r'<pre id="result" hidden="">(.*?)</pre>', output, re.DOTALL)
    assert found is not None, f"{output[-2000:]}\n{console}"
    text = found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    views = tuple(
        View(
            one["width"],
            one["scroll"],
            one["height"],
            tuple(one["outside"]),
            min(one["texts"], default=None),
            max(one["boxes"], default=0),
            one["text"],
            one["title"],
        )
        for one in json.loads(text)
    )
    return Visit(views, console, tuple(requested))


def _run(program: str, url: str, width: int, picture: Path | None) -> tuple[str, tuple[str, ...]]:
    """Chromium's output (the page around as HTML), and the lines of its console."""
    what = "--dump-dom" if picture is None else f"--screenshot={picture}"
    with tempfile.TemporaryDirectory(prefix="dsft-chromium-", ignore_cleanup_errors=True) as profile:
        command = [
            *(program, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", what),
            *("--enable-logging=stderr", f"--user-data-dir={profile}", f"--window-size={width},4000"),
            *("--disable-background-networking", "--disable-component-update", "--no-first-run", "--hide-scrollbars"),
            *("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--virtual-time-budget=10000", url),
        ]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            output, errors = process.communicate(timeout=LIMIT_SECONDS)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return output, tuple(line for line in errors.splitlines() if ":CONSOLE" in line)
