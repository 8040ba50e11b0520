"""The supervisor's end of its keeper (`keeper.py`): how it gets one, and what it says to it."""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import itertools
import logging
import os
import resource
import select
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from asyncsup import keeper
from asyncsup.errors import StateError
from asyncsup.libc import checked, libc

log = logging.getLogger("asyncsup.keeper")

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
MESSAGE_BYTES: Final = 4096
PATIENCE_SECONDS: Final = 10.0
"""How long a keeper may take to hand over what it holds."""


def launch(command: Sequence[str]) -> socket.socket:
    """Get a keeper: the calling process becomes it, and a child of that goes on here, as the supervisor.

    So whoever has started `serve` sees one process, which lives as long as the service does. Nothing may have
    been opened yet that only one of both is to have.

    Args:
        command: what starts the supervisor again; ``--keeper FD`` is appended.

    Returns:
        In the child: the channel to the keeper.
    """
    become_subreaper()  # is kept by execve(2)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        ours.close()
        return theirs
    theirs.close()
    state = keeper.Keeper()
    state.command, state.soft_limit = list(command), soft
    state.supervisor, state.channel = pid, ours
    ours.set_inheritable(True)
    # It may come to hold a descriptor for every stream of every instance.
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    keeper.become(sys.executable, keeper.__file__, state)
    os._exit(1)  # said already; the child notices


class KeeperLink:
    """Tells a keeper what to hold, and hears from it. Without one, everything here does nothing.

    Attributes:
        pid: the keeper's; None without one.
        held: what an earlier supervisor has left with the keeper, by name; a descriptor belongs to whoever
            takes it out.
    """

    def __init__(self, channel: socket.socket | None = None) -> None:
        self.pid: int | None = None
        self.held: dict[str, int] = {}
        self._names: list[str] = []
        """Of what was in `held` in the beginning, in order."""
        self._channel = channel
        self._exits: dict[tuple[int, int], int] = {}
        self._expected: set[tuple[int, int]] = set()
        self._outgoing: deque[tuple[bytes, int | None]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_signal: Callable[[int], None] = lambda _: None
        self._handed_over = False
        self._adopting = True
        """What the keeper has said so far may still be asked for."""
        if channel is not None:
            # Whatever ends the keeper ends us: the instances are better off with the next `serve` than with
            # a supervisor that nobody starts again.
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            channel.set_inheritable(False)
            channel.setblocking(False)
            self._take_over(channel)

    @property
    def reaps(self) -> bool:
        """Whether there is one, who tells how processes that are not our children have ended."""
        return self._channel is not None

    def _take_over(self, channel: socket.socket) -> None:
        poll = select.poll()  # select(2) knows no descriptor beyond 1023
        poll.register(channel, select.POLLIN)
        while not self._handed_over:
            if not poll.poll(PATIENCE_SECONDS * 1000):
                raise StateError("the keeper says nothing", code="state.keeper")
            self._receive()
            if self._channel is None or (self.pid is not None and os.getppid() != self.pid):
                raise StateError("the keeper has ended", code="state.keeper")
        self._names = sorted(self.held)

    # --- what it holds --------------------------------------------------------------------------------------

    def hold(self, name: str, fd: int) -> None:
        """Have the keeper hold a descriptor beyond our end; ours stays ours."""
        self._send(f"hold {name}", fd)

    def drop(self, name: str) -> None:
        self._send(f"drop {name}")

    def take(self, name: str) -> int | None:
        """A descriptor that an earlier supervisor had the keeper hold: the caller's from now on, while the
        keeper goes on holding its own."""
        return self.held.pop(name, None)

    def names_below(self, prefix: str) -> list[str]:
        """The names that begin with this, of what was left and nobody has taken yet."""
        first = bisect.bisect_left(self._names, prefix)
        from_there = (self._names[position] for position in range(first, len(self._names)))
        names = itertools.takewhile(lambda name: name.startswith(prefix), from_there)
        return [name for name in names if name in self.held]

    def drop_the_rest(self) -> None:
        """Nobody has asked for what is still in `held`, nor for the exits that came with it."""
        for name, fd in self.held.items():
            os.close(fd)
            self.drop(name)
        self.held.clear()
        self._adopting = False
        for pid, start in self._exits.keys() - self._expected:
            self.forget(pid, start)

    # --- how processes ended that are not our children ------------------------------------------------------

    def expect(self, pid: int, start_ticks: int) -> None:
        """We will ask for the exit of this process."""
        self._expected.add((pid, start_ticks))

    def exit_of(self, pid: int, start_ticks: int) -> int | None:
        """The wait status of a process, if the keeper has said it by now."""
        self._receive()
        return self._exits.get((pid, start_ticks))

    def forget(self, pid: int, start_ticks: int) -> None:
        """What followed from its exit is done, or written down: nobody needs to know of it any more."""
        self._expected.discard((pid, start_ticks))
        if self._exits.pop((pid, start_ticks), None) is not None:
            self._send(f"seen {pid} {start_ticks}")

    # --- life -----------------------------------------------------------------------------------------------

    def serve(self, on_signal: Callable[[int], None]) -> None:
        """From now on: signals the keeper was sent come here, from the event loop. Says that we are ready."""
        self._on_signal = on_signal
        self._send("ready")
        if self._channel is not None:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._channel, self._receive)
            self._flush()

    def end(self, status: int) -> None:
        """The keeper ends as well, with this status, when this process has ended."""
        self._send_last(f"end {status}")

    def replace(self, python: str, script: str, command: Sequence[str]) -> None:
        """When this process has ended, the keeper becomes another one, and that starts ``command``."""
        self._send_last("replace " + "\0".join([python, script, *command]))

    def _send_last(self, message: str) -> None:
        if self._channel is None:
            return
        if self._loop is not None:
            self._loop.remove_reader(self._channel)
            self._loop.remove_writer(self._channel)
            self._loop = None
        self._outgoing.append((message.encode("utf-8", "surrogateescape"), None))
        self._channel.settimeout(PATIENCE_SECONDS)
        with contextlib.suppress(OSError):
            self._flush()
        self._channel.close()
        self._channel = None

    def _send(self, message: str, fd: int | None = None) -> None:
        if self._channel is None:
            return
        data = message.encode()
        if not self._outgoing and self._pass_on(data, fd):
            return  # what is in the socket is the keeper's, whatever becomes of us
        # What has to wait needs a descriptor of its own: the caller may close his.
        self._outgoing.append((data, fd if fd is None else os.dup(fd)))
        self._flush()

    def _flush(self) -> None:
        while self._outgoing and self._channel is not None:
            message, fd = self._outgoing[0]
            if not self._pass_on(message, fd):
                if self._loop is not None:
                    self._loop.add_writer(self._channel, self._flush)
                return
            self._outgoing.popleft()
            if fd is not None:
                os.close(fd)
        if self._loop is not None and self._channel is not None:
            self._loop.remove_writer(self._channel)

    def _pass_on(self, message: bytes, fd: int | None) -> bool:
        """Send it, unless it has to wait (False)."""
        assert self._channel is not None
        try:
            socket.send_fds(self._channel, [message], [] if fd is None else [fd])
        except BlockingIOError:
            return False
        except BrokenPipeError:
            log.error("the keeper is gone")  # noqa: TRY400 - foreseen; and so are we, in an instant
        return True

    def _receive(self) -> None:
        while self._channel is not None:
            try:
                data, fds, _, _ = socket.recv_fds(self._channel, MESSAGE_BYTES, 1)
            except BlockingIOError:
                return
            for fd in fds:
                os.set_inheritable(fd, False)  # `recv_fds` has flags to that end, and ignores them
            if not data:
                if self._loop is not None:
                    self._loop.remove_reader(self._channel)
                self._channel.close()
                self._channel = None
                return
            word, *rest = data.decode().split(" ")
            self._understand(word, rest, fds)

    def _understand(self, word: str, rest: Sequence[str], fds: list[int]) -> None:
        match word, rest:
            case "keeper", [pid]:
                self.pid = int(pid)
            case "held", [name]:
                self.held[name] = fds.pop()
            case "exit", [pid, start, status]:
                self._exits[int(pid), int(start)] = int(status)
                if not self._adopting and (int(pid), int(start)) not in self._expected:
                    self.forget(int(pid), int(start))  # a stray that the keeper has reaped
            case "done", []:
                self._handed_over = True
            case "signal", [number]:
                self._on_signal(int(number))
        for fd in fds:
            os.close(fd)


def become_subreaper() -> None:
    """Processes below us that lose their parent become our children, and not those of PID 1."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    checked(libc.prctl(option, value, 0, 0, 0))
