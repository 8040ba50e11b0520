"""A service that knows nothing of drains, on the socket it was given as descriptor 3: answers a line with its
version and pid. At SIGTERM it does the worst a server may do: it closes whatever has sent nothing yet, for a
while also everything that comes, and ends.

``MODE``: ok, mute (never says that it is up), deaf (has the SDK, and no handler for a drain).
"""

import os
import selectors
import signal
import socket
import time

from target_sdk import Target

VERSION = "v1"
MODE = "ok"
LAST_SECONDS = 0.3


def serve() -> None:
    ends: list[float] = []
    signal.signal(signal.SIGTERM, lambda *_: ends.append(time.monotonic() + LAST_SECONDS))
    waiting = selectors.EpollSelector()
    listening = socket.socket(fileno=3)
    listening.setblocking(False)
    waiting.register(listening, selectors.EVENT_READ)
    idle: set[socket.socket] = set()
    if MODE == "ok":
        print("up", flush=True)
    while not ends or time.monotonic() < ends[0]:
        for key, _ in waiting.select(0.02):
            assert isinstance(key.fileobj, socket.socket)
            if key.fileobj is not listening:
                connection = key.fileobj
                idle.discard(connection)
                waiting.unregister(connection)
                with connection:
                    if connection.recv(100):
                        connection.sendall(f"{VERSION} {os.getpid()} bye\n".encode())
                continue
            try:
                connection, _ = listening.accept()
            except BlockingIOError:
                continue  # another one was faster
            if ends:
                connection.close()
            else:
                idle.add(connection)
                waiting.register(connection, selectors.EVENT_READ)
        if ends:  # who had sent something when it looked has its answer
            for connection in idle:
                waiting.unregister(connection)
                connection.close()
            idle.clear()


if MODE == "deaf":
    with Target() as target:
        target.ready()
        serve()
else:
    serve()
