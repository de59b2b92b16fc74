"""Errors a caller can act on: what is wrong, the value, what is allowed, what to do."""

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DamagedCheckpointError",
    "DataError",
    "DependencyError",
    "ExportError",
    "GmpoError",
    "ModelError",
    "NonFiniteError",
    "RunFolderError",
    "RunStopped",
]


class GmpoError(Exception):
    """Any mistake or failure that `gmpo` names itself; the command line prints it as one line."""


class ConfigError(GmpoError, ValueError):
    """A recipe, an override or an argument is not allowed."""


class DataError(GmpoError, ValueError):
    """A task, a row of data or a reward is not usable; the row is named."""


class DependencyError(GmpoError, ImportError):
    """An optional package is missing, or is there in a release that was not tested."""


class ModelError(GmpoError, ValueError):
    """A model or tokenizer cannot be found, loaded or used as asked."""


class NonFiniteError(GmpoError, ArithmeticError):
    """A loss, gradient or log-probability that counts is NaN or infinite; training stops."""


class CheckpointError(GmpoError, ValueError):
    """A checkpoint is missing, damaged, or of another model or recipe."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint's files are not what was written; an older one may serve."""


class RunFolderError(GmpoError, OSError):
    """A run folder cannot be created or written, or another process is using it."""


class ExportError(GmpoError, OSError):
    """A model cannot be exported as asked, or not to the place asked for."""


class RunStopped(GmpoError):
    """Training ended before its last round because it was asked to; the run can be resumed."""
