"""What one instance hands over to its successor: descriptors and data, over a UNIX socket.

The predecessor listens at a path that both were given. The successor connects at its start and waits there;
the predecessor accepts it when it is told to drain, sends everything, and waits for the *commit*. Who owns
the state is decided in one place, by the kernel: either the successor's commit has been put into the
predecessor's queue, or it cannot be any more (`Successor._decide`). docs/protocol.md specifies the wire.
"""

from __future__ import annotations

import array
import contextlib
import errno
import logging
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol

from target_sdk.patching import HandoverError
from target_sdk.protocol import (
    COMMIT,
    DATA,
    DESCRIPTORS,
    MAX_HANDOVER_DESCRIPTORS,
    MAX_HANDOVER_PACKET,
    PROTOCOL_VERSION,
    REFUSE,
    Notification,
    Offer,
    ProtocolError,
    TakeOver,
    decode,
)

MAX_DATA: Final = 1 << 28
"""Bytes; more belongs into a file, whose descriptor can be handed over."""

MAX_DESCRIPTORS: Final = 1 << 20

TRANSFER_SECONDS: Final = 30.0
"""Within this the state has to be handed over once that was begun: while it lasts nobody serves."""

BACKLOG: Final = 1024
"""Successors that have died in vain stay in the queue until the drain."""

RETRY_AFTER: Final = 0.002
"""Seconds until descriptors are sent again of which too many were under way."""

ANCILLARY: Final = socket.CMSG_SPACE(MAX_HANDOVER_DESCRIPTORS * array.array("i").itemsize)

logger = logging.getLogger("target_sdk")


class HasFileno(Protocol):
    def fileno(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What was taken over. The descriptors are not inherited by children."""

    descriptors: tuple[int, ...]
    """The caller's to close, once the block that took them over has ended well."""
    data: bytes


class Successor:
    """The process that is to go on with what this one has. Given to the handler of `on_handover`."""

    def __init__(self, connection: socket.socket, hello: TakeOver) -> None:
        self.pid = hello.pid
        self.build = hello.build
        self.error: HandoverError | None = None
        """Why nothing was handed over, if that was tried."""
        self._connection = connection
        self._tried = False

    def give(self, descriptors: Sequence[int | HasFileno], data: bytes = b"") -> None:
        """Hand all of it over; may be called once.

        When this returns, it belongs to the successor: close your copies, and never use or ``shutdown(2)``
        them. While it runs nothing may be read from or written to what is handed over. Blocks, for
        `TRANSFER_SECONDS` at most.

        Raises:
            HandoverError: everything is as it was; go on with it.
        """
        if self._tried:
            raise RuntimeError("a successor is given everything at once, and only once")
        self._tried = True
        numbers = [one if isinstance(one, int) else one.fileno() for one in descriptors]
        deadline = time.monotonic() + TRANSFER_SECONDS
        try:
            _check_size(numbers, data)
            try:
                self._send(numbers, data, deadline)
                answer = _receive(self._connection, deadline)
            except OSError as error:
                answer = self._decide(error)
            _check_commit(answer)
        except HandoverError as error:
            self.error = error
            raise
        finally:
            self._connection.close()

    async def give_async(self, descriptors: Sequence[int | HasFileno], data: bytes = b"") -> None:
        """`give`, in a thread: the event loop goes on with everything else meanwhile."""
        import asyncio  # noqa: PLC0415 - a threaded program needs no asyncio

        giving = asyncio.ensure_future(asyncio.to_thread(self.give, descriptors, data))
        try:
            await asyncio.shield(giving)
        except asyncio.CancelledError:
            self.close()
            await asyncio.wait({giving})
            raise

    def close(self) -> None:
        """Tell the successor that there is nothing for it, unless it was given something."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        if not self._tried:
            self._connection.close()

    def _send(self, numbers: Sequence[int], data: bytes, deadline: float) -> None:
        offer = Offer(descriptors=len(numbers), size=len(data))
        _send(self._connection, Notification(method=Offer.METHOD, params=offer.params()), deadline)
        for start in range(0, len(numbers), MAX_HANDOVER_DESCRIPTORS):
            self._send_descriptors(numbers[start : start + MAX_HANDOVER_DESCRIPTORS], deadline)
        room = MAX_HANDOVER_PACKET - len(DATA)
        for start in range(0, len(data), room):
            _limit(self._connection, deadline)
            self._connection.send(DATA + data[start : start + room])

    def _send_descriptors(self, numbers: Sequence[int], deadline: float) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", numbers))]
        while True:
            _limit(self._connection, deadline)
            try:
                self._connection.sendmsg([DESCRIPTORS], ancillary)
                return
            except OSError as error:
                # No more descriptors may be under way at once than a process may have open.
                if error.errno != errno.ETOOMANYREFS:
                    raise
                time.sleep(RETRY_AFTER)

    def _decide(self, error: OSError) -> bytes:
        """It took too long, or the successor is gone: end all of it, unless it had committed before."""
        with contextlib.suppress(OSError):
            # From here on its commit fails there; what it has sent before can still be read here.
            self._connection.shutdown(socket.SHUT_RD)
            self._connection.setblocking(False)
            answer = self._connection.recv(MAX_HANDOVER_PACKET)
            if answer:
                return answer
        raise HandoverError(f"the successor did not take over: {_told(error)}") from error


class Predecessor:
    """Where this process's successor finds it. Costs nothing while nobody drains: the kernel keeps the queue.

    Args:
        path: of the UNIX socket. Whatever lies there is replaced in one step.
    Raises:
        OSError: the socket cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listening.setblocking(False)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            temporary.unlink(missing_ok=True)
            with _address(temporary) as address:
                self._listening.bind(address)
            self._listening.listen(BACKLOG)
            temporary.rename(path)
        except BaseException:
            self._listening.close()
            raise

    def successor(self) -> Successor | None:
        """The one that came last of those that wait; the others are sent away."""
        found: Successor | None = None
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return found
            candidate = _greeted(connection)
            if candidate is None:
                connection.close()
                continue
            if found is not None:
                found.close()
            found = candidate

    def close(self) -> None:
        # The name stays: it may be another process's by now, and without a listener it means nobody.
        self._listening.close()


class Taking:
    """Waits for the predecessor's state; a context manager, with or without ``async``.

    Entering gives the `State`, or None if there is no predecessor, or one that has nothing to hand over.
    Inside the block look at it and nothing more. Leaving the block commits: then it is this process's.
    Leaving it by an exception takes nothing: the descriptors are closed and the predecessor goes on.

    Args:
        waiting: called when a predecessor was found, before its state is waited for.
        through: called once there is nothing to wait for any more.
        timeout: seconds to wait for the predecessor to begin (None: for ever).
    """

    def __init__(
        self,
        path: Path | None,
        hello: TakeOver,
        *,
        waiting: Callable[[], object],
        through: Callable[[], object],
        timeout: float | None,
    ) -> None:
        self._path = path
        self._hello = hello
        self._waiting = waiting
        self._through = through
        self._timeout = timeout
        self._connection: socket.socket | None = None
        self._descriptors: list[int] = []
        self._given = False

    def __enter__(self) -> State | None:
        """
        Raises:
            HandoverError: what came is not what was announced, or cannot be taken; the predecessor goes on.
            TimeoutError: the predecessor has not begun in time.
        """
        with self._nothing_left_behind():
            if not self._connect():
                return None
            assert self._connection is not None
            poll = select.poll()
            poll.register(self._connection, select.POLLIN)
            if not poll.poll(None if self._timeout is None else self._timeout * 1000):
                raise TimeoutError(self._too_late())
            return self._take()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._nothing_left_behind():
            if self._given and error is not None:
                self._refuse(f"{type(error).__name__}: {error}")
                self._drop()
            elif self._given:
                self._commit()
        if error is None:
            self._through()

    async def __aenter__(self) -> State | None:
        import asyncio  # noqa: PLC0415 - a threaded program needs no asyncio

        with self._nothing_left_behind():
            if not self._connect():
                return None
            assert self._connection is not None
            loop = asyncio.get_running_loop()
            begun = asyncio.Event()
            loop.add_reader(self._connection, begun.set)
            try:
                await asyncio.wait_for(begun.wait(), self._timeout)
            except TimeoutError:
                raise TimeoutError(self._too_late()) from None
            finally:
                loop.remove_reader(self._connection)
            taking = asyncio.ensure_future(asyncio.to_thread(self._take))
            try:
                return await asyncio.shield(taking)
            except asyncio.CancelledError:
                with contextlib.suppress(OSError):
                    self._connection.shutdown(socket.SHUT_RDWR)
                await asyncio.wait({taking})
                raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, trace)

    def _connect(self) -> bool:
        if self._path is None:
            return False
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._connection = connection
        connection.settimeout(TRANSFER_SECONDS)
        try:
            with _address(self._path) as address:
                connection.connect(address)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError as error:
            raise HandoverError(
                f"the predecessor cannot be reached at {self._path}: {_told(error)}"
            ) from error
        _, uid = _peer(connection)
        if uid != os.geteuid():
            raise HandoverError(f"whoever listens at {self._path} is user {uid}, and not {os.geteuid()}")
        deadline = time.monotonic() + TRANSFER_SECONDS
        try:
            _send(connection, Notification(method=TakeOver.METHOD, params=self._hello.params()), deadline)
        except OSError:
            return False  # it has ended in this moment
        self._waiting()
        return True

    def _take(self) -> State | None:
        """Receive everything, or nothing."""
        assert self._connection is not None
        deadline = time.monotonic() + TRANSFER_SECONDS
        try:
            first = _receive(self._connection, deadline)
        except OSError:
            return None  # it ended before it had begun
        if not first:
            return None
        try:
            state = self._receive_all(_offer(first), deadline)
        except (OSError, ProtocolError) as error:
            self._refuse(_told(error))
            raise HandoverError(f"the hand-over failed: {_told(error)}") from error
        except HandoverError as error:
            self._refuse(str(error))
            raise
        self._given = True
        return state

    def _receive_all(self, offer: Offer, deadline: float) -> State:
        assert self._connection is not None
        data = bytearray()
        while len(self._descriptors) < offer.descriptors or len(data) < offer.size:
            _limit(self._connection, deadline)
            packet, ancillary, flags, _ = self._connection.recvmsg(
                MAX_HANDOVER_PACKET, ANCILLARY, socket.MSG_CMSG_CLOEXEC
            )
            for level, kind, content in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    self._descriptors.extend(_numbers(content))
            if flags & socket.MSG_CTRUNC:
                raise HandoverError(
                    f"{offer.descriptors} descriptors do not fit into the limit of open files (RLIMIT_NOFILE)"
                )
            if not packet:
                raise HandoverError("the predecessor gave up in the middle of the hand-over")
            if packet[:1] == DATA:
                data += packet[1:]
        if len(self._descriptors) != offer.descriptors or len(data) != offer.size:
            raise HandoverError("more came than was announced")
        return State(descriptors=tuple(self._descriptors), data=bytes(data))

    def _commit(self) -> None:
        assert self._connection is not None
        try:
            _send(self._connection, Notification(method=COMMIT), time.monotonic() + TRANSFER_SECONDS)
        except OSError as error:
            raise HandoverError(f"the predecessor has given up and goes on itself: {_told(error)}") from error
        self._descriptors.clear()
        self._drop()

    def _refuse(self, reason: str) -> None:
        assert self._connection is not None
        note = Notification(method=REFUSE, params={"reason": reason[:1000]})
        with contextlib.suppress(OSError):
            _send(self._connection, note, time.monotonic() + TRANSFER_SECONDS)

    def _drop(self) -> None:
        self._given = False
        while self._descriptors:
            os.close(self._descriptors.pop())
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @contextlib.contextmanager
    def _nothing_left_behind(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._drop()
            raise
        if not self._given:
            self._drop()

    def _too_late(self) -> str:
        return f"the predecessor has not begun to hand over within {self._timeout:g} s"


class Drainer:
    """Answers the supervisor's drain: first hands over, then drains what is left.

    Args:
        successor: looks whether somebody waits.
    """

    def __init__(
        self,
        successor: Callable[[], Successor | None],
        handover: Callable[[Successor], Any],
        drain: Callable[[float], Any] | None,
    ) -> None:
        self._successor = successor
        self._handover = handover
        self._drain = drain

    def __call__(self, seconds: float) -> object:
        deadline = time.monotonic() + seconds
        successor = self._successor()
        if successor is not None:
            try:
                self._handover(successor)
            finally:
                successor.close()
            _check_given(successor)
        return None if self._drain is None else self._drain(max(0.0, deadline - time.monotonic()))

    async def run_async(self, seconds: float) -> object:
        """The same, for handlers that may be ``async``."""
        deadline = time.monotonic() + seconds
        successor = self._successor()
        if successor is not None:
            try:
                given = self._handover(successor)
                if hasattr(given, "__await__"):
                    await given
            finally:
                successor.close()
            _check_given(successor)
        if self._drain is None:
            return None
        drained = self._drain(max(0.0, deadline - time.monotonic()))
        return await drained if hasattr(drained, "__await__") else drained


def _check_size(numbers: Sequence[int], data: bytes) -> None:
    if len(data) > MAX_DATA or len(numbers) > MAX_DESCRIPTORS:
        raise HandoverError(
            f"at most {MAX_DATA} bytes and {MAX_DESCRIPTORS} descriptors can be handed over,"
            f" got {len(data)} and {len(numbers)}"
        )


def _check_given(successor: Successor) -> None:
    """A hand-over that failed is the drain's failure, also if the program made the best of it."""
    if successor.error is not None:
        raise successor.error


def _check_commit(answer: bytes) -> None:
    if not answer:
        raise HandoverError("the successor ended before it had taken over")
    try:
        message = decode(answer)
    except ProtocolError as error:
        raise HandoverError(f"the successor answered nonsense: {error}") from error
    match message:
        case Notification(method=method) if method == COMMIT:
            return
        case Notification(method=method, params=params) if method == REFUSE:
            raise HandoverError(f"the successor refused: {params.get('reason')}")
    raise HandoverError(f"the successor answered neither {COMMIT} nor {REFUSE}")


def _greeted(connection: socket.socket) -> Successor | None:
    """Whoever is at the other end, if it is a successor that is alive and may have what we have."""
    pid, uid = _peer(connection)
    if uid != os.geteuid():
        logger.warning("process %d of user %d wants to take over, and is sent away", pid, uid)
        return None
    connection.setblocking(False)
    try:
        packet = connection.recv(MAX_HANDOVER_PACKET)
        if not packet:
            return None
        hello = _hello(packet)
    except (OSError, ProtocolError) as error:
        logger.warning("process %d wants to take over, but is not understood: %s", pid, _told(error))
        return None
    try:
        connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return Successor(connection, hello)
    except OSError:
        pass
    return None  # it has ended, or says what nobody asked for


def _hello(packet: bytes) -> TakeOver:
    message = decode(packet)
    if not isinstance(message, Notification) or message.method != TakeOver.METHOD:
        raise ProtocolError(f"expected {TakeOver.METHOD}")
    hello = TakeOver.from_params(message.params)
    if hello.protocol != PROTOCOL_VERSION:
        raise ProtocolError(f"protocol {hello.protocol} is not {PROTOCOL_VERSION}")
    return hello


def _offer(packet: bytes) -> Offer:
    message = decode(packet)
    if not isinstance(message, Notification) or message.method != Offer.METHOD:
        raise ProtocolError(f"expected {Offer.METHOD}")
    offer = Offer.from_params(message.params)
    if not 0 <= offer.descriptors <= MAX_DESCRIPTORS or not 0 <= offer.size <= MAX_DATA:
        raise ProtocolError("the offer is larger than can be taken over")
    return offer


def _limit(connection: socket.socket, deadline: float) -> None:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError(f"not done within {TRANSFER_SECONDS:g} s")
    connection.settimeout(left)


def _send(connection: socket.socket, note: Notification, deadline: float) -> None:
    _limit(connection, deadline)
    connection.send(note.encode())


def _receive(connection: socket.socket, deadline: float) -> bytes:
    _limit(connection, deadline)
    return connection.recv(MAX_HANDOVER_PACKET)


def _peer(connection: socket.socket) -> tuple[int, int]:
    """Process id and user id of the other end, from the kernel."""
    layout = struct.Struct("3i")
    pid, uid, _ = layout.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, layout.size))
    return pid, uid


def _numbers(content: bytes) -> list[int]:
    numbers = array.array("i")
    numbers.frombytes(content[: len(content) - len(content) % numbers.itemsize])
    return numbers.tolist()


def _told(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


@contextlib.contextmanager
def _address(path: Path) -> Iterator[str]:
    """A name for it that fits into 107 bytes, however deep it lies."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
