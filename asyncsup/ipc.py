"""ZeroMQ sockets on the event loop: frames in, frames out, nothing about their meaning.

The reader watches ZMQ_FD itself instead of using `zmq.asyncio`: half the latency and a third of the CPU. That
descriptor is edge-triggered, and *sending* also consumes edges (libzmq's ZMQ_EVENTS documentation), so the
socket is drained again after every send; without it a reply that arrives during a send lies there until
something else happens.
"""

from __future__ import annotations

import asyncio
import logging
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import zmq

from asyncsup.errors import StateError
from asyncsup.handshakes import HandshakeWatch
from asyncsup.readable import is_readable
from target_sdk.protocol import MAX_FRAMES, MAX_MESSAGE_BYTES

log = logging.getLogger("asyncsup.ipc")

NOW: Final = int(zmq.NOBLOCK)
MORE: Final = int(zmq.NOBLOCK | zmq.SNDMORE)
"""Plain integers are cheaper than the enumeration's members."""

DRAIN_BATCH: Final = 256
"""Messages handled before the loop gets its turn."""

RECEIVE_HIGH_WATER: Final = 256
"""Unread messages per peer. Small: MAXMSGSIZE bounds a frame, only this bounds a peer."""


TCP_BACKLOG: Final = 64


class Origin:
    """Where a message came from, as libzmq tells it and not as the peer claims; looked up when asked for."""

    __slots__ = ("_frame",)

    def __init__(self, frame: zmq.Frame) -> None:
        self._frame = frame

    @property
    def address(self) -> str:
        """``host:uid:gid:pid`` of a local peer, an IP address of one that came over TCP."""
        return self._metadata("Peer-Address")

    @property
    def user(self) -> str:
        """Whom its key belongs to; empty where there are no keys."""
        return self._metadata("User-Id")

    def _metadata(self, name: str) -> str:
        try:
            value = self._frame.get(name)
        except zmq.ZMQError:
            return ""  # peers of ZMTP 1 and 2, and noise that passes for them, have no metadata
        return value if isinstance(value, str) else ""


class Curve(NamedTuple):
    """What makes a socket ask its peers for their keys (https://rfc.zeromq.org/spec/26/).

    Attributes:
        secret: of the supervisor, in Z85.
        domain: what the ZAP handler is told (https://rfc.zeromq.org/spec/27/).
        on_failure: see `HandshakeWatch`.
    """

    secret: bytes
    domain: bytes
    on_failure: Callable[[str], None]

    def apply(self, socket: zmq.Socket[bytes]) -> None:
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self.secret)
        socket.setsockopt(zmq.ZAP_DOMAIN, self.domain)
        socket.setsockopt(zmq.BACKLOG, TCP_BACKLOG)


def private_directory(path: Path, *, searchable: bool = False) -> None:
    """Create a folder that only this user may enter, or check that it is one.

    Args:
        searchable: others may reach what they know the name of; each socket has permissions of its own.

    Raises:
        StateError: it belongs to somebody else; sockets in it could not be trusted.
    """
    mode = 0o711 if searchable else 0o700
    path.mkdir(mode=mode, parents=True, exist_ok=True)
    status = path.stat()
    if status.st_uid != os.geteuid():
        raise StateError(f"{path} belongs to uid {status.st_uid}, not to uid {os.geteuid()}; choose another")
    if stat.S_IMODE(status.st_mode) != mode:
        path.chmod(mode)


def _bind(
    context: zmq.Context[zmq.Socket[bytes]],
    socket: zmq.Socket[bytes],
    endpoint: str,
    mode: int,
    curve: Curve | None,
) -> HandshakeWatch | None:
    socket.linger = 0
    watch = None
    if curve is not None:
        curve.apply(socket)
        watch = HandshakeWatch(context, socket, curve.on_failure)
    if endpoint.startswith("tcp://["):
        socket.setsockopt(zmq.IPV6, 1)
    socket.set(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    before = os.umask(0o777 & ~mode)
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        if watch is not None:
            watch.close()
        socket.close()
        raise StateError(f"cannot bind {endpoint}: {error.strerror}") from None
    finally:
        os.umask(before)
    return watch


def _remove(endpoint: str) -> None:
    """Remove the file of an ipc socket: libzmq leaves it, and it would look as if somebody were there."""
    if endpoint.startswith("ipc://"):
        Path(endpoint.removeprefix("ipc://")).unlink(missing_ok=True)


class Router:
    """A ROUTER socket: answers go to the peer a message came from.

    Args:
        on_message: called with the peer's identity, the frames after it, and where they came from. Must not
            raise.
        mode: permissions of an ipc socket; who may write to it may connect.
        curve: of a tcp socket.
        most_frames: a message with more is dropped.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        on_message: Callable[[bytes, Sequence[bytes], Origin], None],
        *,
        mode: int = 0o600,
        curve: Curve | None = None,
        most_frames: int = MAX_FRAMES,
    ) -> None:
        self._endpoint = endpoint
        self._on_message = on_message
        self._most_frames = most_frames
        self._loop = asyncio.get_running_loop()
        self._draining = False
        self.oversized = 0
        """Messages dropped because they had more frames than any message of the protocol."""
        self.undeliverable = 0
        """Messages dropped because their peer was gone or did not read."""
        self._socket = context.socket(zmq.ROUTER)
        self._socket.set(zmq.RCVHWM, RECEIVE_HIGH_WATER)
        self._socket.set(zmq.ROUTER_MANDATORY, 1)
        self._watch = _bind(context, self._socket, endpoint, mode, curve)
        self._fd: int = self._socket.FD
        self._loop.add_reader(self._fd, self._drain)
        self._kick()

    def send(self, peer: bytes, *frames: bytes) -> bool:
        """Queue a message without blocking; False (and counted) when the peer cannot take it."""
        parts = [peer, *frames]
        last = parts.pop()
        try:
            for part in parts:
                self._socket.send(part, MORE)
            self._socket.send(last, NOW)
        except zmq.ZMQError:
            self.undeliverable += 1
            return False
        finally:
            self._kick()
        return True

    def close(self, *, linger: float = 0.0) -> None:
        """Close the socket; what is queued has ``linger`` seconds to leave."""
        self._loop.remove_reader(self._fd)
        if self._watch is not None:
            self._watch.close()
        self._socket.close(int(linger * 1000))
        _remove(self._endpoint)

    def _kick(self) -> None:
        if not self._draining:
            self._draining = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        # A send of what is called from here needs no turn of its own: this goes on until nothing is left.
        self._draining = True
        for _ in range(DRAIN_BATCH):
            # Only when this has said that there is nothing is the edge armed again.
            if self._socket.closed or not is_readable(self._socket):
                self._draining = False
                return
            frames = self._receive()
            if not 2 <= len(frames) <= self._most_frames:
                self.oversized += 1
                continue
            body = [frame.bytes for frame in frames]
            try:
                self._on_message(body[0], body[1:], Origin(frames[-1]))
            except Exception:
                # Leaving the loop here would leave the edge unarmed: one message would silence the socket.
                log.exception("a message was dropped")
        self._draining = False
        self._kick()

    def _receive(self) -> list[zmq.Frame]:
        frame = self._socket.recv(NOW, copy=False)
        frames = [frame]
        while frame.more:
            frame = self._socket.recv(NOW, copy=False)
            frames.append(frame)
        return frames


class Publisher:
    """A PUB socket. A subscriber that does not read loses messages, and notices by their numbers."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        *,
        mode: int = 0o600,
        curve: Curve | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._socket = context.socket(zmq.PUB)
        self._socket.set(zmq.SNDHWM, 100_000)
        self._watch = _bind(context, self._socket, endpoint, mode, curve)

    def send(self, topic: bytes, frame: bytes) -> None:
        self._socket.send_multipart([topic, frame], zmq.NOBLOCK)

    def close(self) -> None:
        if self._watch is not None:
            self._watch.close()
        self._socket.close()
        _remove(self._endpoint)
