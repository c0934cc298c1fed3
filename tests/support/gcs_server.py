"""A server that speaks Google Cloud Storage's interface (an emulator's), in a thread, on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from gcp_storage_emulator.server import create_server


@contextmanager
def gcs_server(bucket: str) -> Iterator[None]:
    """Start the server with an empty bucket and point this process's environment at it. Ended with the context."""
    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket=bucket)
    server.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server._api._httpd.server_port}")
            # Otherwise gcsfs asks for the bucket's type over gRPC, which the emulator does not speak.
            patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
            yield
    finally:
        server.stop()
