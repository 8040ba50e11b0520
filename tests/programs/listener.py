"""Answers on the sockets it was given (sd_listen_fds(3)) with what it knows, one line of JSON per question.

Arguments: what it answers besides. A question of ``end`` ends it with status 0, ``crash`` with SIGKILL.
"""

import json
import os
import selectors
import signal
import socket
import sys


def main() -> None:
    count = int(os.environ.get("LISTEN_FDS", "0"))
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    selector = selectors.DefaultSelector()
    for name, number in zip(names, range(3, 3 + count), strict=False):
        listening = socket.socket(fileno=number)
        listening.setblocking(False)
        selector.register(listening, selectors.EVENT_READ, name)
    print("listening", flush=True)
    while True:
        for key, _ in selector.select():
            assert isinstance(key.fileobj, socket.socket)
            given = key.fileobj
            answer = {
                "name": key.data,
                "pid": os.getpid(),
                "listen_pid": int(os.environ["LISTEN_PID"]),
                "arguments": sys.argv[1:],
                "told": os.environ.get("TOLD"),
                "descriptors": sorted(map(int, os.listdir("/proc/self/fd"))),  # noqa: PTH208
            }
            try:
                if given.type == socket.SOCK_DGRAM:
                    question, peer = given.recvfrom(1024)
                    given.sendto(json.dumps(answer).encode(), peer)
                else:
                    connection, _ = given.accept()
                    with connection:
                        connection.setblocking(True)
                        question = connection.recv(1024)
                        connection.sendall(json.dumps(answer).encode())
            except BlockingIOError:
                continue  # another instance was faster
            if question == b"end":
                sys.exit(0)
            if question == b"crash":
                os.kill(os.getpid(), signal.SIGKILL)


main()
