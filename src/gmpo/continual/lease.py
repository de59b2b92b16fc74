"""A lease of the store, held by a heartbeat for as long as its work goes on."""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gmpo.errors import LeaseHeld, StoreError
from gmpo.store import Lease, Store

__all__ = ["HeldLease", "held_lease", "new_holder"]

_BEATS = 4
"""Heartbeats in the time that a lease lasts: three may fail before it is lost."""

_POLL_SECONDS = 0.2


def new_holder() -> str:
    """A name for this process that no other has: host, process id, and a random part."""
    return f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"


class HeldLease:
    """A lease and the thread that renews it; made by `held_lease`.

    Attributes:
        lease: as it was taken.
        num_failures: times that the store was not reached: heartbeats, of which a later one may,
            and the return.
    """

    def __init__(self, store: Store, lease: Lease, *, seconds: float) -> None:
        self.lease = lease
        self.num_failures = 0
        self._store = store
        self._seconds = seconds
        self._lost: LeaseHeld | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="gmpo-lease", daemon=True)

    def require(self) -> Lease:
        """The lease, if it is not known to be lost.

        Raises:
            LeaseHeld: somebody else took it, because heartbeats failed for too long.
        """
        if self._lost is not None:
            raise LeaseHeld(self.lease.name, holder=self._lost.holder, until=self._lost.until)
        return self.lease

    def start(self) -> None:
        """Begin to renew it."""
        self._thread.start()

    def stop(self) -> None:
        """Renew it no more."""
        self._over.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._over.wait(self._seconds / _BEATS):
            try:
                self._store.take_lease(
                    self.lease.name, holder=self.lease.holder, seconds=self._seconds
                )
            except LeaseHeld as error:
                self._lost = error
                return
            except StoreError:
                self.num_failures += 1


@contextmanager
def held_lease(
    store: Store,
    name: str,
    *,
    holder: str,
    seconds: float,
    patience_seconds: float = 0.0,
    warn: Callable[[str], None] = lambda _: None,
) -> Iterator[HeldLease]:
    """Take a lease, renew it while the block runs, and give it back.

    One that cannot be given back ends by itself, so what the block did counts all the same.

    Args:
        store: of the lease.
        name: what its holder alone may do.
        holder: who asks.
        seconds: that it outlives a process that was killed.
        patience_seconds: how long to wait for one that is held.
        warn: told in one sentence if it cannot be given back, which counts as a failure too.

    Raises:
        LeaseHeld: another one holds it.
    """
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            taken = store.take_lease(name, holder=holder, seconds=seconds)
            break
        except LeaseHeld:
            if time.monotonic() >= deadline:
                raise
        time.sleep(min(_POLL_SECONDS, patience_seconds))
    held = HeldLease(store, taken, seconds=seconds)
    held.start()
    try:
        yield held
    finally:
        held.stop()
        try:
            store.drop_lease(held.lease)
        except StoreError as error:
            held.num_failures += 1
            warn(
                f"lease {name!r} could not be given back ({error}); it ends by itself, within "
                f"{seconds:g} seconds"
            )
