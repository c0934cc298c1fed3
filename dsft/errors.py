"""The errors dsft raises for its users.

Each message is one paragraph: what is wrong, where (file, line, key, host, rank), and what to do about it. The command
line prints the message without a traceback and exits with the class's code. Internal invariants use ``assert``.
"""

from __future__ import annotations

from dsft.constants import EXIT_CANNOT_SAVE, EXIT_RUN_FAILED, EXIT_STOPPED_EARLY, EXIT_USAGE


class DsftError(Exception):
    """Base of every error that a user can act on."""

    exit_code = EXIT_RUN_FAILED


class ConfigError(DsftError):
    """A configuration that cannot be meant: unknown key, wrong type, two places that contradict each other."""

    exit_code = EXIT_USAGE


class DataError(DsftError):
    """Raw data or a token store that cannot be used as asked; names the file and the line or document."""

    exit_code = EXIT_USAGE


class DamagedFileError(DataError):
    """A raw file that is cut short or damaged, as it was read; one read over the network may be whole at its source."""


class ModelError(DsftError):
    """A model that cannot be loaded, or that cannot keep one of dsft's promises (isolation, exact loss)."""

    exit_code = EXIT_USAGE


class LaunchError(DsftError):
    """The processes that were started are not the ones that were asked for."""

    exit_code = EXIT_USAGE


class KernelError(DsftError):
    """A native kernel is missing, cannot be built, or reported a failure."""


class CheckpointError(DsftError):
    """A checkpoint that is absent, incomplete, damaged, or of another run."""

    exit_code = EXIT_USAGE


class DamagedCheckpointError(CheckpointError):
    """A checkpoint whose files are not what was written; the one before it may be whole."""


class SaveError(DsftError):
    """State could not be written (disk full, read-only folder)."""

    exit_code = EXIT_CANNOT_SAVE


class TrainingError(DsftError):
    """Training itself went wrong: ranks disagree on the data, or too many steps in a row were not finite."""


class RankLostError(TrainingError):
    """Another rank is gone. A consequence: that rank's own error, if it has one, is the cause."""


class OutOfMemoryError(TrainingError):
    """Memory of the host or of a device could not be allocated."""


class StoppedEarly(DsftError):  # noqa: N818  (not an error: the run is whole and can go on)
    """The run stopped on request with everything saved; start it again to go on."""

    exit_code = EXIT_STOPPED_EARLY
