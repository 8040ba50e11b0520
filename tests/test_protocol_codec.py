"""What protocol.py encodes it also decodes, and it never accepts anything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from target_sdk.protocol import (
    INVALID_PARAMS,
    INVALID_REQUEST,
    MAX_MESSAGE_BYTES,
    PARSE_ERROR,
    Abort,
    Failure,
    Hello,
    Message,
    Notification,
    Prepare,
    PrepareAnswer,
    ProtocolError,
    Reload,
    ReloadAnswer,
    Request,
    Result,
    Verdict,
    decode,
)

integers = st.integers(min_value=-(2**63), max_value=2**63 - 1)
floats = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
values = st.recursive(
    st.none() | st.booleans() | integers | floats | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=10,
)
params = st.dictionaries(texts, values, max_size=4)
ids = integers | texts
optional_integers = st.none() | integers
optional_texts = st.none() | texts
string_lists = st.lists(texts, max_size=4).map(tuple)

messages: st.SearchStrategy[Message] = st.one_of(
    st.builds(Request, id=ids, method=texts, params=params),
    st.builds(Notification, method=texts, params=params),
    st.builds(Result, id=ids, result=values),
    st.builds(Failure, id=st.none() | ids, number=integers, message=texts, data=st.none() | params),
)
hellos = st.builds(
    Hello, token=texts, pid=integers, sdk=texts, protocol=integers, name=optional_texts,
    build=optional_integers, region=optional_texts,
)  # fmt: skip
prepares = st.builds(
    Prepare, patch=texts, kind=texts, build=integers, region=texts, changed=string_lists, deadline=floats
)
reloads = st.builds(
    Reload, patch=optional_texts, build=integers, root=texts, changed=string_lists, rollback=st.booleans()
)
prepare_answers = st.builds(
    PrepareAnswer, verdict=st.sampled_from(Verdict), retry_after=st.none() | floats, reason=optional_texts
)
reload_answers = st.builds(ReloadAnswer, ok=st.just(True), took=floats) | st.builds(
    ReloadAnswer, ok=st.just(False), took=floats, reason=optional_texts
)


@given(messages)
def test_every_message_survives_the_wire(message: Message) -> None:
    assert decode(message.encode()) == message


@given(hellos | prepares | reloads | st.builds(Abort, patch=texts))
def test_every_call_survives_the_wire(call: Hello | Prepare | Reload | Abort) -> None:
    message = decode(Request(id=1, method=call.METHOD, params=call.params()).encode())
    assert isinstance(message, Request)
    assert type(call).from_params(message.params) == call


@given(prepare_answers)
def test_every_prepare_answer_survives_the_wire(answer: PrepareAnswer) -> None:
    message = decode(Result(id=1, result=answer.result()).encode())
    assert isinstance(message, Result)
    assert PrepareAnswer.from_result(message.result) == answer


@given(reload_answers)
def test_every_reload_answer_survives_the_wire(answer: ReloadAnswer) -> None:
    message = decode(Result(id=1, result=answer.result()).encode())
    assert isinstance(message, Result)
    assert ReloadAnswer.from_result(message.result) == answer


def check_decode(frame: bytes) -> None:
    """A message or a ProtocolError, nothing else; and what was accepted means what the bytes say."""
    try:
        message = decode(frame)
    except ProtocolError as error:
        assert error.number in {PARSE_ERROR, INVALID_REQUEST, INVALID_PARAMS}
        assert error.request_id is None or isinstance(error.request_id, int | str)
        return
    assert isinstance(message, Request | Notification | Result | Failure)
    assert decode(message.encode()) == message


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_a_message_or_a_protocol_error(frame: bytes) -> None:
    check_decode(frame)


@given(values)
def test_arbitrary_json_is_a_message_or_a_protocol_error(value: Any) -> None:
    check_decode(orjson.dumps(value))


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "jsonrpc": st.just("2.0") | values,
            "id": values,
            "method": texts | values,
            "params": params | values,
            "result": values,
            "error": st.fixed_dictionaries({}, optional={"code": values, "message": values, "data": values})
            | values,
        },
    )
)
def test_anything_that_looks_like_json_rpc_is_a_message_or_a_protocol_error(value: dict[str, Any]) -> None:
    check_decode(orjson.dumps(value))


@given(messages, st.data())
def test_a_damaged_message_is_a_message_or_a_protocol_error(message: Message, data: st.DataObject) -> None:
    frame = bytearray(message.encode())
    at = data.draw(st.integers(0, len(frame) - 1))
    frame[at] = data.draw(st.integers(0, 255))
    check_decode(bytes(frame))
    check_decode(bytes(frame[:at]))


@pytest.mark.parametrize(
    ("frame", "number", "request_id"),
    [
        (b"", PARSE_ERROR, None),
        (b"\xff", PARSE_ERROR, None),
        (b'{"jsonrpc":"2.0","id":1', PARSE_ERROR, None),
        (b"[" * 5000, PARSE_ERROR, None),
        (b"null", INVALID_REQUEST, None),
        (b'[{"jsonrpc":"2.0","id":1,"method":"ping"}]', INVALID_REQUEST, None),
        (b'{"jsonrpc":"1.0","id":1,"method":"ping"}', INVALID_REQUEST, 1),
        (b'{"id":"a","method":"ping"}', INVALID_REQUEST, "a"),
        (b'{"jsonrpc":"2.0","id":true,"method":"ping"}', INVALID_REQUEST, None),
        (b'{"jsonrpc":"2.0","id":1.5,"method":"ping"}', INVALID_REQUEST, None),
        (b'{"jsonrpc":"2.0","id":99999999999999999999,"method":"ping"}', INVALID_REQUEST, None),
        (b'{"jsonrpc":"2.0","id":[1],"method":"ping"}', INVALID_REQUEST, None),
        (b'{"jsonrpc":"2.0","id":1,"method":7}', INVALID_REQUEST, 1),
        (b'{"jsonrpc":"2.0","id":1,"method":"ping","params":[1]}', INVALID_PARAMS, 1),
        (b'{"jsonrpc":"2.0","id":1,"method":"ping","params":null}', INVALID_PARAMS, 1),
        (b'{"jsonrpc":"2.0","id":1}', INVALID_REQUEST, 1),
        (b'{"jsonrpc":"2.0","result":{}}', INVALID_REQUEST, None),
        (b'{"jsonrpc":"2.0","id":1,"error":"no"}', INVALID_REQUEST, 1),
        (b'{"jsonrpc":"2.0","id":1,"error":{"code":"1","message":"no"}}', INVALID_REQUEST, 1),
        (b'{"jsonrpc":"2.0","id":1,"error":{"code":true,"message":"no"}}', INVALID_REQUEST, 1),
        (b'{"jsonrpc":"2.0","id":1,"error":{"code":1}}', INVALID_REQUEST, 1),
    ],
)
def test_what_is_wrong_with_a_frame_is_told_with_the_id_it_had(
    frame: bytes, number: int, request_id: int | str | None
) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode(frame)
    assert (caught.value.number, caught.value.request_id) == (number, request_id)


def test_a_frame_that_is_too_large_is_refused_before_it_is_read() -> None:
    frame = Result(id=1, result="x" * MAX_MESSAGE_BYTES).encode()
    with pytest.raises(ProtocolError, match="exceeds"):
        decode(frame)


def wrong_values(value: Any) -> list[Any]:
    """JSON values of every other type than this one."""
    kinds: list[Any] = [None, True, 7, 7.5, "text", ["text"], [1], {"a": 1}]

    def kind(v: Any) -> str:
        if isinstance(v, tuple | list):
            return "strings" if all(isinstance(item, str) for item in v) else "list"
        return type(v).__name__

    return [v for v in kinds if kind(v) != kind(value)]


HELLO = Hello(token="t", pid=1, sdk="s", name="n", build=2, region="r")
PREPARE = Prepare(patch="p", kind="warm", build=3, region="r", changed=("a",), deadline=1.5)
RELOAD = Reload(patch="p", build=3, root="/r", changed=("a",), rollback=True)
CALLS: list[tuple[Callable[[Any], Any], dict[str, Any], set[str]]] = [
    (Hello.from_params, HELLO.params(), {"name", "build", "region"}),
    (Prepare.from_params, PREPARE.params(), set()),
    (Reload.from_params, RELOAD.params(), {"patch"}),
    (Abort.from_params, Abort(patch="p").params(), set()),
    (
        PrepareAnswer.from_result,
        PrepareAnswer(verdict=Verdict.WAIT, retry_after=1.5, reason="r").result(),
        {"retry_after", "reason"},
    ),
    (ReloadAnswer.from_result, ReloadAnswer(ok=False, took=1.5, reason="r").result(), {"reason"}),
]


@pytest.mark.parametrize(
    ("read", "valid", "key", "wrong"),
    [
        pytest.param(read, valid, key, wrong, id=f"{read.__qualname__.split('.')[0]}.{key}={wrong!r}")
        for read, valid, nullable in CALLS
        for key, value in valid.items()
        for wrong in wrong_values(value)
        # An optional field may be null, and a whole number is a number.
        if not (wrong is None and key in nullable) and not (isinstance(value, float) and wrong == 7)
    ],
)
def test_every_field_of_a_wrong_type_is_refused_by_its_name(
    read: Callable[[Any], Any], valid: dict[str, Any], key: str, wrong: Any
) -> None:
    assert read(valid)
    with pytest.raises(ProtocolError, match=key):
        read({**valid, key: wrong})


@pytest.mark.parametrize(
    ("read", "valid", "key"),
    [
        pytest.param(read, valid, key, id=f"{read.__qualname__.split('.')[0]}.{key}")
        for read, valid, nullable in CALLS
        for key in valid
        if key not in nullable and key != "rollback"
    ],
)
def test_every_missing_field_is_refused_by_its_name(
    read: Callable[[Any], Any], valid: dict[str, Any], key: str
) -> None:
    with pytest.raises(ProtocolError, match=key):
        read({k: v for k, v in valid.items() if k != key})


@pytest.mark.parametrize("read", [PrepareAnswer.from_result, ReloadAnswer.from_result])
@pytest.mark.parametrize("value", [None, True, 1, "ok", [], {"verdict": "maybe", "took": 1.0}])
def test_an_answer_that_is_none_of_the_known_ones_is_refused(read: Callable[[Any], Any], value: Any) -> None:
    with pytest.raises(ProtocolError):
        read(value)


def test_unknown_fields_are_ignored_so_that_newer_peers_can_add_some() -> None:
    assert Prepare.from_params({**PREPARE.params(), "later": 1}) == PREPARE
    assert Hello.from_params({**HELLO.params(), "later": 1}) == HELLO
