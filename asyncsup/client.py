"""The control client: what the command line, the console and any Python program talk to a supervisor with.

    with ControlClient(find_endpoint()) as client:
        print(client.call("status", names=["web"]))

    async with AsyncControlClient(find_endpoint()) as client:
        await client.call("restart", names=["web"])

One JSON-RPC 2.0 request in one ZeroMQ frame, one answer with the same id (``docs/protocol.md``). What the
supervisor answers is returned as its JSON says it; what it refuses is raised as `RemoteError`. Nothing of the
supervisor's inside is imported here.
"""

# ruff: noqa: PTH123
# pathlib, dataclasses, asyncio and logging would be a good part of the run time of a short command.

from __future__ import annotations

import binascii
import os
import struct
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

import zmq

from asyncsup.client_keys import ClientKeys, keys_for, not_taken
from asyncsup.endpoint import check_reachable, events_port, find_endpoint, unreachable
from asyncsup.errors import NotAllowedError, SupervisorUnreachableError
from asyncsup.readable import is_readable
from asyncsup.rpc import Params, decode, encode_request, exit_status_of, result_of, timed_out, went_away

if TYPE_CHECKING:
    import anyio
    import anyio.abc

__all__ = [
    "AsyncControlClient",
    "AsyncEventStream",
    "ClientKeys",
    "ControlClient",
    "Event",
    "EventStream",
    "Gap",
    "exit_status_of",
    "find_endpoint",
]

UPLOAD_CHUNK_BYTES: Final = 512 * 1024
"""Of the file; base64 makes two thirds of the 1 MiB a message may have out of it."""

MAX_ANSWER_BYTES: Final = 64 * 1024 * 1024
"""A longer answer is not one of a supervisor."""

REFUSED: Final = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
MONITORED: Final = zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | REFUSED
HEARTBEAT_MS: Final = 10_000
"""Over TCP: how often a silent connection is asked whether it is still there."""

JOIN_SECONDS: Final = 0.25
"""A new subscription misses what is published before it has arrived, and nobody says when it has. This long
after it, whatever was missed is fetched."""

MAX_WAITING_EVENTS: Final = 10_000
"""Events a slow reader may leave lying; later ones are dropped here and fetched again as a gap."""


class Event(NamedTuple):
    """One event of the supervisor's stream."""

    seq: int
    type: str
    data: Mapping[str, Any]
    """The whole event: ``seq``, ``at`` (RFC 3339), ``type`` and what belongs to the type."""


class Gap(NamedTuple):
    """Events that did not arrive by themselves."""

    first: int
    last: int
    lost: int
    """How many of them the supervisor no longer had; the others have been fetched and follow."""
    restarted: bool
    """The supervisor is another one than before: its events are numbered from 1 again."""


# --- events (pure) ------------------------------------------------------------------------------------------


def _as_event(message: Mapping[str, Any] | None) -> Event | None:
    data = message.get("params") if message is not None else None
    if not isinstance(data, dict) or not isinstance(data.get("seq"), int):
        return None
    return Event(data["seq"], str(data.get("type", "")), data)


def _gone(endpoint: str) -> str:
    return f"the supervisor at {endpoint} went away"


class _Sequence:
    """Makes one gapless order out of events that arrive late, twice or not at all. Knows no socket.

    Events that were fetched after a gap may still arrive from the socket; that is the only way in which one
    comes twice. Any other step back in the numbers means that another supervisor is counting.
    """

    def __init__(self, last: int) -> None:
        self.last = last
        self._fetched: dict[int, object] = {}

    def follows(self, event: Event) -> bool:
        return event.seq == self.last + 1

    def is_repeat(self, event: Event) -> bool:
        return event.seq in self._fetched and self._fetched.pop(event.seq) == event.data.get("at")

    def take(self, event: Event) -> bool:
        """Whether ``event`` is to be delivered; then it is the last one."""
        if self.is_repeat(event) or event.seq <= self.last:
            return False
        self.last = event.seq
        return True

    def restart(self) -> None:
        self.last = 0
        self._fetched.clear()

    def fetched(self, answer: Mapping[str, Any]) -> tuple[list[Event], int]:
        """What `events.since` answered: the events to deliver, and how many before them are lost."""
        events = [event for data in answer["events"] if (event := _as_event({"params": data}))]
        new = [event for event in events if event.seq > self.last]
        oldest = new[0].seq if new else int(answer["oldest"])
        lost = max(oldest - self.last - 1, 0)
        self.last = max([self.last, oldest - 1, *(event.seq for event in new)])
        self._fetched.update((event.seq, event.data.get("at")) for event in new)
        while len(self._fetched) > MAX_WAITING_EVENTS:
            del self._fetched[next(iter(self._fetched))]
        return new, lost


# --- one socket ---------------------------------------------------------------------------------------------


class _News(NamedTuple):
    """What has become of a connection."""

    lost: bool
    joined: bool
    refused: NotAllowedError | None


NO_NEWS: Final = _News(lost=False, joined=False, refused=None)


class _Link:
    """A ZeroMQ socket to the supervisor, and word of its loss (which ZeroMQ itself keeps quiet about)."""

    _numbers = iter(range(1, 1 << 62))

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], kind: int, endpoint: str, keys: ClientKeys | None
    ) -> None:
        self._endpoint = endpoint
        self._has_keys = keys is not None
        self.socket = context.socket(kind)
        self.monitor = context.socket(zmq.PAIR)
        # A `cancel` sent on the way out may leave within this time; without a supervisor nothing waits.
        self.socket.setsockopt(zmq.LINGER, 200)
        self.monitor.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.MAXMSGSIZE, MAX_ANSWER_BYTES)
        self.socket.setsockopt(zmq.RECONNECT_IVL, 20)
        self.socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
        if kind == zmq.SUB:
            self.socket.setsockopt(zmq.RCVHWM, MAX_WAITING_EVENTS)
            self.socket.setsockopt(zmq.SUBSCRIBE, b"")
        if keys is not None:
            self.socket.setsockopt(zmq.CURVE_SERVERKEY, keys.supervisor)
            self.socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
            self.socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
            self.socket.setsockopt(zmq.IPV6, int(endpoint.startswith("tcp://[")))
            # Nobody says when a machine or a line is gone.
            self.socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
            self.socket.setsockopt(zmq.HEARTBEAT_TTL, 3 * HEARTBEAT_MS)
            self.socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 3 * HEARTBEAT_MS)
        address = f"inproc://monitor-{next(self._numbers)}"
        self.socket.monitor(address, MONITORED)
        self.monitor.connect(address)
        self.socket.connect(endpoint)

    def receive(self) -> list[bytes] | None:
        """The next message, or None when there is none now: only that None re-arms the descriptor."""
        return self.socket.recv_multipart(zmq.NOBLOCK) if is_readable(self.socket) else None

    def news(self) -> _News:
        """What has become of the connection since this was last asked."""
        seen = 0
        while is_readable(self.monitor):
            seen |= struct.unpack_from("=H", self.monitor.recv_multipart(zmq.NOBLOCK)[0])[0]
        if not seen:
            return NO_NEWS
        joined = bool(seen & zmq.EVENT_HANDSHAKE_SUCCEEDED)
        lost, refused = bool(seen & zmq.EVENT_DISCONNECTED), None
        if seen & REFUSED and not joined:
            if self._has_keys:
                refused = not_taken(self._endpoint, unknown=bool(seen & zmq.EVENT_HANDSHAKE_FAILED_AUTH))
            else:
                lost = True  # without keys there is nothing to refuse: the supervisor has ended in the middle
        return _News(lost, joined, refused)

    def lost(self) -> bool:
        """Raises NotAllowedError: there is somebody, who does not take our key."""
        news = self.news()
        if news.refused is not None:
            raise news.refused
        return news.lost

    def close(self, *, linger: bool = False) -> None:
        """May be called twice. With ``linger``, what is still queued may leave first, for a moment."""
        if self.socket.closed:
            return
        if not linger:
            self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.disable_monitor()
        self.monitor.close()
        self.socket.close()


# --- blocking -----------------------------------------------------------------------------------------------


class ControlClient:
    """A blocking client. A context manager; not to be shared between threads.

    Connects at the first call, and again by itself after the supervisor has come back. A call that was under
    way when the supervisor went away raises `SupervisorUnreachableError` and is not repeated: only the caller
    knows whether it may be.

    Args:
        endpoint: as `find_endpoint` returns it, ``ipc:///run/asyncsup/control.sock``, or ``tcp://HOST:PORT``.
        keys: for ``tcp://``; default: as the environment says (`asyncsup.client_keys`).

    Raises:
        KeysError: over TCP, and there are no keys or they are wrong.
    """

    def __init__(self, endpoint: str, *, keys: ClientKeys | None = None) -> None:
        self.endpoint = endpoint
        self._keys = keys_for(endpoint) if keys is None else keys
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._link: _Link | None = None
        self._next_id = 0
        self._waiting: set[int] = set()
        self._answers: dict[int, Mapping[str, Any]] = {}
        self._streams: list[EventStream] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every socket, event streams included. May be called twice."""
        for stream in list(self._streams):
            stream.close()
        self._drop(linger=True)
        self._context.term()

    def call(
        self,
        method: str,
        params: Params | None = None,
        /,
        *,
        timeout: float | None = None,
        events: EventStream | None = None,
        on_event: Callable[[Event], None] | None = None,
        slow_after: float = 1.0,
        on_slow: Callable[[], bool] | None = None,
        **more: Any,
    ) -> Any:
        """Call ``method`` and return its result.

        ``params`` and keyword arguments are merged; a value of None is left out. A parameter of the method
        that is itself called ``timeout`` goes into ``params``.

        An exception on the way, Ctrl-C included, cancels the request at the supervisor before it is raised.

        Args:
            timeout: how long to wait for the answer (seconds); None: for as long as the supervisor is there.
            events, on_event: hand over the events of this stream while waiting.
            slow_after, on_slow: call this whenever there is no answer for so long (seconds), until it returns
                True. It may ask the supervisor what takes so long.

        Raises:
            RemoteError: the supervisor answered with an error; `exit_status_of` and ``error_code`` say which.
            SupervisorUnreachableError: there is none, or it went away before it had answered.
            TimeoutExpiredError: there was no answer in time.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        slow_at = None if on_slow is None else time.monotonic() + slow_after
        self._next_id += 1
        request_id = self._next_id
        frame = encode_request(request_id, method, {**(params or {}), **more})
        self._waiting.add(request_id)
        try:
            # Inside: Ctrl-C may come when the request has left and we do not know it yet.
            self._send(frame)
            while (answer := self._answers.pop(request_id, None)) is None:
                remaining = _remaining(deadline, timeout, method)
                if slow_at is not None and on_slow is not None:
                    slow_in = slow_at - time.monotonic()
                    if slow_in <= 0:
                        try:
                            slow_at = None if on_slow() else time.monotonic() + slow_after
                        except SupervisorUnreachableError:
                            slow_at = None
                            if request_id not in self._answers:
                                raise went_away(self.endpoint, method) from None
                        continue  # the answer may have come with another
                    remaining = slow_in if remaining is None else min(remaining, slow_in)
                self._wait(remaining, events, on_event, method)
        except SupervisorUnreachableError:
            raise
        except BaseException:
            self._cancel(request_id)
            raise
        finally:
            self._waiting.discard(request_id)
            self._answers.pop(request_id, None)
        return result_of(answer)

    def upload(
        self,
        path: str | os.PathLike[str],
        *,
        timeout: float | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> str:
        """Send a file to the supervisor in pieces; returns the id that goes where a ``path`` would.

        Args:
            timeout: for each piece (seconds).
            on_progress: called with the bytes sent and the bytes there are.

        Raises:
            OSError: the file cannot be read.
            and what `call` raises.
        """
        upload: str | None = None
        with open(path, "rb") as file:
            total = os.fstat(file.fileno()).st_size
            for chunk in _chunks(file.read, total):
                answer = self.call("patch.upload", chunk, upload=upload, timeout=timeout)
                upload = str(answer["upload"])
                if on_progress is not None:
                    on_progress(int(answer["size"]), total)
        assert upload is not None
        return upload

    def subscribe(
        self, *, since: int | None = None, on_gap: Callable[[Gap], None] | None = None
    ) -> EventStream:
        """Follow the event stream, gapless, from now on or from just after number ``since``.

        Args:
            on_gap: told when events had to be fetched, or were lost. (Those in the first moments of a
                subscription are fetched without a word.)

        Raises:
            what `call` raises.
        """
        stream = EventStream(self, since, on_gap)
        self._streams.append(stream)
        return stream

    def wait_closed(self, timeout: float | None = None) -> bool:
        """Return True once the supervisor has closed the connection, False after ``timeout`` seconds."""
        if self._link is None:
            return True
        poller = zmq.Poller()
        poller.register(self._link.monitor, zmq.POLLIN)
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._link.lost():
            remaining = None if deadline is None else deadline - time.monotonic()
            if remaining is not None and remaining <= 0:
                return False
            poller.poll(_milliseconds(remaining))
        self._drop()
        return True

    # --- inside ---------------------------------------------------------------------------------------------

    def _send(self, frame: bytes) -> None:
        if self._link is not None and self._link.lost():
            self._drop()
        if self._link is None:
            check_reachable(self.endpoint)
            self._link = _Link(self._context, zmq.DEALER, self.endpoint, self._keys)
        try:
            self._link.socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            raise unreachable(self.endpoint, "it takes no more requests") from None

    def _cancel(self, request_id: int) -> None:
        if self._link is None:
            return
        self._next_id += 1
        frame = encode_request(self._next_id, "cancel", {"id": request_id})
        try:
            self._link.socket.send(frame, zmq.NOBLOCK)  # its answer is nobody's: it is dropped when it comes
        except zmq.Again:
            self._drop()

    def _wait(
        self,
        seconds: float | None,
        events: EventStream | None,
        on_event: Callable[[Event], None] | None,
        method: str,
    ) -> None:
        assert self._link is not None
        poller = zmq.Poller()
        poller.register(self._link.socket, zmq.POLLIN)
        poller.register(self._link.monitor, zmq.POLLIN)
        if events is not None:
            seconds = events.register(poller, seconds)
        poller.poll(_milliseconds(seconds))
        if events is not None and on_event is not None:
            # Before the answer: what happened before it is told before it.
            try:
                for event in events.arrived():
                    on_event(event)
            except SupervisorUnreachableError:
                pass  # of the events alone, which are fetched later; of the supervisor this call knows itself
        self._receive()
        if self._link is not None and not self._answers and self._link.lost():
            self._drop()
        if self._link is None and not self._answers:
            raise went_away(self.endpoint, method)

    def _receive(self) -> None:
        while self._link is not None and (frames := self._link.receive()) is not None:
            answer = decode(frames[-1])
            if answer is not None and answer.get("id") in self._waiting:
                self._answers[answer["id"]] = answer

    def _drop(self, *, linger: bool = False) -> None:
        """Forget the connection and what was still queued in it: the next supervisor must not act on it."""
        if self._link is not None:
            self._link.close(linger=linger)
            self._link = None

    def _events_endpoint(self) -> str:
        return _events_endpoint(self.endpoint) or _events_endpoint_of(self.call("supervisor.info"))


def _remaining(deadline: float | None, timeout: float | None, method: str) -> float | None:
    """Raises TimeoutExpiredError."""
    if deadline is None or timeout is None:
        return None
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise timed_out(method, timeout)
    return remaining


def _milliseconds(seconds: float | None) -> int | None:
    """For a poller, which counts whole milliseconds: rounded up, or it would spin through the last one."""
    return None if seconds is None else int(max(0.0, seconds) * 1000) + 1


def _chunks(read: Callable[[int], bytes], total: int) -> Iterator[Params]:
    offset = 0
    while True:
        data = read(UPLOAD_CHUNK_BYTES)
        last = offset + len(data) >= total or not data
        yield {"offset": offset, "data": binascii.b2a_base64(data, newline=False).decode(), "last": last}
        offset += len(data)
        if last:
            return


def _events_endpoint(endpoint: str) -> str | None:
    if endpoint.startswith("tcp://"):
        return events_port(endpoint)
    folder, found, _ = endpoint.rpartition("/control.sock")
    return f"{folder}/events.sock" if found else None


def _events_endpoint_of(info: Mapping[str, Any]) -> str:
    return f"ipc://{info['runtime_dir']}/events.sock"


class EventStream:
    """The supervisor's events in order and without gaps. Iterate over it, or `read` with a time-out."""

    def __init__(
        self, client: ControlClient, since: int | None, on_gap: Callable[[Gap], None] | None
    ) -> None:
        endpoint = client._events_endpoint()
        check_reachable(endpoint)
        self._client = client
        self._on_gap = on_gap
        self._ready: deque[Event] = deque()
        # Subscribed first and asked second: what happens in between comes twice rather than not at all.
        self._link = _Link(client._context, zmq.SUB, endpoint, client._keys)
        try:
            info = client.call("supervisor.info")
        except BaseException:
            self._link.close()
            raise
        self._sequence = _Sequence(int(info["seq"]) if since is None else since)
        self._started = info.get("started")
        self._stale = since is not None
        self._lost = False
        self._settles_at: float | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        if self in self._client._streams:
            self._client._streams.remove(self)
        self._link.close()

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        while True:
            event = self.read()
            if event is not None:
                return event

    def read(self, timeout: float | None = None) -> Event | None:
        """The next event, or None after ``timeout`` seconds without one.

        Raises:
            SupervisorUnreachableError: the supervisor went away. Read on once there is one again: what was
                missed is fetched then.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            if not self._ready:
                self._collect()
            if self._ready:
                return self._ready.popleft()
            remaining = None if deadline is None else deadline - time.monotonic()
            if remaining is not None and remaining <= 0:
                return None
            poller = zmq.Poller()
            poller.poll(_milliseconds(self.register(poller, remaining)))

    def register(self, poller: zmq.Poller, seconds: float | None) -> float | None:
        """Have ``poller`` wake up when `arrived` has something to do; returns how long it may wait for it."""
        poller.register(self._link.socket, zmq.POLLIN)
        poller.register(self._link.monitor, zmq.POLLIN)
        if self._settles_at is None:
            return seconds
        settles = self._settles_at - time.monotonic()
        return settles if seconds is None else min(settles, seconds)

    def arrived(self) -> list[Event]:
        """The events that are here by now, without waiting for more. Raises as `read` does."""
        self._collect()
        return self._taken()

    def _taken(self) -> list[Event]:
        events = list(self._ready)
        self._ready.clear()
        return events

    def _collect(self) -> None:
        """Put what is here into `_ready`, where it stays if this is cut short."""
        lost, joined, refused = self._link.news()
        if refused is not None:
            raise refused
        if joined:
            self._settles_at = time.monotonic() + JOIN_SECONDS
        self._lost |= lost
        if self._lost:
            # Its last words first; what may be missing among them nobody can be asked for.
            while (frames := self._link.receive()) is not None:
                event = _as_event(decode(frames[-1]))
                if event is not None and self._sequence.take(event):
                    self._ready.append(event)
            if not self._ready:
                self._lost, self._stale = False, True
                raise SupervisorUnreachableError(_gone(self._client.endpoint), endpoint=self._client.endpoint)
            return
        settled = self._settles_at is not None and time.monotonic() >= self._settles_at
        if self._stale or settled:
            self._fetch(quiet=True)
        while (frames := self._link.receive()) is not None:
            event = _as_event(decode(frames[-1]))
            if event is None or self._sequence.is_repeat(event):
                continue
            if not self._sequence.follows(event):
                self._fetch(quiet=self._settles_at is not None)
            if self._sequence.take(event):
                self._ready.append(event)
        if settled:
            self._settles_at = None

    def catch_up(self) -> list[Event]:
        """What has arrived, and what has happened since: after this nothing up to now is missing."""
        self._collect()
        self._fetch(quiet=True)
        return self._taken()

    def _fetch(self, *, quiet: bool) -> None:
        self._stale = True  # as long as this has not come to its end
        info = self._client.call("supervisor.info")
        restarted = info.get("started") != self._started
        if restarted:
            self._started = info.get("started")
            self._sequence.restart()
            while self._link.receive() is not None:
                pass  # the dead one's, or among those that are fetched now
        first = self._sequence.last + 1
        found, lost, more = False, 0, True
        while more:
            answer = self._client.call("events.since", seq=self._sequence.last)
            some, missing = self._sequence.fetched(answer)
            self._ready.extend(some)  # at once: the sequence has got as far as that
            found |= bool(some)
            lost += missing
            more = bool(some) and self._sequence.last < answer.get("seq", 0)
        self._stale = False
        if self._on_gap is not None and (lost or restarted or (found and not quiet)):
            self._on_gap(Gap(first, self._sequence.last, lost, restarted))


# --- asynchronous -------------------------------------------------------------------------------------------


class _Pending:
    """A call that waits for its answer, or for word that none will come."""

    __slots__ = ("answer", "done", "refused")

    def __init__(self, done: anyio.Event) -> None:
        self.done = done
        self.answer: Mapping[str, Any] | None = None
        self.refused: NotAllowedError | None = None


class _AsyncLink:
    """A `_Link` read by two tasks on the event loop (any that anyio runs on).

    ZeroMQ's descriptor only says that something has changed since it was last drained, and a *send* consumes
    that as well. So every send is followed by a drain, and the descriptor is only waited for after a drain
    that ended with nothing left.
    """

    def __init__(
        self,
        link: _Link,
        *,
        on_message: Callable[[list[bytes]], None],
        on_news: Callable[[_News], None],
    ) -> None:
        import anyio  # noqa: PLC0415 - the blocking client does without

        self._link = link
        self._on_message = on_message
        self._on_news = on_news
        self._scope = anyio.CancelScope()

    async def run(self) -> None:
        import anyio  # noqa: PLC0415

        try:
            with self._scope:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._watch)
                    descriptor = int(self._link.socket.getsockopt(zmq.FD))
                    while True:
                        self._drain()
                        await anyio.wait_readable(descriptor)
        finally:
            self._link.close(linger=True)

    async def _watch(self) -> None:
        import anyio  # noqa: PLC0415

        descriptor = int(self._link.monitor.getsockopt(zmq.FD))
        while True:
            news = self._link.news()
            if any(news):
                self._on_news(news)
            await anyio.wait_readable(descriptor)

    def _drain(self) -> None:
        while (frames := self._link.receive()) is not None:
            self._on_message(frames)

    def send(self, frame: bytes) -> None:
        """Raises zmq.Again when the supervisor takes nothing."""
        self._link.socket.send(frame, zmq.NOBLOCK)
        self._drain()

    def close(self, *, linger: bool = False) -> None:
        """May be called twice. Without ``linger``, what is queued for the supervisor is forgotten."""
        if not linger:
            self._link.socket.setsockopt(zmq.LINGER, 0)
        self._scope.cancel()


class AsyncControlClient:
    """The same client for asyncio and anyio programs. Use as an async context manager, in one event loop.

    Calls of several tasks may overlap. Cancelling a call cancels the request at the supervisor.
    """

    def __init__(self, endpoint: str, *, keys: ClientKeys | None = None) -> None:
        self.endpoint = endpoint
        self._keys = keys_for(endpoint) if keys is None else keys
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._tasks: anyio.abc.TaskGroup | None = None
        self._link: _AsyncLink | None = None
        self._next_id = 0
        self._waiting: dict[int, _Pending] = {}

    async def __aenter__(self) -> Self:
        import anyio  # noqa: PLC0415

        tasks = anyio.create_task_group()
        await tasks.__aenter__()
        self._tasks = tasks
        self._context = zmq.Context()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        tasks, self._tasks, self._link = self._tasks, None, None
        context, self._context = self._context, None
        assert tasks is not None
        assert context is not None
        tasks.cancel_scope.cancel()
        try:
            await tasks.__aexit__(exc_type, exc, traceback)
        finally:
            context.term()

    async def call(
        self, method: str, params: Params | None = None, /, *, timeout: float | None = None, **more: Any
    ) -> Any:
        """As `ControlClient.call`."""
        import anyio  # noqa: PLC0415

        request_id, pending = self._send(method, {**(params or {}), **more})
        answered = False
        try:
            with anyio.move_on_after(timeout):
                await pending.done.wait()
                answered = True
        finally:
            if not answered:
                self._cancel(request_id)
            del self._waiting[request_id]
        if not answered:
            assert timeout is not None
            raise timed_out(method, timeout)
        if pending.refused is not None:
            raise pending.refused
        if pending.answer is None:
            raise went_away(self.endpoint, method)
        return result_of(pending.answer)

    async def upload(
        self,
        path: str | os.PathLike[str],
        *,
        timeout: float | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> str:
        """As `ControlClient.upload`; the file is read in a worker thread."""
        import anyio  # noqa: PLC0415
        import anyio.to_thread  # noqa: PLC0415

        upload: str | None = None
        async with await anyio.open_file(path, "rb") as file:
            total = os.fstat(file.wrapped.fileno()).st_size
            chunks = _chunks(file.wrapped.read, total)
            while (chunk := await anyio.to_thread.run_sync(next, chunks, None)) is not None:
                answer = await self.call("patch.upload", chunk, upload=upload, timeout=timeout)
                upload = str(answer["upload"])
                if on_progress is not None:
                    on_progress(int(answer["size"]), total)
        assert upload is not None
        return upload

    async def subscribe(
        self, *, since: int | None = None, on_gap: Callable[[Gap], None] | None = None
    ) -> AsyncEventStream:
        """As `ControlClient.subscribe`; a context manager and an asynchronous iterator.

        with await client.subscribe() as events:
            async for event in events: ...
        """
        info = await self.call("supervisor.info")
        endpoint = _events_endpoint(self.endpoint) or _events_endpoint_of(info)
        check_reachable(endpoint)
        return AsyncEventStream(self, endpoint, info, since, on_gap)

    # --- inside ---------------------------------------------------------------------------------------------

    def _open(
        self,
        kind: int,
        endpoint: str,
        on_message: Callable[[list[bytes]], None],
        on_news: Callable[[_News], None],
    ) -> _AsyncLink:
        if self._tasks is None or self._context is None:
            raise RuntimeError("use AsyncControlClient as an async context manager")
        socket = _Link(self._context, kind, endpoint, self._keys)
        link = _AsyncLink(socket, on_message=on_message, on_news=on_news)
        self._tasks.start_soon(link.run)
        return link

    def _send(self, method: str, params: Params) -> tuple[int, _Pending]:
        import anyio  # noqa: PLC0415

        if self._link is None:
            check_reachable(self.endpoint)
            self._link = self._open(zmq.DEALER, self.endpoint, self._on_message, self._on_news)
        self._next_id += 1
        pending = self._waiting[self._next_id] = _Pending(anyio.Event())
        try:
            self._link.send(encode_request(self._next_id, method, params))
        except zmq.Again:
            del self._waiting[self._next_id]
            raise unreachable(self.endpoint, "it takes no more requests") from None
        return self._next_id, pending

    def _cancel(self, request_id: int) -> None:
        if self._link is None:
            return
        self._next_id += 1
        try:
            self._link.send(encode_request(self._next_id, "cancel", {"id": request_id}))
        except zmq.Again:
            self._on_news(_News(lost=True, joined=False, refused=None))

    def _on_message(self, frames: list[bytes]) -> None:
        answer = decode(frames[-1])
        pending = self._waiting.get(answer["id"]) if answer is not None and "id" in answer else None
        if pending is not None:
            pending.answer = answer
            pending.done.set()

    def _on_news(self, news: _News) -> None:
        if not (news.lost or news.refused) or self._link is None:
            return
        self._link.close()
        self._link = None
        for pending in self._waiting.values():
            pending.refused = news.refused
            pending.done.set()


class AsyncEventStream:
    """The supervisor's events in order and without gaps, for ``async for``."""

    def __init__(
        self,
        client: AsyncControlClient,
        endpoint: str,
        info: Mapping[str, Any],
        since: int | None,
        on_gap: Callable[[Gap], None] | None,
    ) -> None:
        import anyio  # noqa: PLC0415

        self._client = client
        self._on_gap = on_gap
        self._sequence = _Sequence(int(info["seq"]) if since is None else since)
        self._started = info.get("started")
        self._stale = since is not None
        self._lost = False
        self._refused: NotAllowedError | None = None
        self._settles_at: float | None = None
        self._raw: deque[Event] = deque()
        self._ready: deque[Event] = deque()
        self._wake = anyio.Event()
        self._link = client._open(zmq.SUB, endpoint, self._on_message, self._on_news)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._link.close()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        """Raises SupervisorUnreachableError as `EventStream.read` does."""
        import anyio  # noqa: PLC0415

        while True:
            if self._ready:
                return self._ready.popleft()
            self._wake = anyio.Event()
            await self._sift()
            if self._ready:
                continue
            patience = None if self._settles_at is None else self._settles_at - time.monotonic()
            with anyio.move_on_after(patience):
                await self._wake.wait()

    async def _sift(self) -> None:
        if self._refused is not None:
            raise self._refused
        if self._lost:
            while self._raw:
                event = self._raw.popleft()
                if self._sequence.take(event):
                    self._ready.append(event)
            if self._ready:
                return
            self._lost, self._stale = False, True
            raise SupervisorUnreachableError(_gone(self._client.endpoint), endpoint=self._client.endpoint)
        settled = self._settles_at is not None and time.monotonic() >= self._settles_at
        if self._stale or settled:
            await self._fetch(quiet=True)
        while self._raw:
            event = self._raw.popleft()
            if self._sequence.is_repeat(event):
                continue
            if not self._sequence.follows(event):
                await self._fetch(quiet=self._settles_at is not None)
            if self._sequence.take(event):
                self._ready.append(event)
        if settled:
            self._settles_at = None

    async def _fetch(self, *, quiet: bool) -> None:
        self._stale = True  # as long as this has not come to its end
        info = await self._client.call("supervisor.info")
        restarted = info.get("started") != self._started
        if restarted:
            self._started = info.get("started")
            self._sequence.restart()
            self._raw.clear()  # the dead one's, or among those that are fetched now
        first = self._sequence.last + 1
        found, lost, more = False, 0, True
        while more:
            answer = await self._client.call("events.since", seq=self._sequence.last)
            some, missing = self._sequence.fetched(answer)
            self._ready.extend(some)  # at once: the sequence has got as far as that
            found |= bool(some)
            lost += missing
            more = bool(some) and self._sequence.last < answer.get("seq", 0)
        self._stale = False
        if self._on_gap is not None and (lost or restarted or (found and not quiet)):
            self._on_gap(Gap(first, self._sequence.last, lost, restarted))

    def _on_message(self, frames: list[bytes]) -> None:
        event = _as_event(decode(frames[-1]))
        if event is not None and len(self._raw) < MAX_WAITING_EVENTS:
            self._raw.append(event)
            self._wake.set()

    def _on_news(self, news: _News) -> None:
        self._lost |= news.lost
        self._refused = self._refused or news.refused
        if news.joined:
            self._settles_at = time.monotonic() + JOIN_SECONDS
        self._wake.set()
