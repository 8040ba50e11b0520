"""The control server: one request, one supervisor call, one reply.

The only way in. The command line, the console, and whatever else drives a supervisor are clients of this
socket. Requests that wait for something run concurrently; a client that gives up sends ``cancel`` with the id
of its request. What can be said at once is said before the next message is read: a task for each question
would cost more than the answer.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import inspect
import logging
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import cached_property, partial
from typing import Any, Final, NamedTuple, TypeVar

import anyio
import anyio.abc
import anyio.lowlevel
from msgspec.structs import replace

from asyncsup.actor import Actor
from asyncsup.config import describe
from asyncsup.errors import (
    AsyncsupError,
    CancelledByRequestError,
    NotAllowedError,
    RequestError,
    TargetNotRunningError,
    TimeoutExpiredError,
)
from asyncsup.ipc import Origin, Router
from asyncsup.keys import Role, covers
from asyncsup.logreader import READ_BYTES, Cursor, Piece
from asyncsup.logs import OutputStream
from asyncsup.patch.intake import Source
from asyncsup.patch.plan import POLICIES, Policy
from asyncsup.patch.prototype import parse_crc32
from asyncsup.patch.uploads import CHUNK_BYTES
from asyncsup.patch.way_back import Extent
from asyncsup.patch.wish import WayBack, Wish
from asyncsup.remote import RemoteAccess
from asyncsup.stop_order import StopOrder
from asyncsup.supervisor import MOST_INSTANCES, Scaled, Selection, Supervisor
from asyncsup.target import Target
from asyncsup.together import together
from target_sdk.protocol import (
    APPLICATION_ERROR,
    INTERNAL_ERROR,
    INVALID_PARAMS,
    METHOD_NOT_FOUND,
    Failure,
    ProtocolError,
    Request,
    RequestId,
    Result,
    decode,
)

log = logging.getLogger("asyncsup.control")

LONGEST_FOLLOW_SECONDS: Final = 60.0
MOST_LINES: Final = 100_000
DEFAULT_LINES: Final = 100
LOG_ANSWER_BYTES: Final = 4 << 20
"""What all streams together may have of one answer."""
LATEST_MOMENT: Final = 253_402_300_800
"""The end of the year 9999, which is as far as dates are written."""

Handler = Callable[["ControlServer", "Call"], Any]
"""Returns the result, or, as a coroutine function, what has to be awaited for it."""
METHODS: dict[str, Method] = {}
T = TypeVar("T")


class Method(NamedTuple):
    """What a request may name.

    Attributes:
        role: what a client that comes over TCP must at least have. Local users, who may write to the socket,
            may do everything.
        waits: it is a coroutine function, whose requests can be cancelled.
    """

    handler: Handler
    role: Role
    waits: bool


def method(name: str, role: Role) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        METHODS[name] = Method(handler, role, inspect.iscoroutinefunction(handler))
        return handler

    return register


class Call:
    """One request, its parameters read with their types; a parameter that is not read at all is an error.

    Args:
        peer: who waits for the answer.
        find_actor: looks up who that is; only called for those who want to know.
    """

    def __init__(self, request: Request, peer: Peer, find_actor: Callable[[], Actor]) -> None:
        self.request = request
        self.peer = peer
        self._find_actor = find_actor
        self._params = request.params
        self._read: set[str] = set()

    @cached_property
    def actor(self) -> Actor:
        """The local user and process behind the socket, or the key."""
        return self._find_actor()

    @property
    def asked_by(self) -> str:
        """The same for people."""
        return str(self.actor)

    def string(self, key: str) -> str:
        value = self.optional_string(key)
        if value is None:
            raise RequestError(f"{key}: missing; it must be a string")
        return value

    def optional_string(self, key: str) -> str | None:
        return self._get(key, str, "a string")

    def strings(self, key: str) -> list[str]:
        values = self._get(key, list, "an array of strings")
        if values is None:
            return []
        if not all(isinstance(value, str) for value in values):
            raise RequestError(f"{key}: must be an array of strings")
        return values

    def boolean(self, key: str, default: bool) -> bool:
        value = self._get(key, bool, "a boolean")
        return default if value is None else value

    def integer(self, key: str, default: int, *, at_most: int) -> int:
        value = self.optional_integer(key, at_most=at_most)
        return default if value is None else value

    def optional_integer(self, key: str, *, at_most: int) -> int | None:
        value = self._get(key, int, "an integer")
        if value is None:
            return None
        if isinstance(value, bool) or not 0 <= value <= at_most:
            raise RequestError(f"{key}: must be an integer from 0 to {at_most}, is {value}")
        return value

    def signed_integer(self, key: str, default: int, *, at_most: int) -> int:
        value = self._get(key, int, "an integer")
        if value is None:
            return default
        if isinstance(value, bool) or not -at_most <= value <= at_most:
            raise RequestError(f"{key}: must be an integer from {-at_most} to {at_most}, is {value}")
        return value

    def seconds(self, key: str) -> float | None:
        value = self._params.get(key)
        self._read.add(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e9:
            raise RequestError(f"{key}: must be a number of seconds, is {value!r}")
        return float(value)

    def moment(self, key: str) -> float | None:
        """Seconds since the epoch."""
        value = self._params.get(key)
        self._read.add(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < LATEST_MOMENT:
            raise RequestError(f"{key}: must be a time in seconds since 1970, is {value!r}")
        return float(value)

    def choice(self, key: str, choices: Sequence[str], default: str | None = None) -> str:
        value = self.optional_string(key) if default is not None else self.string(key)
        value = default if value is None else value
        if value is None or value not in choices:
            raise RequestError(f"{key}: must be one of {', '.join(choices)}, is {value!r}")
        return value

    def request_id(self, key: str) -> RequestId:
        value = self._params.get(key)
        self._read.add(key)
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise RequestError(f"{key}: must be the integer or the string that is a request's id")
        return value

    def array(self, key: str) -> list[Any]:
        return self._get(key, list, "an array") or []

    def finish(self) -> None:
        """Every parameter must have been read by now: an unknown one is a mistake worth hearing of.

        Raises:
            RequestError: names it.
        """
        unknown = sorted(set(self._params) - self._read)
        if unknown:
            raise RequestError(
                f"unknown parameter {unknown[0]!r}; known are {', '.join(sorted(self._read)) or 'none'}"
            )

    def _get(self, key: str, kind: type[T], what: str) -> T | None:
        self._read.add(key)
        value = self._params.get(key)
        if value is not None and not isinstance(value, kind):
            raise RequestError(f"{key}: must be {what}, is {value!r:.80}")
        return value


class Errand(NamedTuple):
    """What is to be done to each of several targets.

    Attributes:
        wait: for what comes of it.
        timeout: seconds for all of it.
    """

    selections: Sequence[Selection]
    wait: bool
    timeout: float | None


RequestKey = tuple[Router, bytes, RequestId]


class Peer(NamedTuple):
    """Whom to answer, and how.

    Attributes:
        envelope: what has to come before the answer.
    """

    router: Router
    identity: bytes
    envelope: Sequence[bytes]

    def key(self, request_id: RequestId) -> RequestKey:
        """What no other request under way has."""
        return self.router, self.identity, request_id

    def send(self, reply: Result | Failure) -> None:
        try:
            frame = reply.encode()
        except (TypeError, ValueError) as error:
            log.exception("an answer cannot be encoded")
            frame = Failure(id=reply.id, number=INTERNAL_ERROR, message=str(error)).encode()
        self.router.send(self.identity, *self.envelope, frame)


MakeRouter = Callable[[Callable[[bytes, Sequence[bytes], Origin], None]], Router]


class ControlServer:
    """Answers requests on the control socket, and over TCP where that is configured.

    Args:
        make_router: binds the local socket with the message callback it is given.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        tasks: anyio.abc.TaskGroup,
        make_router: MakeRouter,
        remote: RemoteAccess | None,
    ) -> None:
        self.supervisor = supervisor
        self._tasks = tasks
        self._remote = remote
        self._running: dict[RequestKey, anyio.CancelScope] = {}
        self._router = make_router(lambda *message: self._on_message(self._router, *message))
        self._routers = [self._router]
        if remote is not None:
            try:
                router = remote.bind(lambda *message: self._on_message(router, *message))
            except BaseException:
                self._router.close()
                raise
            self._routers.append(router)

    def close(self, *, linger: float = 0.0) -> None:
        for router in self._routers:
            router.close(linger=linger)

    def _on_message(self, router: Router, identity: bytes, frames: Sequence[bytes], origin: Origin) -> None:
        # A REQ socket puts an empty frame before its body and wants it back; a DEALER may leave it out.
        envelope, body = list(frames[:-1]), frames[-1]
        if any(envelope):
            self.supervisor.counters["control.garbage"] += 1
            return
        try:
            message = decode(body)
        except ProtocolError as error:
            self.supervisor.counters["control.garbage"] += 1
            failure = Failure(id=error.request_id, number=error.number, message=str(error))
            router.send(identity, *envelope, failure.encode())
            return
        if not isinstance(message, Request):
            self.supervisor.counters["control.unexpected"] += 1
            return
        self._answer(Peer(router, identity, envelope), message, origin)

    def _answer(self, peer: Peer, request: Request, origin: Origin) -> None:
        """Answer a request, or have a task do so that waits for what it needs."""
        found = METHODS.get(request.method)
        key = peer.key(request.id)
        if found is None:
            known = ", ".join(sorted(METHODS))
            text = f"unknown method {request.method!r:.80}; known are {known}"
            unknown = {"code": "request.unknown_method"}
            peer.send(Failure(id=request.id, number=METHOD_NOT_FOUND, message=text, data=unknown))
            return
        if key in self._running:
            text = f"request {request.id!r} of this connection is still running"
            repeated = {"code": "request.repeated_id"}
            peer.send(Failure(id=request.id, number=APPLICATION_ERROR, message=text, data=repeated))
            return
        try:
            call = Call(request, peer, self._admit(peer, request.method, found.role, origin))
            if found.waits:
                # Here: a `cancel` may be the next message, before the task has begun.
                scope = self._running[key] = anyio.CancelScope()
                self._tasks.start_soon(self._carry_out, found.handler, call, scope)
                return
            reply: Result | Failure = Result(id=request.id, result=found.handler(self, call))
        except Exception as error:
            reply = _failure_in(request, error)
        peer.send(reply)

    async def _carry_out(self, handler: Handler, call: Call, scope: anyio.CancelScope) -> None:
        request, peer = call.request, call.peer
        reply: Result | Failure = failure_of(
            request.id, CancelledByRequestError(f"{request.method} was cancelled by its client")
        )
        try:
            with scope:
                reply = Result(id=request.id, result=await handler(self, call))
        except Exception as error:
            reply = _failure_in(request, error)
        finally:
            del self._running[peer.key(request.id)]
        peer.send(reply)

    def _admit(self, peer: Peer, name: str, needed: Role, origin: Origin) -> Callable[[], Actor]:
        """Returns what looks up who it is that asks.

        Raises:
            NotAllowedError: the key has another role, or has been revoked; it is written down who tried.
        """
        if peer.router is self._router:
            return partial(Actor.of_peer, origin.address)
        assert self._remote is not None
        key_name, key = self._remote.key_of(origin)
        actor = Actor.of_key(key_name, origin.address)
        if key is not None and covers(key.role, needed):
            return lambda: actor
        why = "has been revoked" if key is None else f"has the role {key.role}; {name} needs {needed}"
        self._refused(actor, name, why)
        raise NotAllowedError(f"the key {key_name} {why}", method=name, role=needed)

    def _refused(self, actor: Actor, name: str, why: str) -> None:
        self.supervisor.counters["control.not_allowed"] += 1
        self.supervisor.refused(actor, name, why)

    # --- the supervisor -------------------------------------------------------------------------------------

    @method("cancel", "view")
    def cancel(self, call: Call) -> Any:
        wanted = call.request_id("id")
        call.finish()
        scope = self._running.get(call.peer.key(wanted))
        if scope is None:
            raise RequestError(f"id: no request {wanted!r:.80} of this connection is running")
        scope.cancel()
        return {}

    @method("rpc.discover", "view")
    def discover(self, call: Call) -> Any:
        from asyncsup.openrpc import openrpc  # noqa: PLC0415 - most never ask

        call.finish()
        return openrpc()

    @method("supervisor.info", "view")
    def info(self, call: Call) -> Any:
        call.finish()
        info = self.supervisor.info()
        info["counters"]["control.undeliverable"] = sum(router.undeliverable for router in self._routers)
        info["counters"]["control.oversized"] = sum(router.oversized for router in self._routers)
        info["events"] = f"ipc://{info['runtime_dir']}/events.sock"
        info["caller"] = call.asked_by
        return info

    @method("shutdown", "operate")
    def shutdown(self, call: Call) -> Any:
        call.finish()
        return {"stopping": self.supervisor.shutdown(call.asked_by)}

    @method("supervisor.reexec", "operate")
    async def reexec(self, call: Call) -> Any:
        program = call.optional_string("program")
        call.finish()
        if program is not None and call.actor.key is not None:
            # Whoever names a program runs it as the supervisor's user; no role goes that far.
            why = "may not name a program; only a local user may"
            self._refused(call.actor, "supervisor.reexec", why)
            raise NotAllowedError(f"the key {call.actor.key} {why}", method="supervisor.reexec")
        successor = await self.supervisor.reexec(program)
        return {"version": successor.version, "command": list(successor.command)}

    @method("status", "view")
    def status(self, call: Call) -> Any:
        names = call.strings("names")
        usage = call.boolean("usage", default=False)
        call.finish()
        supervisor = self.supervisor
        targets = []
        for selection in supervisor.select(names, default_all=True):
            described = supervisor.describe(selection.target, usage=usage)
            chosen = {instance.name for instance in selection.instances}
            described["instances"] = [i for i in described["instances"] if i["name"] in chosen]
            described["uncommitted"] = supervisor.overseer.jobs.uncommitted(selection.target.name)
            described["undecided"] = supervisor.overseer.decisions.on(selection.target.name)
            targets.append(described)
        return {"seq": supervisor.events.seq, "targets": targets}

    @method("show", "view")
    async def show(self, call: Call) -> Any:
        name = call.string("name")
        call.finish()
        target = self._one(name)
        described = self.supervisor.describe(target, usage=True)
        described["uncommitted"] = self.supervisor.overseer.jobs.uncommitted(target.name)
        described["undecided"] = self.supervisor.overseer.decisions.on(target.name)
        described["config"] = describe(target.config)
        described["log"] = {
            instance.name: {stream: str(s.file.path) for stream, s in instance.streams.items()}
            for instance in target.instances
        }
        described["marks"] = self.supervisor.overseer.marks(target.name)
        described["drift"] = await self.supervisor.overseer.drift_of(target)
        described["history"] = await self.supervisor.overseer.history(target.name, 5)
        return described

    @method("events.since", "view")
    def events_since(self, call: Call) -> Any:
        seq = call.integer("seq", 0, at_most=2**63)
        call.finish()
        events, oldest = self.supervisor.events.since(seq)
        # An answer is one message: whoever is far behind asks again from the last number it got.
        return {"events": events[:2000], "oldest": oldest, "seq": self.supervisor.events.seq}

    @method("config.plan", "operate")
    async def config_plan(self, call: Call) -> Any:
        call.finish()
        return await self.supervisor.reconfigurer.plan()

    @method("config.apply", "operate")
    async def config_apply(self, call: Call) -> Any:
        wait = call.boolean("wait", True)
        call.finish()
        return await self.supervisor.reconfigurer.apply(asked_by=call.asked_by, wait=wait)

    # --- targets --------------------------------------------------------------------------------------------

    @method("start", "operate")
    async def start(self, call: Call) -> Any:
        async def start(selection: Selection, *, wait: bool) -> None:
            await self.supervisor.start(selection, asked_by=call.asked_by, wait=wait)

        return await self._each(self._errand(call), start)

    @method("stop", "operate")
    async def stop(self, call: Call) -> Any:
        errand = self._errand(call)
        order = StopOrder(selection.target for selection in errand.selections)

        async def stop(selection: Selection, *, wait: bool) -> None:
            with order.accounting_for(selection.target):
                await order.turn_of(selection.target)
                await selection.target.stop(selection.instances, asked_by=call.asked_by)

        return await self._each(errand, stop, is_long=True)

    @method("restart", "operate")
    async def restart(self, call: Call) -> Any:
        rolling = call.boolean("rolling", False)
        errand = self._errand(call)
        order = StopOrder(selection.target for selection in errand.selections)

        async def restart(selection: Selection, *, wait: bool) -> None:
            with order.accounting_for(selection.target):
                self.supervisor.refuse_while_stopping()
                self.supervisor.refuse_unisolated(selection.target)
                await selection.target.restart(
                    selection.instances, asked_by=call.asked_by, wait=wait, rolling=rolling, order=order
                )

        return await self._each(errand, restart, is_long=True)

    @method("reload", "operate")
    async def reload(self, call: Call) -> Any:
        async def reload(selection: Selection, *, wait: bool) -> Any:
            outcomes = await selection.target.reload(selection.instances, asked_by=call.asked_by)
            return [
                {"name": name, "told_by": outcome.told_by, "took": outcome.took} for name, outcome in outcomes
            ]

        return await self._each(self._errand(call), reload, is_long=True)

    @method("scale", "operate")
    async def scale(self, call: Call) -> Any:
        name, names = call.optional_string("name"), call.strings("names")
        number = call.optional_integer("instances", at_most=MOST_INSTANCES)
        by = call.signed_integer("by", 0, at_most=MOST_INSTANCES)
        wait = call.boolean("wait", True)
        call.finish()
        if (name is None) is (not names):
            raise RequestError("names: give one of `name`, a target, and `names`, any number of them")
        if number is None and by == 0:
            raise RequestError("instances: missing; say how many, or `by` how many more or fewer")
        targets = [self._one(name)] if name is not None else [found.target for found in self._named(names)]
        scaled = await self.supervisor.scale(targets, number, by, asked_by=call.asked_by, wait=wait)
        if len(scaled) == 1 and scaled[0].error is not None:
            raise scaled[0].error
        if name is not None:
            return {"target": scaled[0].target, "instances": scaled[0].instances}
        return {"results": [_scaled(each) for each in scaled]}

    @method("signal", "operate")
    def signal(self, call: Call) -> Any:
        names, wanted = call.strings("names"), call.string("signal")
        call.finish()
        number = _signal_number(wanted)
        sent = []
        for selection in self._named(names):
            running = [i for i in selection.instances if i.pid is not None]
            if not running:
                raise TargetNotRunningError(f"{selection.target.name} has no process to signal")
            sent += [{"instance": i.name, "pid": i.signal(number)} for i in running]
        return {"sent": sent}

    @method("wait", "view")
    async def wait(self, call: Call) -> Any:
        names = call.strings("names")
        what = call.choice("for", ("ready", "running", "stopped"))
        timeout = call.seconds("timeout")
        call.finish()
        began = time.monotonic()
        await self.supervisor.wait_for(self._named(names), what, timeout)
        return {"took": time.monotonic() - began}

    def _errand(self, call: Call) -> Errand:
        names = call.strings("names")
        wait, timeout = call.boolean("wait", True), call.seconds("timeout")
        call.finish()
        return Errand(self._named(names), wait, timeout)

    async def _each(
        self, errand: Errand, work: Callable[..., Awaitable[Any]], *, is_long: bool = False
    ) -> Any:
        """Do one thing to every target named, side by side; with one name its error is the answer.

        Args:
            is_long: even if it does not wait for what comes of it. Then who does not want to wait is answered
                when it has begun, and what goes wrong is in the log.
        """
        selections, wait, timeout = errand
        results: dict[str, dict[str, Any]] = {}
        errors: dict[str, AsyncsupError] = {}

        async def one(selection: Selection) -> None:
            began = time.monotonic()
            name = selection.target.name
            result: dict[str, Any] = {"target": name, "ok": True, "detail": "", "instances": None}
            if is_long and not wait:
                self._begin(name, partial(work, selection, wait=False))
                results[name] = {**result, "detail": "begun", "state": selection.target.state, "took": 0.0}
                return
            try:
                result["instances"] = await work(selection, wait=wait)
            except AsyncsupError as error:
                errors[name] = error
                result |= {"ok": False, "detail": error.message, "code": error.error_code}
            result["state"] = selection.target.state
            result["took"] = time.monotonic() - began
            results[name] = result

        situations: list[str] = []

        def give_up(scope: anyio.CancelScope) -> None:
            late = [s.target for s in selections if s.target.name not in results]
            # Before what has been asked of them is taken back.
            situations.extend(f"{target.name} is {target.situation}" for target in late)
            scope.cancel()

        with anyio.CancelScope() as scope:
            timer = (
                None
                if timeout is None
                else asyncio.get_running_loop().call_later(timeout, partial(give_up, scope))
            )
            try:
                await together(partial(one, selection) for selection in selections)
            finally:
                if timer is not None:
                    timer.cancel()
        if scope.cancelled_caught:
            raise TimeoutExpiredError(f"not done after {timeout:g} s: {', '.join(situations)}")
        if len(selections) == 1 and errors:
            raise next(iter(errors.values()))
        return {"results": [results[selection.target.name] for selection in selections]}

    def _begin(self, name: str, work: Callable[[], Awaitable[Any]]) -> None:
        async def alone() -> None:
            try:
                await work()
            except AsyncsupError as error:
                log.warning("%s: %s", name, error.message)
            except Exception:
                log.exception("%s: what was begun for a client failed unexpectedly", name)

        self._tasks.start_soon(alone)

    def _named(self, names: Sequence[str]) -> list[Selection]:
        if not names:
            raise RequestError('names: give at least one target; "all" means every one')
        return self.supervisor.select(names)

    def _one(self, name: str) -> Target:
        selections = self._named([name])
        if len(selections) != 1:
            raise RequestError(f"name: {name!r} means {len(selections)} targets; give one")
        return selections[0].target

    # --- output ---------------------------------------------------------------------------------------------

    @method("logs", "view")
    async def logs(self, call: Call) -> Any:
        name = call.string("name")
        stream = call.choice("stream", ("stdout", "stderr"), "stdout")
        since = call.moment("since")
        lines = call.optional_integer("lines", at_most=MOST_LINES)
        call.finish()
        if lines is None and since is None:
            lines = DEFAULT_LINES
        instances = [instance for found in self._named([name]) for instance in found.instances]
        limit = _share(len(instances))
        chunks = []
        for instance in instances:
            await anyio.lowlevel.checkpoint()  # reading the files of hundreds takes a while
            output = self.supervisor.stream(instance, stream)
            begin, is_exact = _beginning(output, since, lines)
            chunk = _chunk(output, output.reader.read(begin, limit))
            chunks.append({**chunk, "path": str(output.file.path), "exact": is_exact})
        return {"chunks": chunks}

    @method("logs.follow", "view")
    async def follow(self, call: Call) -> Any:
        cursors = [Cursor.from_json(value) for value in call.array("cursors")]
        timeout = call.seconds("timeout")
        timeout = 25.0 if timeout is None else min(timeout, LONGEST_FOLLOW_SECONDS)
        call.finish()
        pairs = [
            (self.supervisor.stream(self.supervisor.instance(cursor.instance), cursor.stream), cursor)
            for cursor in cursors
        ]
        limit = _share(len(pairs))
        chunks: list[dict[str, Any]] = []
        deadline = asyncio.get_running_loop().time() + timeout
        while pairs and not chunks:
            growths = [output.growth() for output, _ in pairs]
            try:
                for output, cursor in sorted(pairs, key=lambda pair: pair[0].arrived):
                    piece = output.reader.read(cursor, limit)
                    if piece.text:
                        chunks.append(_chunk(output, piece, stream=cursor.stream))
                left = deadline - asyncio.get_running_loop().time()
                if left <= 0:
                    break
                if not chunks:
                    await asyncio.wait(growths, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for growth in growths:
                    growth.cancel()
        return {"chunks": chunks}

    @method("logs.reopen", "operate")
    def reopen(self, call: Call) -> Any:
        names = call.strings("names") or ["all"]
        call.finish()
        return {"paths": self.supervisor.reopen_logs(found.target for found in self._named(names))}

    # --- patches --------------------------------------------------------------------------------------------

    def _source(self, call: Call) -> Source:
        crc32 = call.optional_string("crc32")
        sha256 = call.optional_string("sha256")
        if sha256 is not None:
            _check_sha256("sha256", sha256)
        return self.supervisor.overseer.intake.find(
            path=call.optional_string("path"),
            upload=call.optional_string("upload"),
            name=call.optional_string("name"),
            sha256=sha256.lower() if sha256 is not None else None,
            crc32=parse_crc32(crc32) if crc32 is not None else None,
        )

    @method("patch.upload", "patch")
    def patch_upload(self, call: Call) -> Any:
        upload, encoded = call.optional_string("upload"), call.string("data")
        offset = call.integer("offset", 0, at_most=2**53)
        last = call.boolean("last", False)
        call.finish()
        try:
            data = base64.b64decode(encoded, validate=True)
        except binascii.Error as error:
            raise RequestError(f"data: not base64: {error}") from None
        if len(data) > CHUNK_BYTES:
            raise RequestError(f"data: at most {CHUNK_BYTES} bytes a piece, got {len(data)}")
        return self.supervisor.overseer.uploads.take(upload, offset, data, last=last)

    @method("patch.verify", "patch")
    async def patch_verify(self, call: Call) -> Any:
        source = self._source(call)
        call.finish()
        return await self.supervisor.overseer.verify(source)

    @method("patch.plan", "patch")
    async def patch_plan(self, call: Call) -> Any:
        source, wish = self._source(call), self._wish(call)
        call.finish()
        return await self.supervisor.overseer.planning.plan(source, wish)

    @method("patch.apply", "patch")
    async def patch_apply(self, call: Call) -> Any:
        source, wish = self._source(call), self._wish(call)
        call.finish()
        return await self.supervisor.overseer.apply(source, wish)

    @method("patch.rollback", "patch")
    async def patch_rollback(self, call: Call) -> Any:
        build = call.optional_integer("to_build", at_most=2**53)
        generation = call.optional_integer("to_generation", at_most=2**53)
        way = WayBack(
            reference=call.string("target"),
            extent=Extent(build=build, generation=generation),
            only=call.boolean("only", False),
            together=call.boolean("together", False),
        )
        wish = Wish(actor=call.actor, wait_busy=call.boolean("wait_busy", True), drift=self._policy(call))
        call.finish()
        if (build is not None and generation is not None) or (way.only and way.together):
            raise RequestError("give one of to_build and to_generation, and one of only and together")
        return await self.supervisor.overseer.rollback(way, wish)

    @method("patch.commit", "patch")
    async def patch_commit(self, call: Call) -> Any:
        reference = call.string("id")
        call.finish()
        return await self.supervisor.overseer.commit(reference, actor=call.actor)

    @method("patch.abort", "patch")
    async def patch_abort(self, call: Call) -> Any:
        reference = call.string("id")
        call.finish()
        return await self.supervisor.overseer.abort(reference, actor=call.actor)

    @method("patch.prune", "patch")
    async def patch_prune(self, call: Call) -> Any:
        target, keep = call.optional_string("target"), call.optional_integer("keep", at_most=10_000)
        call.finish()
        return {"pruned": await self.supervisor.overseer.prune(target, keep, actor=call.actor)}

    @method("target.release", "patch")
    async def target_release(self, call: Call) -> Any:
        target = call.string("target")
        call.finish()
        return {"released": await self.supervisor.overseer.release(target, actor=call.actor)}

    def _wish(self, call: Call) -> Wish:
        return Wish(
            actor=call.actor,
            target=call.optional_string("target"),
            wait_busy=call.boolean("wait_busy", True),
            retry_held=call.boolean("retry_held", False),
            trust_clock=call.boolean("trust_clock", False),
            drift=self._policy(call),
        )

    def _policy(self, call: Call) -> Policy | None:
        if call.optional_string("drift") is None:
            return None
        wanted = call.choice("drift", POLICIES)
        return next(policy for policy in POLICIES if policy == wanted)

    @method("patch.drift", "view")
    async def patch_drift(self, call: Call) -> Any:
        target, names = call.optional_string("target"), call.strings("names")
        call.finish()
        if not names:
            return {"targets": await self.supervisor.overseer.drift(target)}
        if target is not None:
            raise RequestError("names: give one of `target`, and `names`, any number of them")
        chosen = [found.target.name for found in self._named(names)]
        if len(chosen) == 1:
            return {"targets": await self.supervisor.overseer.drift(chosen[0])}
        return {"targets": await self.supervisor.overseer.drift(None, among=frozenset(chosen))}

    @method("patch.list", "view")
    async def patch_list(self, call: Call) -> Any:
        call.finish()
        return await self.supervisor.overseer.arrivals.listing()

    @method("patch.history", "view")
    async def patch_history(self, call: Call) -> Any:
        target, limit = call.optional_string("target"), call.integer("limit", 50, at_most=1000)
        call.finish()
        name = self._one(target).name if target is not None else None
        return {"transactions": await self.supervisor.overseer.history(name, limit)}

    @method("patch.show", "view")
    async def patch_show(self, call: Call) -> Any:
        reference = call.string("id")
        call.finish()
        return await self.supervisor.overseer.show(reference)

    # --- the audit ------------------------------------------------------------------------------------------

    @method("audit.verify", "view")
    async def audit_verify(self, call: Call) -> Any:
        heads = call.strings("heads")
        call.finish()
        for head in heads:
            _check_sha256("heads", head)
        return await self.supervisor.overseer.examine_audit([head.lower() for head in heads])

    @method("audit.list", "view")
    async def audit_list(self, call: Call) -> Any:
        after, txn = (call.optional_integer(key, at_most=2**53) for key in ("after", "txn"))
        limit = call.integer("limit", 100, at_most=1000)
        call.finish()
        return await self.supervisor.overseer.audit(after=after, txn=txn, limit=limit)


def _failure_in(request: Request, error: Exception) -> Failure:
    if isinstance(error, AsyncsupError):
        return failure_of(request.id, error)
    log.error("%s failed unexpectedly", request.method, exc_info=error)
    text = f"internal error: {type(error).__name__}: {error}"
    return Failure(id=request.id, number=INTERNAL_ERROR, message=text, data={"code": "internal"})


def failure_of(request_id: RequestId, error: AsyncsupError) -> Failure:
    """The one place where an error becomes a JSON-RPC error object."""
    return Failure(
        id=request_id,
        number=INVALID_PARAMS if isinstance(error, RequestError) else APPLICATION_ERROR,
        message=error.message,
        data={**error.details, "code": error.error_code, "exit_status": error.exit_status},
    )


def _check_sha256(key: str, text: str) -> None:
    if len(text) != 64 or not set(text.lower()) <= set("0123456789abcdef"):
        raise RequestError(f"{key}: must be 64 hexadecimal digits, is {text!r:.80}")


def _signal_number(text: str) -> int:
    name = text.upper()
    try:
        return (
            signal.Signals(int(name)) if name.isdigit() else signal.Signals[f"SIG{name.removeprefix('SIG')}"]
        )
    except (KeyError, ValueError):
        raise RequestError(f"signal: there is no {text!r:.40}; name one such as HUP, SIGUSR1 or 15") from None


def _scaled(each: Scaled) -> dict[str, Any]:
    result = {"target": each.target, "instances": each.instances, "ok": each.error is None, "detail": ""}
    if each.error is not None:
        result |= {"detail": each.error.message, "code": each.error.error_code}
    return result


def _share(streams: int) -> int:
    """Bytes that each of so many streams may have in an answer."""
    return min(READ_BYTES, LOG_ANSWER_BYTES // max(1, streams))


def _beginning(output: OutputStream, since: float | None, lines: int | None) -> tuple[Cursor, bool]:
    """Where output is to be read from; and whether that is exactly what was asked for."""
    reader = output.reader
    tail = None if lines is None else reader.tail(lines)
    if since is None:
        assert tail is not None
        return tail, True
    begin, is_exact = reader.since(since, stamped=output.is_stamped)
    return (begin if tail is None else reader.later(begin, tail)), is_exact


def _chunk(output: OutputStream, piece: Piece, *, stream: str | None = None) -> dict[str, Any]:
    cursor = piece.cursor if stream is None else replace(piece.cursor, stream=stream)
    return {
        "instance": output.instance, "stream": cursor.stream, "text": piece.text,
        "prefix": output.prefix, "cursor": cursor.to_json(), "left": piece.left, "size": piece.size,
        "gap": piece.gap,
    }  # fmt: skip
