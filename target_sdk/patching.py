"""The program's side of a patch: what a handler is given, what it may answer, what goes back on the wire.

Pure: no sockets, no threads, no clock. Where handlers run is `dispatch.py`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from target_sdk.protocol import (
    APPLICATION_ERROR,
    HANDOVER_FAILED,
    INTERNAL_ERROR,
    INVALID_PARAMS,
    METHOD_NOT_FOUND,
    Abort,
    Failure,
    Prepare,
    PrepareAnswer,
    ProtocolError,
    Reload,
    ReloadAnswer,
    Request,
    Result,
    Verdict,
)
from target_sdk.session import CallKey

MAX_TEXT: Final = 2000
"""Characters of a reason or status text that are sent; the rest is cut off."""

MIN_RETRY: Final = 0.01
"""The shortest time (seconds) after which a target can be asked again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """What is about to change (`on_prepare`, `on_abort`), or has just changed (`on_reload`).

    A reload that an operator asked for without a patch has ``id`` None and nothing in ``changed``.
    """

    id: str | None
    build: int
    """The build that the files will have, or have now."""
    changed: tuple[str, ...]
    """The files that differ, relative to the root."""
    root: Path
    kind: str = "warm"
    """``warm``: a reload follows. ``cold``: the program is going to be restarted."""
    rollback: bool = False
    """The build is an older one that the supervisor went back to."""
    deadline: float | None = None
    """In `on_prepare`: seconds that the supervisor waits for the answer."""


def wait(retry_after: float, reason: str = "") -> PrepareAnswer:
    """Not at a point where it can be patched: ask again in ``retry_after`` seconds."""
    if not math.isfinite(retry_after):
        raise ValueError(f"retry_after must be a number of seconds, got {retry_after!r}")
    retry_after = max(MIN_RETRY, float(retry_after))
    return PrepareAnswer(verdict=Verdict.WAIT, retry_after=retry_after, reason=wire_text(reason) or None)


def not_allowed(reason: str) -> PrepareAnswer:
    """Do not apply this patch. The reason is shown to whoever asked for it."""
    return PrepareAnswer(verdict=Verdict.NOT_ALLOWED, reason=wire_text(reason))


PrepareHandler = Callable[[Patch], "PrepareAnswer | bool | Awaitable[PrepareAnswer | bool | None] | None"]
PatchHandler = Callable[[Patch], object]
DrainHandler = Callable[[float], object]


class HandoverError(Exception):
    """Nothing was handed over. The predecessor still has all of it, and the successor has nothing."""

    code = HANDOVER_FAILED


class StoppingError(Exception):
    """The program left its `Target` before the handler had answered."""

    def __init__(self) -> None:
        super().__init__("the program is stopping")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a handler ended: with a value or an error, after ``took`` seconds."""

    value: object = None
    error: BaseException | None = None
    took: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A request of the supervisor on its way to the program's handler (None: there is none for it)."""

    key: CallKey
    method: str
    argument: Patch | float
    handler: Callable[[Any], object] | None

    def answer(self, outcome: Outcome) -> Result | Failure:
        match self.method:
            case Prepare.METHOD:
                return Result(id=self.key.id, result=_prepare_answer(outcome).result())
            case Reload.METHOD:
                return Result(id=self.key.id, result=_reload_answer(outcome).result())
        if isinstance(outcome.error, HandoverError):
            data = {"code": outcome.error.code}
            return Failure(id=self.key.id, number=APPLICATION_ERROR, message=str(outcome.error), data=data)
        if outcome.error is not None:
            return Failure(id=self.key.id, number=INTERNAL_ERROR, message=reason_of(outcome.error))
        return Result(id=self.key.id, result={})

    def succeeded(self, outcome: Outcome) -> bool:
        return outcome.error is None and not (self.method == Reload.METHOD and outcome.value is False)


@dataclass(slots=True, kw_only=True)
class Handlers:
    """The program's functions, and the patch it has been asked about (there is never more than one)."""

    prepare: PrepareHandler | None = None
    reload: PatchHandler | None = None
    abort: PatchHandler | None = None
    drain: DrainHandler | None = None
    handover: Callable[[Any], object] | None = None
    _offered: Patch | None = None

    def all(self) -> list[Callable[[Any], object]]:
        every = (self.prepare, self.reload, self.abort, self.drain, self.handover)
        return [handler for handler in every if handler is not None]

    def call_for(self, key: CallKey, request: Request, root: Path) -> Call:
        """Find what a request is for.

        Raises:
            ProtocolError: the method is unknown or its parameters are of a wrong type.
        """
        handler: Callable[[Any], object] | None
        argument: Patch | float
        match request.method:
            case Prepare.METHOD:
                argument = self._offer(Prepare.from_params(request.params), root)
                handler = self.prepare
            case Reload.METHOD:
                argument = self._take_up(Reload.from_params(request.params))
                handler = self.reload
            case Abort.METHOD:
                abort = Abort.from_params(request.params)
                # One we were never asked about was never begun here: there is nothing to abort.
                offered = self._settle(abort.patch)
                argument = offered or Patch(id=abort.patch, build=0, changed=(), root=root)
                handler = None if offered is None else self.abort
            case "drain":
                argument = _deadline(request)
                handler = self.drain
            case _:
                raise ProtocolError(f"unknown method {request.method!r}", number=METHOD_NOT_FOUND)
        return Call(key=key, method=request.method, argument=argument, handler=handler)

    def call_off(self) -> Call | None:
        """The supervisor is gone, and with it the patch it had asked about; its successor begins anew."""
        offered, self._offered = self._offered, None
        if offered is None or self.abort is None:
            return None
        # Nobody waits for an answer, and none is sent: no request has this key.
        key = CallKey(id="", digest=b"")
        return Call(key=key, method=Abort.METHOD, argument=offered, handler=self.abort)

    def _settle(self, patch_id: str | None) -> Patch | None:
        """Forget the patch we were asked about, if it is this one."""
        offered = self._offered
        if offered is None or offered.id != patch_id:
            return None
        self._offered = None
        return offered

    def _offer(self, prepare: Prepare, root: Path) -> Patch:
        patch = Patch(
            id=prepare.patch,
            build=prepare.build,
            changed=tuple(prepare.changed),
            root=root,
            kind=prepare.kind,
            deadline=prepare.deadline,
        )
        self._offered = patch
        return patch

    def _take_up(self, reload: Reload) -> Patch:
        self._settle(reload.patch)
        return Patch(
            id=reload.patch,
            build=reload.build,
            changed=tuple(reload.changed),
            root=Path(reload.root),
            rollback=reload.rollback,
        )


def check_handler(event: str, handler: Callable[[Any], object]) -> None:
    """Find out at start-up, not at the first patch, that a handler cannot be called.

    Raises:
        TypeError: it does not take exactly one argument.
    """
    try:
        signature = inspect.signature(handler)
    except ValueError:
        return  # some callables written in C do not tell
    try:
        signature.bind(None)
    except TypeError:
        raise TypeError(f"{event}: the handler must take one argument, but is {signature}") from None


def is_async(handler: Callable[[Any], object]) -> bool:
    return inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(type(handler).__call__)


def reason_of(error: BaseException) -> str:
    if isinstance(error, StoppingError):
        return str(error)
    return wire_text(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)


def wire_text(text: str) -> str:
    """Make any text fit to be sent: no lone surrogates (file names may hold them), at most `MAX_TEXT`."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


def _prepare_answer(outcome: Outcome) -> PrepareAnswer:
    """Only a clear yes is a yes: whatever else a handler does, the patch is not applied over its head."""
    if outcome.error is not None:
        return not_allowed(reason_of(outcome.error))
    match outcome.value:
        case None | True:
            return PrepareAnswer(verdict=Verdict.GO_AHEAD)
        case PrepareAnswer():
            return outcome.value
        case False:
            return not_allowed("the program said no")
    return not_allowed(f"the program's prepare handler returned {outcome.value!r}")


def _reload_answer(outcome: Outcome) -> ReloadAnswer:
    if outcome.error is not None:
        return ReloadAnswer(ok=False, took=outcome.took, reason=reason_of(outcome.error))
    if outcome.value is False:
        return ReloadAnswer(ok=False, took=outcome.took, reason="the program's reload handler returned False")
    return ReloadAnswer(ok=True, took=outcome.took)


def _deadline(request: Request) -> float:
    value = request.params.get("deadline")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ProtocolError("deadline must be a number", number=INVALID_PARAMS)
    return float(value)
