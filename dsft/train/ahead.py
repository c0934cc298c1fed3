"""``python -m dsft.train.ahead``: the process of a host that tokenises what its ranks will need (``train.streaming``).

It reads JSON lines: first what run it belongs to, then wishes. It ends when they end, at once: its parent is gone. What
else ends it is left as a note for the ranks that wait.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any, BinaryIO

from dsft.config.models import RunConfig
from dsft.constants import EXIT_RUN_FAILED
from dsft.corpus.ahead import Wishes, prepare_wished
from dsft.corpus.prepare import Job, make_job
from dsft.corpus.progress import PrepareProgress, Reporter
from dsft.errors import DataError
from dsft.metrics.console import set_up_logging
from dsft.train.setup import open_tokenizer
from dsft.train.stores import store_folder
from dsft.train.streamed_files import is_streamed
from dsft.train.streaming import EndNote

logger = logging.getLogger("dsft.ahead")

_NICE = 10
_LEFT_TO_THE_RANKS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Stop requests to a whole process group: the ranks may still need a shard, and the pipe ends when they do."""


def main() -> int:
    """Serve one start of a run."""
    for number in _LEFT_TO_THE_RANKS:
        signal.signal(number, signal.SIG_IGN)
    os.nice(_NICE)
    first = json.loads(sys.stdin.buffer.readline())
    set_up_logging(is_main=first["is_main"], who=f"{socket.gethostname()}, tokenising ahead")
    note = EndNote(Path(first["run_dir"]), first["attempt"])
    inbox = _Inbox(note)
    threading.Thread(target=inbox.listen, args=(sys.stdin.buffer,), daemon=True).start()
    try:
        inbox.serve(RunConfig.model_validate(first["config"]), is_alone=first["is_alone"])
    except BaseException as error:  # noqa: BLE001  (whatever ends this process, those that wait for it must hear of it)
        note.leave(error)
        logger.error("%s", error)
        return EXIT_RUN_FAILED
    return 0


class _Inbox:
    """Wishes as they come in, from sources that are opened meanwhile."""

    def __init__(self, note: EndNote) -> None:
        self._note, self._wishes = note, Wishes()
        self._jobs: dict[int, Job] = {}
        self._are_open = threading.Event()

    def listen(self, messages: BinaryIO) -> None:
        """Take messages until they end, then end this process: nobody will use the shard in hand."""
        for line in messages:
            self._are_open.wait()
            self._take(json.loads(line))
        os._exit(0)

    def serve(self, config: RunConfig, *, is_alone: bool) -> None:
        """Make what is wished for. Raises as ``make_job`` and ``prepare_wished`` do."""
        tokenizer, folder, bad_records = open_tokenizer(config), store_folder(config), config.data.bad_records
        self._jobs = {
            number: make_job(section, tokenizer, folder, bad_records)
            for number, section in enumerate(config.data.sources)
            if is_streamed(section)
        }
        self._are_open.set()
        prepare_wished(self._jobs, self._wishes, Reporter(_say, 0), is_alone=is_alone)

    def _take(self, message: dict[str, Any]) -> None:
        job = self._jobs[message["source"]]
        if job.listing == message["listing"]:
            self._wishes.put(message["source"], message["shards"])
            return
        self._note.leave(
            DataError(
                f"data source {job.name!r}: its raw files were changed while the run started. Start again when nobody "
                "writes to them any more."
            )
        )


def _say(progress: PrepareProgress) -> None:
    if progress.line:
        logger.info("tokenising ahead: %s", progress.line)


if __name__ == "__main__":
    sys.exit(main())
