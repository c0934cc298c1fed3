"""The demonstration's real corpus, made once a test process."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from dsft.demo.corpus import make_corpus


@functools.cache
def demo_corpus() -> Path:
    """Folder of the whole corpus (about eight seconds the first time)."""
    folder = Path(tempfile.mkdtemp(prefix="dsft-demo-corpus-"))
    make_corpus(folder)
    return folder
