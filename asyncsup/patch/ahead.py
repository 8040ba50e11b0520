"""Reading ahead: a second thread reads and inflates while the first hashes and writes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Final

DEPTH: Final = 4
"""Pieces that may be under way: enough to even out the two sides, few enough to stay in the cache."""


def read_ahead(pieces: Iterator[memoryview]) -> Iterator[memoryview]:
    """Yield `pieces`, which another thread takes from its iterator up to `DEPTH` of them ahead.

    Each view may be used until the next is asked for, while the iterator goes on. What it raises is raised
    here; whoever stops early leaves no thread behind.
    """
    reader = _Reader(pieces)
    reader.start()
    try:
        while (piece := reader.ready.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece
            reader.room.release()
    finally:
        reader.leave()


class _Reader(threading.Thread):
    def __init__(self, pieces: Iterator[memoryview]) -> None:
        super().__init__(name="read ahead")
        self.ready: SimpleQueue[memoryview | BaseException | None] = SimpleQueue()
        self.room = threading.Semaphore(DEPTH)
        self._pieces = pieces
        self._left = False

    def run(self) -> None:
        try:
            for piece in self._pieces:
                self.room.acquire()
                if self._left:
                    return
                self.ready.put(piece)
        except BaseException as error:
            self.ready.put(error)
        else:
            self.ready.put(None)

    def leave(self) -> None:
        """End the thread, wherever it is."""
        self._left = True
        self.room.release()
        self.join()
