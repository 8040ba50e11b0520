"""The wire messages between supervisor, clients and targets, defined once. Pure: bytes in, values out.

Every message is one JSON-RPC 2.0 object (https://www.jsonrpc.org/specification), encoded as UTF-8 JSON in
one ZeroMQ frame. Requests go both ways on the target channel; each side numbers its own. ``docs/protocol.md``
specifies the same for implementers in other languages, and a test holds the two together byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Final, TypeVar

import orjson

PROTOCOL_VERSION: Final = 1
MAX_MESSAGE_BYTES: Final = 1 << 20
"""No frame is larger; a peer that sends more is disconnected."""

MAX_FRAMES: Final = 4
"""No multipart message has more frames (identity and delimiter included)."""

# JSON-RPC's reserved error numbers, and the one asyncsup answers with for an error of its own. The number is
# for JSON-RPC libraries; programs look at ``error.data.code``.
PARSE_ERROR: Final = -32700
INVALID_REQUEST: Final = -32600
METHOD_NOT_FOUND: Final = -32601
INVALID_PARAMS: Final = -32602
INTERNAL_ERROR: Final = -32603
APPLICATION_ERROR: Final = -32000

# The environment an instance is started with.
ENV_ENDPOINT: Final = "ASYNCSUP_TARGET_ENDPOINT"
ENV_TOKEN: Final = "ASYNCSUP_TOKEN"
ENV_NAME: Final = "ASYNCSUP_NAME"
ENV_INSTANCE: Final = "ASYNCSUP_INSTANCE"
ENV_REGION: Final = "ASYNCSUP_REGION"
ENV_BUILD: Final = "ASYNCSUP_BUILD"
ENV_ROOT: Final = "ASYNCSUP_ROOT"
ENV_CURRENT: Final = "ASYNCSUP_CURRENT"
ENV_HANDOVER: Final = "ASYNCSUP_HANDOVER"

T = TypeVar("T")

RequestId = int | str
Params = Mapping[str, Any]


class ProtocolError(Exception):
    """A frame is not a valid message.

    Args:
        number: the JSON-RPC error number to answer with.
        request_id: the id of the request at fault, where it could still be read.
    """

    def __init__(
        self, message: str, *, number: int = INVALID_REQUEST, request_id: RequestId | None = None
    ) -> None:
        super().__init__(message)
        self.number = number
        self.request_id = request_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A call that wants an answer with the same ``id``."""

    id: RequestId
    method: str
    params: Params = field(default_factory=dict)

    def encode(self) -> bytes:
        return to_json({"jsonrpc": "2.0", "id": self.id, "method": self.method, "params": self.params})


@dataclass(frozen=True, slots=True, kw_only=True)
class Notification:
    """A call that wants no answer."""

    method: str
    params: Params = field(default_factory=dict)

    def encode(self) -> bytes:
        return to_json({"jsonrpc": "2.0", "method": self.method, "params": self.params})


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The answer to a request that succeeded."""

    id: RequestId
    result: Any

    def encode(self) -> bytes:
        return to_json({"jsonrpc": "2.0", "id": self.id, "result": self.result})


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The answer to a request that failed; ``id`` is None when the request's own could not be read."""

    id: RequestId | None
    number: int
    message: str
    data: Mapping[str, Any] | None = None

    def encode(self) -> bytes:
        error: dict[str, Any] = {"code": self.number, "message": self.message}
        if self.data is not None:
            error["data"] = self.data
        return to_json({"jsonrpc": "2.0", "id": self.id, "error": error})


Message = Request | Notification | Result | Failure


def to_json(value: Any, *, option: int | None = None) -> bytes:
    """A value as orjson encodes it. Names of files need not be text: what is none of a text is written out
    (``\\udcff``).

    Raises:
        TypeError: there is something in it that JSON does not have.
    """
    try:
        return orjson.dumps(value, option=option)
    except orjson.JSONEncodeError:
        return orjson.dumps(_text_only(value), option=option)


def _text_only(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_text_only(key): _text_only(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_text_only(item) for item in value]
    return value


def decode(frame: bytes) -> Message:
    """Read one frame.

    Raises:
        ProtocolError: it is not JSON, not JSON-RPC 2.0, or a batch (which asyncsup does not take).
    """
    if len(frame) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"message of {len(frame)} bytes exceeds {MAX_MESSAGE_BYTES}")
    try:
        value = orjson.loads(frame)
    except orjson.JSONDecodeError as error:
        raise ProtocolError(f"not JSON: {error}", number=PARSE_ERROR) from None
    if not isinstance(value, dict):
        raise ProtocolError(f"expected a JSON-RPC 2.0 object, got {_json_type(value)}")
    request_id = value.get("id")
    if isinstance(request_id, bool) or not isinstance(request_id, int | str | None):
        raise ProtocolError(f"id must be an integer or a string, got {_json_type(request_id)}")
    if value.get("jsonrpc") != "2.0":
        raise ProtocolError('jsonrpc must be "2.0"', request_id=request_id)
    if "method" in value:
        return _decode_call(value, request_id)
    return _decode_answer(value, request_id)


def _decode_call(value: dict[str, Any], request_id: RequestId | None) -> Request | Notification:
    method, params = value["method"], value.get("params", {})
    if not isinstance(method, str):
        raise ProtocolError(f"method must be a string, got {_json_type(method)}", request_id=request_id)
    if not isinstance(params, dict):
        raise ProtocolError(
            f"params must be an object, got {_json_type(params)}",
            number=INVALID_PARAMS,
            request_id=request_id,
        )
    if request_id is None:
        return Notification(method=method, params=params)
    return Request(id=request_id, method=method, params=params)


def _decode_answer(value: dict[str, Any], request_id: RequestId | None) -> Result | Failure:
    if "error" in value:
        error = value["error"]
        if not isinstance(error, dict):
            raise ProtocolError(f"error must be an object, got {_json_type(error)}", request_id=request_id)
        number, message, data = error.get("code"), error.get("message"), error.get("data")
        if isinstance(number, bool) or not isinstance(number, int) or not isinstance(message, str):
            raise ProtocolError("error needs an integer code and a string message", request_id=request_id)
        return Failure(
            id=request_id, number=number, message=message, data=data if isinstance(data, dict) else None
        )
    if "result" not in value:
        raise ProtocolError("expected one of method, result, error", request_id=request_id)
    if request_id is None:
        raise ProtocolError("a result needs the id of its request")
    return Result(id=request_id, result=value["result"])


def _json_type(value: object) -> str:
    if value is None:
        return "null"
    for kind, name in ((bool, "a boolean"), (int, "a number"), (float, "a number"), (str, "a string")):
        if isinstance(value, kind):
            return name
    return "an array" if isinstance(value, list) else "an object"


# --- the target channel -------------------------------------------------------------------------------------


class Verdict(StrEnum):
    """A target's answer to `prepare` (the prototype's GO_AHEAD 0, NOT_ALLOWED 1, WAIT 2)."""

    GO_AHEAD = "go_ahead"
    WAIT = "wait"
    NOT_ALLOWED = "not_allowed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """Instance to supervisor, first and again after each reconnect: who is speaking.

    The token alone identifies the instance; everything else is for people and for checks.
    """

    token: str
    pid: int
    sdk: str
    protocol: int = PROTOCOL_VERSION
    name: str | None = None
    build: int | None = None
    region: str | None = None

    METHOD: ClassVar[str] = "hello"

    def params(self) -> dict[str, Any]:
        return {
            "token": self.token, "pid": self.pid, "sdk": self.sdk, "protocol": self.protocol,
            "name": self.name, "build": self.build, "region": self.region,
        }  # fmt: skip

    @classmethod
    def from_params(cls, params: Params) -> Hello:
        return cls(
            token=_string(params, "token"),
            pid=_integer(params, "pid"),
            sdk=_string(params, "sdk"),
            protocol=_integer(params, "protocol"),
            name=_optional(params, "name", _string),
            build=_optional(params, "build", _integer),
            region=_optional(params, "region", _string),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepare:
    """Supervisor to instance: may this patch be applied now? Answered by a `PrepareAnswer`.

    ``deadline`` is how many seconds the supervisor waits for the answer; ``changed`` are paths relative to
    the root.
    """

    patch: str
    kind: str
    build: int
    region: str
    changed: Sequence[str]
    deadline: float

    METHOD: ClassVar[str] = "prepare"

    def params(self) -> dict[str, Any]:
        return {
            "patch": self.patch, "kind": self.kind, "build": self.build, "region": self.region,
            "changed": list(self.changed), "deadline": self.deadline,
        }  # fmt: skip

    @classmethod
    def from_params(cls, params: Params) -> Prepare:
        return cls(
            patch=_string(params, "patch"),
            kind=_string(params, "kind"),
            build=_integer(params, "build"),
            region=_string(params, "region"),
            changed=_strings(params, "changed"),
            deadline=_number(params, "deadline"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareAnswer:
    """``retry_after`` (seconds) goes with ``wait``, ``reason`` with ``wait`` and ``not_allowed``."""

    verdict: Verdict
    retry_after: float | None = None
    reason: str | None = None

    def result(self) -> dict[str, Any]:
        value: dict[str, Any] = {"verdict": self.verdict.value}
        if self.retry_after is not None:
            value["retry_after"] = self.retry_after
        if self.reason is not None:
            value["reason"] = self.reason
        return value

    @classmethod
    def from_result(cls, value: Any) -> PrepareAnswer:
        params = _object(value)
        try:
            verdict = Verdict(_string(params, "verdict"))
        except ValueError:
            raise ProtocolError(f"verdict: unknown value {params['verdict']!r}") from None
        return cls(
            verdict=verdict,
            retry_after=_optional(params, "retry_after", _number),
            reason=_optional(params, "reason", _string),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reload:
    """Supervisor to instance: the files are now those of ``build``; take them up.

    ``patch`` is None for a `reload` an operator asked for, without a patch. ``rollback`` says that the build
    is an older one that the supervisor went back to.
    """

    patch: str | None
    build: int
    root: str
    changed: Sequence[str]
    rollback: bool = False

    METHOD: ClassVar[str] = "reload"

    def params(self) -> dict[str, Any]:
        return {
            "patch": self.patch, "build": self.build, "root": self.root,
            "changed": list(self.changed), "rollback": self.rollback,
        }  # fmt: skip

    @classmethod
    def from_params(cls, params: Params) -> Reload:
        rollback = params.get("rollback", False)
        if not isinstance(rollback, bool):
            raise ProtocolError("rollback must be a boolean", number=INVALID_PARAMS)
        return cls(
            patch=_optional(params, "patch", _string),
            build=_integer(params, "build"),
            root=_string(params, "root"),
            changed=_strings(params, "changed"),
            rollback=rollback,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReloadAnswer:
    """``ok`` with the seconds it ``took``, or not ok with a ``reason``."""

    ok: bool
    took: float = 0.0
    reason: str | None = None

    def result(self) -> dict[str, Any]:
        if self.ok:
            return {"verdict": "ok", "took": self.took}
        return {"verdict": "failed", "took": self.took, "reason": self.reason}

    @classmethod
    def from_result(cls, value: Any) -> ReloadAnswer:
        params = _object(value)
        verdict = _string(params, "verdict")
        if verdict not in {"ok", "failed"}:
            raise ProtocolError(f"verdict: unknown value {verdict!r}")
        return cls(
            ok=verdict == "ok",
            took=_number(params, "took"),
            reason=_optional(params, "reason", _string),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """Supervisor to instance: the patch that was prepared will not come. Answered by ``{}``."""

    patch: str

    METHOD: ClassVar[str] = "abort"

    def params(self) -> dict[str, Any]:
        return {"patch": self.patch}

    @classmethod
    def from_params(cls, params: Params) -> Abort:
        return cls(patch=_string(params, "patch"))


# --- the hand-over, from an instance to its successor -------------------------------------------------------

COMMIT: Final = "commit"
"""Successor to predecessor: all has arrived and is the successor's from here on."""

REFUSE: Final = "refuse"
"""Successor to predecessor, with a ``reason``: it takes nothing."""

HANDOVER_FAILED: Final = "handover.failed"
"""The code of the answer to `drain` of a predecessor that still has everything, and goes on with it."""

MAX_HANDOVER_PACKET: Final = 1 << 16
"""Bytes of one packet, its kind included."""

MAX_HANDOVER_DESCRIPTORS: Final = 253
"""Descriptors that go with one packet (the kernel's SCM_MAX_FD)."""

DESCRIPTORS: Final = b"D"
"""The kind of a packet that descriptors come with."""

DATA: Final = b"B"
"""The kind of a packet of data, which follows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeOver:
    """Successor to predecessor, as the first packet: who waits for what there is to take over."""

    pid: int
    protocol: int = PROTOCOL_VERSION
    build: int | None = None

    METHOD: ClassVar[str] = "take_over"

    def params(self) -> dict[str, Any]:
        return {"pid": self.pid, "protocol": self.protocol, "build": self.build}

    @classmethod
    def from_params(cls, params: Params) -> TakeOver:
        return cls(
            pid=_integer(params, "pid"),
            protocol=_integer(params, "protocol"),
            build=_optional(params, "build", _integer),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """Predecessor to successor: how many descriptors and bytes of data follow."""

    descriptors: int
    size: int

    METHOD: ClassVar[str] = "offer"

    def params(self) -> dict[str, Any]:
        return {"descriptors": self.descriptors, "size": self.size}

    @classmethod
    def from_params(cls, params: Params) -> Offer:
        return cls(descriptors=_integer(params, "descriptors"), size=_integer(params, "size"))


def _object(value: Any) -> Params:
    if not isinstance(value, dict):
        raise ProtocolError(f"expected an object, got {_json_type(value)}", number=INVALID_PARAMS)
    return value


def _string(params: Params, key: str) -> str:
    value = params.get(key)
    if not isinstance(value, str):
        raise ProtocolError(f"{key} must be a string, got {_json_type(value)}", number=INVALID_PARAMS)
    return value


def _integer(params: Params, key: str) -> int:
    value = params.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ProtocolError(f"{key} must be an integer, got {_json_type(value)}", number=INVALID_PARAMS)
    return value


def _number(params: Params, key: str) -> float:
    value = params.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ProtocolError(f"{key} must be a number, got {_json_type(value)}", number=INVALID_PARAMS)
    return float(value)


def _strings(params: Params, key: str) -> tuple[str, ...]:
    value = params.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ProtocolError(f"{key} must be an array of strings", number=INVALID_PARAMS)
    return tuple(value)


def _optional(params: Params, key: str, read: Callable[[Params, str], T]) -> T | None:
    return None if params.get(key) is None else read(params, key)
