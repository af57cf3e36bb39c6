"""What a user can mend. The command line prints these without a traceback and ends with their exit code."""

from collections.abc import Sequence

from .screen import on_screen


class DistillmError(Exception):
    """Root of the errors that say what to do; a message fits a screen, and nothing quoted in it steers a terminal."""

    exit_code = 2

    def __init__(self, message: str = ""):
        super().__init__(on_screen(message))


class ConfigError(DistillmError):
    """A setting is unknown, missing or out of range."""


class DataError(DistillmError):
    """A data file, or a row in one, cannot be used."""


class ModelError(DistillmError):
    """A model or tokenizer cannot be loaded, or two of them do not fit together."""


class TrainingError(DistillmError):
    """Training cannot go on, such as when the loss is no longer finite; ``rows`` has the ids of the batch, if any."""

    exit_code = 3

    def __init__(self, message: str, rows: Sequence[str] = ()):
        super().__init__(message)
        self.rows = list(rows)


class StorageError(DistillmError):
    """A file could not be written or read back whole."""

    exit_code = 4


class ServerError(DistillmError):
    """The work is incomplete: a server stopped answering, or too many of its answers could not be read."""

    exit_code = 5


class ProcessError(DistillmError):
    """Another process of the same run has ended, or is not heard of any more."""

    exit_code = 6


class Interrupted(DistillmError):
    """The user stopped the work; what was done is saved."""

    exit_code = 130


class Terminated(Interrupted):
    """The system asked to stop, as a scheduler does before it takes a machine away; what was done is saved."""

    exit_code = 143


def first_of(names: Sequence[str], most: int = 16) -> str:
    """``names`` for a message that stays within a screen: those after the first ``most`` are left out."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
