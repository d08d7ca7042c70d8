"""Bugs for the kill loop to find; called in the process that becomes the server, by `warm_server`.

Each function breaks one promise of the store that a SIGKILL can show.
"""

from __future__ import annotations

import threading

from prefix_store.backends import filesystem


def acknowledged_before_it_is_written() -> None:
    """Records are written a little later, by another thread."""
    append_record = filesystem.FilesystemBackend.append_record

    def later(self: filesystem.FilesystemBackend, log: str, index: int, payload: bytes) -> None:
        threading.Timer(0.005, append_record, (self, log, index, payload)).start()

    filesystem.FilesystemBackend.append_record = later  # type: ignore[method-assign]


def named_before_it_is_there() -> None:
    """A blob gets its name a little later than the version that it belongs to."""
    publish_file = filesystem.FilesystemBackend.publish_file
    discard = filesystem.FileStagedBlob.discard
    waiting: dict[str, threading.Timer] = {}

    def later(self: filesystem.FileStagedBlob) -> None:
        timer = threading.Timer(
            0.005, publish_file, (self._backend, self._path, self.digest, self.num_bytes)
        )
        waiting[str(self._path)] = timer
        timer.start()

    def discard_later(self: filesystem.FileStagedBlob) -> None:
        if str(self._path) in waiting:
            waiting.pop(str(self._path)).join()
        discard(self)

    filesystem.FileStagedBlob.publish = later  # type: ignore[method-assign]
    filesystem.FileStagedBlob.discard = discard_later  # type: ignore[method-assign]
