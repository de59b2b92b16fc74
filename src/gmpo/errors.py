"""Errors a caller can act on: what is wrong, the value, what is allowed, what to do."""

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "GmpoError",
    "ModelError",
    "NonFiniteError",
    "RunFolderError",
]


class GmpoError(Exception):
    """Any mistake or failure that `gmpo` names itself; the command line prints it as one line."""


class ConfigError(GmpoError, ValueError):
    """A recipe, an override or an argument is not allowed."""


class DataError(GmpoError, ValueError):
    """A task, a row of data or a reward is not usable; the row is named."""


class ModelError(GmpoError, ValueError):
    """A model or tokenizer cannot be found, loaded or used as asked."""


class NonFiniteError(GmpoError, ArithmeticError):
    """A loss, gradient or log-probability that counts is NaN or infinite; training stops."""


class CheckpointError(GmpoError, ValueError):
    """A checkpoint is missing, damaged, or of another model or recipe."""


class RunFolderError(GmpoError, OSError):
    """A run folder cannot be created or written."""
