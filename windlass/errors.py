"""The errors a user can cause or meet, each one message that says what is wrong and what to do about it.

`windlass` prints them without a traceback and exits with `EXIT_USER_ERROR`. Anything else that goes wrong keeps its
traceback and exits with 1.
"""

from windlass.text import printable
from windlass.urls import hide_passwords

EXIT_DONE = 0
EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75
"""Stopped on request (SIGTERM or SIGINT) after a final checkpoint; the same command resumes. EX_TEMPFAIL."""
EXIT_RESTART = 76
"""A worker stopped after a checkpoint so that its launcher starts it again, among other nodes."""


class WindlassError(Exception):
    """A mistake or a condition that the user can mend: `key` had `value`, which breaks `rule`; `fix` says what to do.

    Args:
        key: the configuration key, flag or path that is at fault, e.g. ``train.steps``.
        value: what it was set to.
        rule: what must hold, as a clause: "must be at least 1".
        fix: what to do about it, as an order: "set train.steps=300".
    """

    def __init__(self, key: str, value: object, rule: str, fix: str) -> None:
        self.key, self.value, self.rule, self.fix = key, value, rule, fix
        self.on_all_ranks = False
        """True if every rank of the run raises it: see `Mesh.agree`."""
        super().__init__(key, value, rule, fix)  # all four: exceptions travel between processes

    def __str__(self) -> str:
        return printable(hide_passwords(f"{self.key}={self.value}: {self.rule}. Fix: {self.fix}."))


class ConfigError(WindlassError):
    """A configuration key, flag or argument that cannot be used as it is."""


class DataError(WindlassError):
    """Input data that cannot be read or does not fit the model."""


class DoesNotFit(WindlassError):
    """The run needs more memory or disk than there is."""


class CorruptCheckpoint(WindlassError):
    """A checkpoint whose bytes are not those that were written."""


class IncompatibleCheckpoint(WindlassError):
    """A sound checkpoint of another model, optimizer or data set."""


class OffloadError(WindlassError):
    """A tier that failed: its disk is full or gone, or gave back other bytes than were written."""


class RunFolderError(WindlassError):
    """A run folder that cannot be used: read-only, full, in use by another run, or holding another run."""


class SystemLimit(WindlassError):
    """A limit of the system or the machine: open files, memory, room on a disk."""


class Diverged(WindlassError):
    """Training that cannot go on: its gradients are not finite any more."""


class StaleWriter(WindlassError):
    """A process that a later start of the same run has replaced, and that may not write its checkpoints any more."""


def require(condition: bool, key: str, value: object, rule: str, fix: str) -> None:
    """Raise `ConfigError` unless `condition` holds."""
    if not condition:
        raise ConfigError(key, value, rule, fix)
