"""Supervisors for tests that start hundreds of them: each a process of its own, forked from one that has
imported everything.

Most of the CPU that `asyncsup serve` takes to come up goes into imports, which are the same each time. What
is forked carries out the same command line, with its own environment and output. That a supervisor comes up
from nothing all other tests show.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

MODULES: Final = (
    "asyncsup.cli.serve", "asyncsup.control", "asyncsup.serve", "asyncsup.supervisor",
    "anyio.lowlevel", "anyio.streams.memory", "anyio.streams.stapled", "anyio.streams.tls",
)  # fmt: skip
"""What a supervisor imports, at its start or later."""

_LONGEST_MESSAGE: Final = 1 << 20


class Warm:
    """A forked supervisor: that part of `subprocess.Popen` which the tests use of one."""

    def __init__(self, parent: _Parent, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._parent = parent
        # The pid is this process' until its parent is asked how it has ended.
        self._pidfd = os.pidfd_open(pid)

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._pidfd], [], [], 0)[0]:
            self.returncode = self._parent.ask({"ended": self.pid})
            os.close(self._pidfd)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """
        Raises:
            subprocess.TimeoutExpired: it runs on.
        """
        if self.returncode is None:
            select.select([self._pidfd], [], [], timeout)
        status = self.poll()
        if status is None:
            raise subprocess.TimeoutExpired("asyncsup serve", timeout or 0)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            signal.pidfd_send_signal(self._pidfd, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _Parent:
    """The process that they are forked from; ends with the socket to it."""

    def __init__(self) -> None:
        self._socket, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(its.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[its.fileno()],
            )
        # Scenes are played in several threads.
        self._lock = threading.Lock()

    def ask(self, question: Mapping[str, Any], *files: int) -> int:
        with self._lock:
            socket.send_fds(self._socket, [json.dumps(question).encode()], files)
            answer = self._socket.recv(_LONGEST_MESSAGE)
        assert answer, "the process that supervisors are forked from has ended"
        return int(answer)

    def end(self) -> None:
        self._socket.close()
        assert self._process.wait(60) == 0


_parents: list[_Parent] = []


@contextlib.contextmanager
def warm() -> Iterator[None]:
    """During the block supervisors can be spawned. What was spawned must have ended by its end."""
    parent = _Parent()
    _parents.append(parent)
    try:
        yield
    finally:
        _parents.remove(parent)
        parent.end()


def spawn(command: Sequence[str], *, env: Mapping[str, str], output: BinaryIO) -> Warm:
    """As `Popen` of ``python -m asyncsup ...``, with nothing to read, and `output` for all it writes."""
    python, *module, arguments = command[0], *command[1:3], command[3:]
    assert [python, *module] == [sys.executable, "-m", "asyncsup"], command
    pid = _parents[-1].ask({"arguments": arguments, "env": env}, output.fileno())
    return Warm(_parents[-1], pid)


# --- in the process that they are forked from ---------------------------------------------------------------


def _serve(socket_: socket.socket) -> list[str] | None:
    """Fork when asked to. Returns in the forked process, with its arguments; and in this one at the end."""
    while True:
        message, files, _, _ = socket.recv_fds(socket_, _LONGEST_MESSAGE, 1)
        if not message:
            return None
        question = json.loads(message)
        if "ended" in question:
            answer = os.waitstatus_to_exitcode(os.waitpid(question["ended"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                socket_.close()
                for fd in (1, 2):
                    os.dup2(files[0], fd)
                os.close(files[0])
                os.environ.clear()
                os.environ.update(question["env"])
                return list(question["arguments"])
            os.close(files[0])
        socket_.send(b"%d" % answer)


def _main() -> int:
    sys.path[0] = str(Path.cwd())  # as it is after `python -m`
    for name in MODULES:
        importlib.import_module(name)
    arguments = _serve(socket.socket(fileno=int(sys.argv[1])))
    if arguments is None:
        return 0
    from asyncsup import cli

    sys.argv = [str(Path(cli.__file__).parents[1] / "__main__.py"), *arguments]
    sys.orig_argv = [sys.executable, "-m", "asyncsup", *arguments]
    return cli.main()


if __name__ == "__main__":
    sys.exit(_main())
