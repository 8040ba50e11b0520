"""The target channel: one ROUTER for all instances, requests both ways.

An instance is known by the secret in its environment (`ASYNCSUP_TOKEN`), never by the name it claims. A
request to an instance is repeated with the same id until it is answered or its deadline has passed, because
a message that a dying peer had accepted is lost silently; the SDK answers a repeat from memory. An answer
that nobody waits for, or that comes from another instance than the one asked, is dropped and counted.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import msgspec

from asyncsup.ipc import Origin, Router
from target_sdk.protocol import (
    APPLICATION_ERROR,
    INVALID_PARAMS,
    METHOD_NOT_FOUND,
    PROTOCOL_VERSION,
    Failure,
    Hello,
    ProtocolError,
    Request,
    RequestId,
    Result,
    decode,
)

RESEND_SECONDS: Final = 1.0


class Peer(Protocol):
    """What the channel tells about an instance: an `Instance`, in practice."""

    @property
    def name(self) -> str: ...
    def said_hello(self, hello: Hello) -> Mapping[str, Any]: ...
    def said_ready(self, build: int | None) -> None: ...
    def said_status(self, text: str) -> None: ...
    def said_failed(self, reason: str) -> None: ...
    def said_extend(self, seconds: float) -> None: ...
    def said_stopping(self) -> None: ...


class PeerGoneError(Exception):
    """The instance ended before it answered."""


class PeerError(Exception):
    """The instance answered with a JSON-RPC error; the message and the code are its own."""

    def __init__(self, message: str, code: object = None) -> None:
        super().__init__(message)
        self.code = code


class _Connection(msgspec.Struct):
    peer: Peer
    identity: bytes | None = None
    pending: dict[RequestId, tuple[Request, asyncio.Future[Any]]] = msgspec.field(default_factory=dict)
    heard: dict[str, Request] = msgspec.field(default_factory=dict)
    """The last request of each kind."""


class TargetChannel:
    """Speaks with every instance that uses the SDK.

    Args:
        make_router: binds the socket with the message callback it is given, when `open` is called.
    """

    def __init__(
        self, make_router: Callable[[Callable[[bytes, Sequence[bytes], Origin], None]], Router]
    ) -> None:
        self.counters: Counter[str] = Counter()
        self._by_token: dict[str, _Connection] = {}
        self._by_identity: dict[bytes, _Connection] = {}
        self._ids = itertools.count(1)
        self._make_router = make_router
        self._router: Router | None = None

    def open(self) -> None:
        """Bind the socket. Whom an earlier supervisor had admitted must be admitted by then: a program that
        is not known at its `hello` does not ask again."""
        self._router = self._make_router(self._on_message)

    def admit(self, token: str, peer: Peer) -> None:
        """Accept an instance by this token from now on."""
        self._by_token[token] = _Connection(peer)

    def dismiss(self, token: str) -> None:
        """The instance has ended: its token is worth nothing, and whoever waits for it is told."""
        connection = self._by_token.pop(token, None)
        if connection is None:
            return
        if connection.identity is not None:
            self._by_identity.pop(connection.identity, None)
        for _, future in connection.pending.values():
            if not future.done():
                future.set_exception(PeerGoneError(f"{connection.peer.name} ended before it answered"))

    async def request(
        self, token: str, method: str, params: Mapping[str, Any], *, deadline: float | None
    ) -> Any:
        """Ask an instance and wait for its answer.

        Args:
            deadline: seconds; None where the caller has a time-out.
        Raises:
            TimeoutError: no answer by then.
            PeerGoneError: the instance ended.
            PeerError: it answered with an error.
        """
        connection = self._by_token.get(token)
        if connection is None:
            raise PeerGoneError("the instance is not running")
        request = Request(id=next(self._ids), method=method, params=params)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        connection.pending[request.id] = (request, future)
        try:
            async with asyncio.timeout(deadline):
                while True:
                    self._send(connection, request)
                    done, _ = await asyncio.wait([future], timeout=RESEND_SECONDS)
                    if done:
                        return future.result()
        finally:
            del connection.pending[request.id]
            # An exception that nobody fetched would be reported when the future is collected.
            if future.done() and not future.cancelled():
                future.exception()

    def close(self) -> None:
        if self._router is not None:
            self._router.close()
        for token in list(self._by_token):
            self.dismiss(token)

    def _send(self, connection: _Connection, request: Request) -> None:
        # Before its first `hello` a peer has no address; what is pending is sent when it comes.
        if connection.identity is not None:
            self._post(connection.identity, request)

    def _on_message(self, identity: bytes, frames: Sequence[bytes], origin: Origin) -> None:
        try:
            message = decode(frames[-1])
        except ProtocolError as error:
            self.counters["target.garbage"] += 1
            if error.request_id is not None:
                self._fail(identity, error.request_id, error.number, str(error))
            return
        if isinstance(message, Request):
            self._on_request(identity, message)
        elif isinstance(message, Result | Failure):
            self._on_answer(identity, message)
        else:
            self.counters["target.unexpected"] += 1

    def _on_request(self, identity: bytes, request: Request) -> None:
        try:
            if request.method == Hello.METHOD:
                result = self._hello(identity, Hello.from_params(request.params))
            else:
                connection = self._by_identity.get(identity)
                if connection is None:
                    self.counters["target.stranger"] += 1
                    self._fail(identity, request.id, APPLICATION_ERROR, "say hello first", "channel.no_hello")
                    return
                # What is not acknowledged in time is said again. It counts once: a `ready` that is repeated
                # must not take back a `failed` that came after it.
                if connection.heard.get(request.method) == request:
                    result = {}
                else:
                    result = _tell(connection.peer, request)
                    connection.heard[request.method] = request
        except _UnknownTokenError:
            self.counters["target.foreign_token"] += 1
            text = "unknown token: this process is no instance of this supervisor"
            self._fail(identity, request.id, APPLICATION_ERROR, text, "channel.unknown_token")
        except ProtocolError as error:
            self.counters["target.bad_request"] += 1
            self._fail(identity, request.id, error.number, str(error))
        else:
            self._post(identity, Result(id=request.id, result=result))
            if request.method == Hello.METHOD:
                self._catch_up(self._by_identity[identity])

    def _catch_up(self, connection: _Connection) -> None:
        """Ask what could not be asked before the peer had an address, or what got lost with its old one."""
        for request, future in connection.pending.values():
            if not future.done():
                self._send(connection, request)

    def _hello(self, identity: bytes, hello: Hello) -> Mapping[str, Any]:
        connection = self._by_token.get(hello.token)
        if connection is None:
            raise _UnknownTokenError
        if hello.protocol != PROTOCOL_VERSION:
            raise ProtocolError(
                f"protocol {hello.protocol} is not spoken here, only {PROTOCOL_VERSION}",
                number=INVALID_PARAMS,
            )
        if connection.identity is not None and connection.identity != identity:
            self._by_identity.pop(connection.identity, None)
        connection.heard.clear()
        connection.identity = identity
        self._by_identity[identity] = connection
        return connection.peer.said_hello(hello)

    def _on_answer(self, identity: bytes, answer: Result | Failure) -> None:
        connection = self._by_identity.get(identity)
        waiting = connection.pending.get(answer.id) if connection and answer.id is not None else None
        if waiting is None or waiting[1].done():
            self.counters["target.stale_answer"] += 1
            return
        if isinstance(answer, Result):
            waiting[1].set_result(answer.result)
        else:
            waiting[1].set_exception(PeerError(answer.message, (answer.data or {}).get("code")))

    def _fail(
        self, identity: bytes, request_id: RequestId, number: int, message: str, code: str | None = None
    ) -> None:
        data = None if code is None else {"code": code}
        failure = Failure(id=request_id, number=number, message=message, data=data)
        self._post(identity, failure)

    def _post(self, identity: bytes, message: Request | Result | Failure) -> None:
        if self._router is not None:
            self._router.send(identity, message.encode())


class _UnknownTokenError(Exception):
    pass


def _tell(peer: Peer, request: Request) -> Mapping[str, Any]:
    """Pass a request of an instance on; the answer says only that it has arrived."""
    params = request.params
    match request.method:
        case "ready":
            build = params.get("build")
            if build is not None and type(build) is not int:
                raise ProtocolError("build must be an integer or null", number=INVALID_PARAMS)
            peer.said_ready(build)
        case "status":
            text = params.get("text")
            if not isinstance(text, str):
                raise ProtocolError("text must be a string", number=INVALID_PARAMS)
            peer.said_status(text)
        case "failed":
            reason = params.get("reason")
            if not isinstance(reason, str):
                raise ProtocolError("reason must be a string", number=INVALID_PARAMS)
            peer.said_failed(reason)
        case "extend":
            seconds = params.get("seconds")
            if (
                isinstance(seconds, bool)
                or not isinstance(seconds, int | float)
                or not 0 <= seconds <= 86_400
            ):
                raise ProtocolError("seconds must be a number from 0 to 86400", number=INVALID_PARAMS)
            peer.said_extend(float(seconds))
        case "stopping":
            peer.said_stopping()
        case _:
            raise ProtocolError(f"unknown method {request.method!r}", number=METHOD_NOT_FOUND)
    return {}
