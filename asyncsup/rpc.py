"""What goes over the control socket, as a client sees it. Pure: values to bytes, bytes to values and errors.

The supervisor's side of the same is in `target_sdk.protocol`; this one takes the standard library's JSON,
which a process that asks one question and ends has sooner than a faster one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from asyncsup.errors import AsyncsupError, RemoteError, SupervisorUnreachableError, TimeoutExpiredError

Params = Mapping[str, Any]


def exit_status_of(error: AsyncsupError) -> int:
    """What a command that ends with ``error`` exits with; for a `RemoteError`, what the supervisor said."""
    return error.remote_exit_status if isinstance(error, RemoteError) else error.exit_status


def encode_request(request_id: int, method: str, params: Params) -> bytes:
    given = {name: value for name, value in params.items() if value is not None}
    request = {"jsonrpc": "2.0", "id": request_id, "method": method, "params": given}
    return json.dumps(request, separators=(",", ":")).encode()


def decode(frame: bytes) -> Mapping[str, Any] | None:
    """One JSON-RPC object, or None for what is none: it cannot be the answer to anything."""
    try:
        value = json.loads(frame)
    except ValueError:
        return None
    return value if isinstance(value, dict) and value.get("jsonrpc") == "2.0" else None


def result_of(answer: Mapping[str, Any]) -> Any:
    """Raises RemoteError, with the supervisor's code, exit status and details."""
    if "error" not in answer:
        return answer.get("result")
    error = answer["error"] if isinstance(answer["error"], dict) else {}
    data = error.get("data")
    details = dict(data) if isinstance(data, dict) else {}
    number = error.get("code")
    # JSON-RPC's own numbers are about the request; a program that asks wrongly is a usage error.
    ours = number in {-32700, -32600, -32601, -32602}
    code = details.pop("code", "request.invalid" if ours else "internal")
    exit_status = details.pop("exit_status", 2 if ours else 1)
    raised = RemoteError(
        str(error.get("message", "the supervisor failed without saying why")),
        code=str(code),
        exit_status=exit_status if isinstance(exit_status, int) else 1,
    )
    raised.details = details
    raise raised


def went_away(endpoint: str, method: str) -> SupervisorUnreachableError:
    return SupervisorUnreachableError(
        f"the supervisor at {endpoint} went away before it answered {method}; whether it did it is unknown",
        endpoint=endpoint,
    )


def timed_out(method: str, timeout: float) -> TimeoutExpiredError:
    return TimeoutExpiredError(
        f"no answer to {method} within {timeout:g} s; the request was cancelled", method=method
    )
