"""A queue from many threads to one, emptied at once.

Anyone may `put`; only the engine thread drains. It wakes as soon as something comes, not at a poll.
"""

from __future__ import annotations

import threading
from typing import Generic, TypeVar

T = TypeVar("T")


class Inbox(Generic[T]):
    """Messages in order of arrival."""

    def __init__(self) -> None:
        self._items: list[T] = []
        self._arrived = threading.Condition()
        self._closed = False

    def put(self, item: T) -> None:
        """Adds a message and wakes the reader. Any thread."""
        with self._arrived:
            self._items.append(item)
            self._arrived.notify()

    def close(self) -> None:
        """Lets the reader return at once from now on."""
        with self._arrived:
            self._closed = True
            self._arrived.notify()

    def drain(self, wait_seconds: float) -> list[T]:
        """All messages so far; waits up to `wait_seconds` for the first."""
        with self._arrived:
            if not self._items and not self._closed and wait_seconds > 0:
                self._arrived.wait(wait_seconds)
            items, self._items = self._items, []
            return items
