"""An HTTP service on the socket it was given as descriptor 3, with an account that outlives it.

That is two numbers in a file ``account-PID`` of the working directory. One is how many connections it holds,
each from before it is accepted until after it is closed, so never fewer than there are; the other how many
requests it has answered. ``/slow`` takes a while.

``MODE``: ok; exit, kill: it ends like that once there is a file ``fall``, at a moment in which it holds no
connection, with the listening socket open and waited for.
"""

from __future__ import annotations

import heapq
import mmap
import os
import selectors
import signal
import socket
import time
from pathlib import Path
from typing import Final

VERSION = "v1"
MODE = "ok"
SLOW_SECONDS: Final = 0.2
SIZE: Final = 4
"""Bytes of one number: it is written at once."""

HELD, ANSWERED = 0, 1


class Service:
    def __init__(self) -> None:
        with Path(f"account-{os.getpid()}").open("w+b") as file:
            file.truncate(2 * SIZE)
            self._account = memoryview(mmap.mmap(file.fileno(), 2 * SIZE)).cast("I")
        self._waiting = selectors.EpollSelector()
        self._listening = socket.socket(fileno=3)
        self._listening.setblocking(False)
        self._waiting.register(self._listening, selectors.EVENT_READ)
        self._asked: dict[socket.socket, bytes] = {}
        """What each connection has sent of its request."""
        self._due: list[tuple[float, int, socket.socket]] = []
        """Slow answers, the next one first."""

    def serve(self) -> None:
        print("up", flush=True)
        while True:
            for key, _ in self._waiting.select(0.02):
                assert isinstance(key.fileobj, socket.socket)
                if key.fileobj is self._listening:
                    self._accept()
                else:
                    self._read(key.fileobj)
            while self._due and self._due[0][0] <= time.monotonic():
                self._answer(heapq.heappop(self._due)[2])
            if MODE != "ok" and not self._account[HELD] and Path("fall").exists():
                if MODE == "exit":
                    os._exit(1)
                os.kill(os.getpid(), signal.SIGKILL)

    def _accept(self) -> None:
        self._account[HELD] += 1
        try:
            connection, _ = self._listening.accept()
        except (BlockingIOError, ConnectionError):
            self._account[HELD] -= 1  # another one was faster, or the client has gone
            return
        connection.setblocking(False)
        self._asked[connection] = b""
        self._waiting.register(connection, selectors.EVENT_READ)

    def _read(self, connection: socket.socket) -> None:
        try:
            more = connection.recv(4096)
        except ConnectionError:
            more = b""
        self._asked[connection] += more
        if not more:
            self._close(connection)
        elif not self._asked[connection].endswith(b"\r\n\r\n"):
            pass
        elif self._asked[connection].startswith(b"GET /slow "):
            heapq.heappush(self._due, (time.monotonic() + SLOW_SECONDS, connection.fileno(), connection))
        else:
            self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        if connection not in self._asked:
            return  # its client did not wait
        closes = b"connection: close" in self._asked[connection].lower()
        self._asked[connection] = b""
        last = "Connection: close\r\n" if closes else ""
        text = f"HTTP/1.1 200 OK\r\nContent-Length: {len(VERSION)}\r\n{last}\r\n{VERSION}"
        try:
            connection.send(text.encode())
        except ConnectionError:
            closes = True
        self._account[ANSWERED] += 1
        if closes:
            self._close(connection)

    def _close(self, connection: socket.socket) -> None:
        self._waiting.unregister(connection)
        del self._asked[connection]
        connection.close()
        self._account[HELD] -= 1


Service().serve()
