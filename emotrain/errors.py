"""Errors that a person can mend, and the exit codes that clusters act on.

A `UserError` is one line: the value, the rule, the fix. Every other exception is a defect, of ours
or of a library, and keeps its traceback. The classes also inherit the built-in error of their kind,
so that callers in Python can catch what they know.
"""

from __future__ import annotations

EXIT_FAILED = 1
"""The command broke on the way, or the environment did: the same command may pass later."""
EXIT_MISTAKE = 2
"""Something a person has to mend: the same command ends alike every time."""
EXIT_PIPE = 141
"""Nobody reads the output any more, as in `emotrain settings | head`."""
EXIT_INTERRUPTED = 75
"""Training was asked to stop and saved a checkpoint: the same command goes on from there."""


class UserError(ValueError):
    """A value that cannot be used: a setting, an argument, the content of a file."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that a person named is not there."""


class ExistingFileError(UserError, FileExistsError):
    """A file or folder that would be written is there already."""


class NotAFolderError(UserError, NotADirectoryError):
    """A file stands where a folder is needed."""


class MissingPackageError(UserError, ModuleNotFoundError):
    """An optional package is asked for and not installed."""


class DivergedError(UserError, RuntimeError):
    """Training that cannot go on as it is configured: the same command would end alike."""


class RunError(RuntimeError):
    """A run that broke on the way, and one line can say why: a lost rank, a full disk."""


class WriteError(RunError, OSError):
    """A file that could not be written: the disk is full, or the place is not writable."""
