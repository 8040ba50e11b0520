"""`Target`: what a program imports."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypeVar

from target_sdk import protocol
from target_sdk.connection import Connection
from target_sdk.dispatch import PendingDispatcher, ThreadDispatcher
from target_sdk.patching import (
    Call,
    DrainHandler,
    Handlers,
    Outcome,
    Patch,
    PatchHandler,
    PrepareHandler,
    check_handler,
    is_async,
    wire_text,
)
from target_sdk.protocol import Failure, Hello, ProtocolError, Reload, Request, Result, TakeOver
from target_sdk.session import CallKey
from target_sdk.snapshot import Snapshot

if TYPE_CHECKING:
    from target_sdk.handover import Predecessor, Successor, Taking
    from target_sdk.loop import LoopDispatcher

__version__ = "0.1.0"

MAX_EXTEND: Final = 86_400.0
"""Seconds; the supervisor grants no more at once."""

PrepareT = TypeVar("PrepareT", bound=PrepareHandler)
PatchT = TypeVar("PatchT", bound=PatchHandler)
DrainT = TypeVar("DrainT", bound=DrainHandler)
HandoverT = TypeVar("HandoverT", bound=Callable[["Successor"], object])
HandlerT = TypeVar("HandlerT", bound=Callable[[Any], object])

logger = logging.getLogger("target_sdk")

_connected: set[tuple[int, str]] = set()
"""Process id and token of every target that is entered: two would answer for each other."""
_connected_lock = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What the supervisor tells an instance at its start. All None without asyncsup."""

    endpoint: str | None
    token: str | None
    name: str | None
    instance: str | None
    region: str | None
    build: int | None
    root: Path | None
    current: Path | None
    handover: Path | None

    @classmethod
    def from_mapping(cls, values: Mapping[str, str]) -> Environment:
        def path(key: str) -> Path | None:
            return Path(values[key]) if values.get(key) else None

        build = values.get(protocol.ENV_BUILD) or "0"
        return cls(
            endpoint=values.get(protocol.ENV_ENDPOINT) or None,
            token=values.get(protocol.ENV_TOKEN) or None,
            name=values.get(protocol.ENV_NAME) or None,
            instance=values.get(protocol.ENV_INSTANCE) or None,
            region=values.get(protocol.ENV_REGION) or None,
            # 0 is what a target has that never said a build and was never patched.
            build=int(build) or None if build.isdecimal() else None,
            root=path(protocol.ENV_ROOT),
            current=path(protocol.ENV_CURRENT),
            handover=path(protocol.ENV_HANDOVER),
        )


class Target:
    """This program, as a target of asyncsup.

    Enter it with ``async with`` in an asyncio program (also under anyio) or with ``with`` in any other, once.
    Without asyncsup (its variables are not in the environment) everything is a quiet no-op, and `snapshot`
    reads the plain folder. The same holds in a child made by ``os.fork()``: the connection is the parent's.

    Every method may be called from any thread, before, while and after the target is entered, and returns at
    once, except `run_pending`.

    Args:
        build: the build of the files this program came with. What the supervisor knows counts for more.
        root: the folder that patches change, for runs without asyncsup (default: the working directory).
        handlers: where handlers run. ``"program"``: on the event loop with ``async with``, in `run_pending`
            with ``with``. ``"thread"``: in a thread of the SDK, beside the program.
    """

    def __init__(
        self,
        *,
        build: int | None = None,
        root: str | os.PathLike[str] | None = None,
        handlers: Literal["program", "thread"] = "program",
    ) -> None:
        if handlers not in {"program", "thread"}:
            raise ValueError(f'handlers must be "program" or "thread", got {handlers!r}')
        self._environment = Environment.from_mapping(os.environ)
        self._build = self._environment.build or build
        self._root = self._environment.root or Path(root or ".").absolute()
        self._mode = handlers
        self._handlers = Handlers()
        self._pid: int | None = None  # of the process that entered the target
        self._connection: Connection | None = None
        self._dispatcher: PendingDispatcher | LoopDispatcher | None = None
        self._predecessor: Predecessor | None = None
        self._reports: dict[str, tuple[Callable[[], protocol.Params], bool]] = {}
        self._lock = threading.RLock()  # reentrant: a signal handler may report, too
        self._stopping = False

    # --- what is known -------------------------------------------------------------------------------------

    @property
    def managed(self) -> bool:
        """Whether asyncsup started this program, and this is not a forked child of it."""
        environment = self._environment
        return environment.endpoint is not None and environment.token is not None and not self._forked()

    @property
    def name(self) -> str:
        """The target's name in asyncsup's configuration; without asyncsup the name of the script."""
        return self._environment.name or Path(sys.argv[0]).stem

    @property
    def instance(self) -> str | None:
        """Which of the target's processes this is."""
        return self._environment.instance

    @property
    def region(self) -> str | None:
        return self._environment.region

    @property
    def root(self) -> Path:
        """The folder that patches change."""
        return self._root

    @property
    def build(self) -> int | None:
        """The build this program runs on: of its start, then of the last reload that succeeded."""
        return self._build

    # --- handlers ------------------------------------------------------------------------------------------

    def on_prepare(self, handler: PrepareT) -> PrepareT:
        """Decorator. May this patch be applied now? None or True: go ahead; else `wait` or `not_allowed`.

        Without such a handler the answer is go ahead. An exception means not allowed.
        """
        self._register("on_prepare", handler, self._handlers.prepare)
        self._handlers.prepare = handler
        return handler

    def on_reload(self, handler: PatchT) -> PatchT:
        """Decorator. The files have changed: take them up. An exception undoes the patch, with it as reason.

        Without such a handler the answer is yes: right for a program that reads its files each time.
        """
        self._register("on_reload", handler, self._handlers.reload)
        self._handlers.reload = handler
        return handler

    def on_abort(self, handler: PatchT) -> PatchT:
        """Decorator. The patch that `on_prepare` was asked about does not come, whatever it had answered.

        Also called when the supervisor went away in between: nobody would come to say so.
        """
        self._register("on_abort", handler, self._handlers.abort)
        self._handlers.abort = handler
        return handler

    def on_drain(self, handler: DrainT) -> DrainT:
        """Decorator. Finish what is in flight and take no more: a successor is ready.

        The handler is given the seconds it has.
        """
        self._register("on_drain", handler, self._handlers.drain)
        self._handlers.drain = handler
        return handler

    def on_handover(self, handler: HandoverT) -> HandoverT:
        """Decorator. Give the `Successor` what this process has: open connections, data in memory.

        Called when the supervisor asks this process to drain and its successor waits in `take_over`, before
        the handler for drain. If nothing could be handed over, the drain has failed: that handler is not
        called, and this process goes on.
        """
        self._register("on_handover", handler, self._handlers.handover)
        self._handlers.handover = handler
        return handler

    def take_over(self, *, timeout: float | None = None) -> Taking:
        """Take over what the predecessor of this process gives; see `Taking`. Needs an entered target.

        Where there is a predecessor this says `ready`, because only then is that one asked to drain. Without
        one, or without asyncsup, it gives None at once. Call it at each start if there is a handler for
        `on_handover`: it also lets this process be found by its own successor.

        Args:
            timeout: seconds to wait for the predecessor to begin (None: for ever).
        """
        if self._pid is None:
            raise RuntimeError("take_over() is for a target that was entered")
        from target_sdk.handover import Taking  # noqa: PLC0415 - most programs hand nothing over

        return Taking(
            self._environment.handover if self.managed else None,
            TakeOver(pid=os.getpid(), build=self._build),
            waiting=self.ready,
            through=self._listen_for_successor,
            timeout=timeout,
        )

    def run_pending(self, timeout: float | None = 0.0) -> int:
        """Run the handlers that the supervisor waits for, here and now; for programs that use ``with``.

        Call it at a point where the program can be patched, often enough for `ack_timeout`. It can serve as
        the program's sleep: it waits for the whole timeout when there is nothing to do, without asyncsup too.

        Args:
            timeout: how long to wait while there is nothing to run (seconds; None: for ever).
        Returns:
            how many handlers were run.
        Raises:
            RuntimeError: the target was not entered, or its handlers run elsewhere.
        """
        if not isinstance(self._dispatcher, PendingDispatcher) or self._mode == "thread":
            raise RuntimeError(
                "run_pending() is for a target that was entered by `with` and has no other place for handlers"
            )
        if self._forked():
            if timeout is None:
                threading.Event().wait()
            else:
                time.sleep(timeout)
            return 0
        return self._dispatcher.run_pending(timeout)

    # --- reports -------------------------------------------------------------------------------------------

    def ready(self) -> None:
        """The program does what it is there for. Said again by itself whenever the supervisor needs it."""
        self._report("ready", lambda: {"build": self._build}, lasting=True)

    def status(self, text: str) -> None:
        """One line for people, shown by `asyncsup status`. The latest counts."""
        line = wire_text(text)
        self._report("status", lambda: {"text": line}, lasting=True)

    def failed(self, reason: str) -> None:
        """The program cannot do its work with what it has. Within the probation of a patch this undoes it.

        For what turns out after a reload handler has returned, or after `ready`; whatever shows within the
        handler is simply raised there. Later it is told to the operator and nothing else follows. `ready`
        takes it back.
        """
        text = wire_text(reason)
        self._report("failed", lambda: {"reason": text}, lasting=False)

    def extend(self, seconds: float) -> None:
        """Ask for this much more time (seconds, from now) in whatever the supervisor waits for."""
        if not 0 < seconds <= MAX_EXTEND:
            raise ValueError(f"seconds must be more than 0 and at most {MAX_EXTEND:g}, got {seconds!r}")
        self._report("extend", lambda: {"seconds": seconds}, lasting=False)

    def stopping(self) -> None:
        """The program is about to end by itself. Leaving the target says so, too."""
        if not self._stopping:
            self._stopping = True
            self._report("stopping", dict, lasting=True)

    def snapshot(self) -> Snapshot:
        """The files as they are in one moment, see `Snapshot`. Needs no connection."""
        return Snapshot(root=self._root, current=self._environment.current)

    # --- entering and leaving ------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if self._mode == "program" and _loop_is_running():
            raise RuntimeError("in an asyncio program a target is entered by `async with`")
        self._refuse_async_handlers("a target with async handlers is entered by `async with`")
        if self._mode == "thread":
            self._enter(lambda: ThreadDispatcher(self._finish) if self.managed else None)
        else:
            self._enter(lambda: PendingDispatcher(self._finish))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._forked():
            return
        self.stopping()
        if isinstance(self._dispatcher, PendingDispatcher):
            self._dispatcher.close()
        self._disconnect()

    async def __aenter__(self) -> Self:
        if self._mode == "thread":
            self._refuse_async_handlers('async handlers cannot run with handlers="thread"')
            self._enter(lambda: ThreadDispatcher(self._finish) if self.managed else None)
            return self
        if not _loop_is_running():
            raise RuntimeError(
                "`async with target` needs asyncio (anyio's asyncio backend included); elsewhere use "
                '`with target` and Target(handlers="thread")'
            )
        from target_sdk.loop import LoopDispatcher  # noqa: PLC0415 - a threaded program needs no asyncio

        self._enter(lambda: LoopDispatcher(self._finish) if self.managed else None)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._forked():
            return
        self.stopping()
        try:
            if isinstance(self._dispatcher, PendingDispatcher):
                self._dispatcher.close()
            elif self._dispatcher is not None:
                await self._dispatcher.close()
        finally:
            self._disconnect()

    # --- inside --------------------------------------------------------------------------------------------

    def _enter(self, dispatcher: Callable[[], PendingDispatcher | LoopDispatcher | None]) -> None:
        if self._pid is not None:
            raise RuntimeError("a target is entered once")
        endpoint, token = self._environment.endpoint, self._environment.token
        if endpoint is not None and token is not None:
            _claim(token)
        self._pid = os.getpid()
        self._dispatcher = dispatcher()
        if endpoint is None or token is None:
            return
        with self._lock:
            self._connection = Connection(endpoint, hello=self._hello, serve=self._serve, lost=self._lost)
            for method, (params, lasting) in self._reports.items():
                self._connection.report(method, params, lasting=lasting)

    def _disconnect(self) -> None:
        if self._predecessor is not None:
            self._predecessor.close()
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
            with _connected_lock:
                _connected.discard((os.getpid(), self._environment.token or ""))

    def _forked(self) -> bool:
        return self._pid is not None and self._pid != os.getpid()

    def _register(
        self, event: str, handler: Callable[[Any], object], registered: Callable[[Any], object] | None
    ) -> None:
        check_handler(event, handler)
        if registered is not None:
            raise RuntimeError(f"{event}: there is a handler already: {registered!r}")
        if self._pid is not None:
            raise RuntimeError(f"{event}: register handlers before the target is entered")

    def _refuse_async_handlers(self, message: str) -> None:
        for handler in self._handlers.all():
            if is_async(handler):
                raise TypeError(f"{message}: {handler!r}")

    def _report(self, method: str, params: Callable[[], protocol.Params], *, lasting: bool) -> None:
        if not self.managed:
            return
        with self._lock:
            if self._connection is not None:
                self._connection.report(method, params, lasting=lasting)
            else:
                self._reports[method] = (params, lasting)

    def _hello(self) -> Hello:
        environment = self._environment
        return Hello(
            token=environment.token or "",
            pid=os.getpid(),
            sdk=f"python/{__version__}",
            name=environment.name,
            build=self._build,
            region=environment.region,
        )

    def _serve(self, key: CallKey, request: Request) -> Result | Failure | None:
        """Take a request of the supervisor, on the I/O thread."""
        try:
            call = self._handlers.call_for(key, request, self._root)
        except ProtocolError as error:
            return Failure(id=request.id, number=error.number, message=str(error))
        if call.method == "drain" and self._handlers.handover is not None:
            from target_sdk.handover import Drainer  # noqa: PLC0415

            drainer = Drainer(self._successor, self._handlers.handover, self._handlers.drain)
            in_loop = not isinstance(self._dispatcher, PendingDispatcher)
            call = replace(call, handler=drainer.run_async if in_loop else drainer)
        if call.handler is None:
            return self._conclude(call, Outcome())
        assert self._dispatcher is not None
        self._dispatcher.submit(call)
        return None

    def _listen_for_successor(self) -> None:
        path = self._environment.handover
        if (
            not self.managed
            or path is None
            or self._handlers.handover is None
            or self._predecessor is not None
        ):
            return
        from target_sdk.handover import Predecessor  # noqa: PLC0415

        try:
            self._predecessor = Predecessor(path)
        except OSError as error:
            logger.warning("a successor could not take over: cannot listen at %s: %s", path, error)

    def _successor(self) -> Successor | None:
        if self._predecessor is None:
            logger.warning("no successor can take over: take_over() was not called, waits or has failed")
            return None
        return self._predecessor.successor()

    def _lost(self) -> None:
        """There is no connection any more, on the I/O thread."""
        call = self._handlers.call_off()
        if call is not None and self._dispatcher is not None:
            self._dispatcher.submit(call)

    def _finish(self, call: Call, outcome: Outcome) -> None:
        """A handler has ended, on whatever thread it ran."""
        answer = self._conclude(call, outcome)
        with self._lock:  # a first request may come before the thread that entered has got this far
            connection = self._connection
        if connection is not None:
            connection.answer(call.key, answer)

    def _conclude(self, call: Call, outcome: Outcome) -> Result | Failure:
        if call.method == Reload.METHOD and call.succeeded(outcome) and isinstance(call.argument, Patch):
            self._build = call.argument.build
        return call.answer(outcome)


def _claim(token: str) -> None:
    with _connected_lock:
        if (os.getpid(), token) in _connected:
            raise RuntimeError("this process has entered a target already; there is one per process")
        _connected.add((os.getpid(), token))


def _loop_is_running() -> bool:
    asyncio = sys.modules.get("asyncio")  # a program that has not imported it runs no loop
    if asyncio is None:
        return False
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
