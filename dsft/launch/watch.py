"""A rank's watch: one thread that sees what the training loop cannot, because it is in a collective or a kernel.

Once a second it looks whether the launcher still lives and whether a stop file is there, writes this rank's heartbeat,
dumps its stacks when it makes no progress, and ends the process when a deadline has passed. It takes part in no
collective and saves nothing.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from dsft.constants import EXIT_STOPPED_EARLY
from dsft.errors import SaveError
from dsft.fsio import write_bytes
from dsft.launch.ancestors import Launcher
from dsft.launch.heartbeat import Heartbeat
from dsft.launch.owner import RunFolder
from dsft.launch.progress import Progress
from dsft.launch.stop import STOP_GRACE_SECONDS, StopFlag

logger = logging.getLogger(__name__)

STOP_FILE_NAME = "stop"
"""A file of this name in the run folder asks the run to stop. A number in it: so many seconds are left for that."""
ENDED_FILE_NAME = "ended"
"""Names the attempt that the supervisor has given up. Its ranks may live on a host that ssh does not reach any more."""
_INTERVAL_SECONDS = 1.0


class Watch:
    """Context manager around all of a run, on every rank.

    Args:
        stop: where stop requests go.
        progress: where the loop says what it does.
        launcher: the processes above this one.
        rank: of this process.
        max_seconds: ask for a stop so that the run ends about so long from now; None: no limit.
    """

    def __init__(
        self, stop: StopFlag, progress: Progress, launcher: Launcher, *, rank: int, max_seconds: float | None
    ) -> None:
        self._stop, self._progress, self._launcher, self._rank = stop, progress, launcher, rank
        self._limit = None if max_seconds is None else time.monotonic() + max_seconds
        self._folder: RunFolder | None = None
        self._heartbeat: Heartbeat | None = None
        self._deadline_said = self._request_said = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()

    def take(self, folder: RunFolder) -> None:
        """The run has its folder now: heartbeats go there, and a stop file there counts from now on."""
        if folder.is_owner and (folder.path / STOP_FILE_NAME).exists():
            logger.warning("%s was left by an earlier run; it is removed", folder.path / STOP_FILE_NAME)
            _remove_stop_file(folder)
        heartbeat = Heartbeat(folder.path, self._rank, folder.attempt)
        heartbeat.open()
        self._folder, self._heartbeat = folder, heartbeat

    def leave(self) -> None:
        """Watch no more; before the folder is given back."""
        self._ended.set()
        self._thread.join()
        if self._heartbeat is not None:
            self._heartbeat.close()
        if self._folder is not None and self._folder.is_owner:
            _remove_stop_file(self._folder)
        self._folder = self._heartbeat = None

    def _run(self) -> None:
        while not self._ended.wait(_INTERVAL_SECONDS):
            self._look()
            self._end_if_given_up()
            self._say_request()
            if self._heartbeat is not None:
                self._heartbeat.beat(self._progress)
            self._keep_the_deadline()

    def _look(self) -> None:
        """See whether anything but a signal asks for a stop."""
        if self._stop.deadline is None:
            lost = self._launcher.lost()
            if lost is not None:
                self._stop.request(f"its launcher is gone: {lost}", STOP_GRACE_SECONDS)
        if (
            self._folder is not None and self._folder.is_owner and self._stop.requested is None
        ):  # one that knows will do
            self._look_for_file(self._folder.path / STOP_FILE_NAME)
            if self._limit is not None and time.monotonic() > self._limit - self._stop_seconds(num_saves=2):
                self._stop.request("--max-seconds")

    def _end_if_given_up(self) -> None:
        """Another start goes on, or soon will: this one must not write into the run folder any more."""
        if self._folder is None:
            return
        try:
            ended = (self._folder.path / ENDED_FILE_NAME).read_text()
        except OSError:  # none, or the file system is away for the moment
            return
        if ended.strip() == self._folder.attempt:
            self._end("the supervisor has given this start up, and another one goes on")

    def _say_request(self) -> None:
        """A person who presses Ctrl-C and sees nothing presses it again, and the second one saves nothing."""
        if self._stop.requested is not None and not self._request_said:
            self._request_said = True
            logger.info(
                "stop requested (%s): ending as soon as all ranks know, with everything saved", self._stop.requested
            )

    def _look_for_file(self, path: Path) -> None:
        try:
            text = path.read_text()
        except FileNotFoundError:
            return
        except (OSError, UnicodeDecodeError) as error:
            self._stop.request(f"the stop file {path} (unreadable: {error})")
            return
        try:
            self._stop.request(f"the stop file {path}", float(text) if text.strip() else None)
        except ValueError:
            self._stop.request(f"the stop file {path}")

    def _stop_seconds(self, num_saves: int) -> float:
        """How long a stop will take: the step that runs, the one that was agreed meanwhile, and so many saves.

        Two, where one is in flight or may begin in these steps: it is finished before the last one begins.
        """
        return 2 * (self._progress.median_step_seconds or 0.0) + num_saves * (self._progress.save_seconds or 0.0)

    def _keep_the_deadline(self) -> None:
        if self._folder is None:
            if self._stop.requested is not None:
                self._end(f"stop requested ({self._stop.requested}) before the run began")
            return
        left = self._stop.seconds_left()
        if left is None:
            return
        if left <= 0:
            text = (
                f"stop requested ({self._stop.requested}) and the time is up in phase {self._progress.phase} after "
                f"step {self._progress.step}; {standing(self._folder.checkpoint_step)}"
            )
            try:
                self._folder.write_state(
                    "stopped", self._progress.step, outcome="out_of_time", exit_code=EXIT_STOPPED_EARLY, error=text
                )
            except SaveError as error:
                text += f" ({error})"
            self._end(text)
        elif not self._deadline_said and self._progress.phase == "step":
            is_saving = self._progress.is_saving
            needed = self._stop_seconds(num_saves=1 + is_saving)
            if needed <= left:
                return
            self._deadline_said = True
            logger.warning(
                "stop requested (%s): %.0f s are left, and two steps%s and a save take about %.0f s. This start may "
                "end without saving; %s",
                self._stop.requested,
                left,
                ", the save in flight" if is_saving else "",
                needed,
                standing(self._folder.checkpoint_step),
            )

    def _end(self, text: str) -> None:
        """End this process now: its main thread may be in a collective whose other ranks are gone."""
        sys.stderr.write(f"[{socket.gethostname()}, rank {self._rank}] {text}\n")
        sys.stderr.flush()
        os._exit(EXIT_STOPPED_EARLY)


def _remove_stop_file(folder: RunFolder) -> None:
    path = folder.path / STOP_FILE_NAME
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("cannot remove %s (%s): the next start will stop too, unless you do", path, error)


def standing(committed_step: int | None) -> str:
    """Which checkpoint a resume will use, for a person."""
    if committed_step is None:
        return "there is no checkpoint, so the run begins anew"
    return f"the checkpoint of step {committed_step} stands, and --resume auto goes on from it"


def ask_to_stop(run_dir: Path, seconds: float | None) -> None:
    """Put the stop file into a run folder, unless it is there: the run saves and ends, within ``seconds`` if given."""
    path = run_dir / STOP_FILE_NAME
    if not path.exists():  # whole or not at all: a reader must not take half a number for it
        write_bytes(path, b"" if seconds is None else f"{seconds:.1f}\n".encode())


def declare_ended(run_dir: Path, attempt: str) -> None:
    """Tell the ranks of a start, wherever they live, that they have been given up."""
    write_bytes(run_dir / ENDED_FILE_NAME, attempt.encode())
