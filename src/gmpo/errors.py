"""Errors a caller can act on: what is wrong, the value, what is allowed, what to do."""

import traceback
from datetime import UTC, datetime
from pathlib import Path

__all__ = [
    "AFTER_DIVERGING",
    "ChampionMoved",
    "CheckpointError",
    "ConfigError",
    "CycleMoved",
    "DamagedCheckpointError",
    "DashboardError",
    "DataError",
    "DeliveryError",
    "DependencyError",
    "ExperimentMoved",
    "ExportError",
    "FederationError",
    "GmpoError",
    "GuardStopped",
    "LeaseHeld",
    "ModelError",
    "NonFiniteError",
    "NonFiniteLossError",
    "ProcessLost",
    "PromotionRefused",
    "RunFolderError",
    "RunStopped",
    "ServerUnreachable",
    "ServersBehind",
    "StillHeld",
    "StoreError",
    "StoreFull",
    "StoreLocked",
    "StudyError",
    "TooFewUpdates",
    "what_was_raised",
]

AFTER_DIVERGING = (
    "To go on, begin a new run with a lower learning rate or gradient clip norm, from the last "
    'checkpoint if there is one (model.name = "RUN/checkpoints/round-NNNNNN/model", with adapters '
    '".../adapter")'
)
"""What to do about a policy that diverged. A run that is resumed has to keep its own recipe."""
_PACKAGE = Path(__file__).parent


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


class NonFiniteLossError(NonFiniteError):
    """The loss of a batch is NaN or infinite though the policy's log-probabilities are not."""


class ProcessLost(GmpoError):
    """Another process of a run has ended; the run can be resumed."""


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


class GuardStopped(GmpoError):
    """The guard ended the run on a critical alarm; the run was saved and can be resumed."""


class StudyError(GmpoError):
    """A study cannot be run: its folder is of another study, or a run of it refuses to train."""


class FederationError(GmpoError):
    """Clients' updates cannot be aggregated, or a folder is of another federation."""


class TooFewUpdates(FederationError):
    """Too few clients' updates are left in a round to make a model of."""


class StillHeld(GmpoError):
    """Other processes hold what was waited for as long as it might be; nothing is lost."""


class ServerUnreachable(GmpoError):
    """A model server does not answer, or answers what it should not."""


class ServersBehind(ServerUnreachable):
    """A version was taken back, and some servers could not follow: they need a person's hand."""


class StoreError(GmpoError):
    """The store cannot be opened, reached, read or written."""


class StoreLocked(StoreError):
    """Another process held the store until the time-out; nothing was written."""


class StoreFull(StoreError):
    """The store's disk is full; nothing of the write was kept."""


class DashboardError(GmpoError):
    """The page's server did not start, or ended by itself."""


class DeliveryError(GmpoError):
    """A receiver of alerts did not take one.

    Attributes:
        may_pass: whether it may take it when asked again.
    """

    def __init__(self, message: str, *, may_pass: bool) -> None:
        super().__init__(message)
        self.may_pass = may_pass


class ChampionMoved(StoreError):
    """A champion was to be replaced that is the champion no longer.

    Attributes:
        name: of the model.
        expected: version that the caller believed to serve; None for none.
        found: version that serves; None for none.
    """

    def __init__(self, name: str, *, expected: str | None, found: str | None) -> None:
        serves = f"is {found or 'none yet'}, not {expected or 'none yet'} as expected"
        if found == expected:
            serves = f"was changed meanwhile, and is {found} again"
        super().__init__(
            f"the champion of {name!r} {serves}; nothing was changed; look at the new champion and "
            "decide again"
        )
        self.name = name
        self.expected = expected
        self.found = found


class PromotionRefused(GmpoError):
    """A version must not be made to serve: without evidence that still counts, or damaged."""


class CycleMoved(StoreError):
    """A cycle was to be moved on that another process has moved meanwhile; nothing was changed."""


class ExperimentMoved(StoreError):
    """An experiment was to be written that another process has written meanwhile."""


class LeaseHeld(StoreError):
    """Only one process may do this at a time, and another one does.

    Attributes:
        name: of the lease.
        holder: who holds it; None if nobody does any more, so that it was lost.
        until: unix seconds at which it ends by itself unless it is renewed.
    """

    def __init__(self, name: str, *, holder: str | None, until: float | None) -> None:
        ends = "" if until is None else f" until {_clock(until)} unless it is renewed"
        super().__init__(
            f"lease {name!r} is held by {holder or 'nobody any more'}{ends}; nothing was changed; "
            "wait for it to end, then try again"
        )
        self.name = name
        self.holder = holder
        self.until = until


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, tz=UTC).strftime("%H:%M:%S UTC")


def what_was_raised(error: BaseException) -> str:
    """What a user's function raised, and its line that did: one line in place of a traceback."""
    said = f"{type(error).__name__}: {error}" if str(error) else repr(error)
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not Path(frame.filename).is_relative_to(_PACKAGE)]
    if not theirs:
        return said
    # Deeper frames in other files are those of libraries that it called.
    line = [frame.lineno for frame in theirs if frame.filename == theirs[0].filename][-1]
    return f"{said} ({theirs[0].filename}, line {line})"
