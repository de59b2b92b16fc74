"""A completion's text while its tokens are still coming: nothing is said that may have to go."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["TextStream"]

_BROKEN = "\ufffd"


class TextStream:
    """Text of one completion, piece by piece; the pieces make up the text that ends at a stop.

    Held back are bytes of a character that is not whole yet, and what may turn out to be the
    beginning of a stop text.

    Args:
        decode: token ids to text.
        stop: texts that end the completion and are left out of it; none is empty.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], *, stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._token_ids: list[int] = []
        # Tokens before `_context` are not looked at again: a few that were read suffice to decode
        # the next ones as they would be behind the whole text.
        self._context = 0
        self._read = 0
        self._held = ""
        self.is_stopped = False
        """Whether a stop text has come; what follows it is not text of the completion."""

    def add(self, token_ids: Sequence[int]) -> str:
        """The text that is certain now and was not before."""
        self._token_ids += token_ids
        known = self._decode(self._token_ids[self._context : self._read])
        longer = self._decode(self._token_ids[self._context :])
        if len(longer) <= len(known) or longer.endswith(_BROKEN):
            return ""
        self._context, self._read = self._read, len(self._token_ids)
        return self._release(longer[len(known) :])

    def finish(self) -> str:
        """What was still held back; no more tokens come."""
        known = self._decode(self._token_ids[self._context : self._read])
        longer = self._decode(self._token_ids[self._context :])
        self._context = self._read = len(self._token_ids)
        released = self._release(longer[len(known) :])
        rest, self._held = self._held, ""
        return released + rest

    def _release(self, text: str) -> str:
        if self.is_stopped:
            return ""
        self._held += text
        places = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if places:
            self.is_stopped = True
            released, self._held = self._held[: min(places)], ""
            return released
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        released, self._held = self._held[:cut], self._held[cut:]
        return released


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that begins the stop text."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
