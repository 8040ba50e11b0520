"""The target channel's conversation, without sockets or clocks: what is said when, and what not twice."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from target_sdk.protocol import Failure, Hello, Message, Request, Result, decode
from target_sdk.session import REMEMBERED_ANSWERS, RESEND_AFTER, RESEND_MAX, CallKey, Phase, Session


@dataclass
class Peer:
    """The far end: reads what the session sends, and answers it."""

    session: Session
    now: float = 100.0

    def heard(self) -> list[Message]:
        messages = [decode(frame) for frame in self.session.outgoing]
        self.session.outgoing.clear()
        return messages

    def requests(self) -> list[tuple[str, Any]]:
        return [(m.method, m.params) for m in self.heard() if isinstance(m, Request)]

    def acknowledge_all(self) -> list[str]:
        methods = []
        while self.session.outgoing:
            for message in self.heard():
                assert isinstance(message, Request)
                methods.append(message.method)
                self.session.receive(Result(id=message.id, result={}).encode(), self.now)
        return methods

    def ask(self, request: Request) -> tuple[CallKey, Request] | None:
        return self.session.receive(request.encode(), self.now)

    def connect(self) -> None:
        self.session.connected(self.now)


def make() -> tuple[Session, Peer]:
    session = Session(lambda: Hello(token="t", pid=1, sdk="test"))
    return session, Peer(session)


def report(session: Session, method: str, lasting: bool = True, **params: Any) -> None:
    session.report(method, lambda: params, lasting=lasting, now=100.0)


def test_nothing_is_said_before_hello_is_answered() -> None:
    session, peer = make()
    report(session, "ready", build=1)
    peer.connect()
    report(session, "status", text="x")
    (hello,) = peer.heard()
    assert isinstance(hello, Request)
    assert hello.method == "hello"
    session.receive(Result(id=hello.id, result={}).encode(), 100.0)
    assert [method for method, _ in peer.requests()] == ["ready", "status"]


def test_only_what_still_holds_is_said_again_to_the_next_supervisor() -> None:
    session, peer = make()
    report(session, "ready")
    report(session, "extend", lasting=False, seconds=5)
    report(session, "status", text="x")
    peer.connect()
    assert peer.acknowledge_all() == ["hello", "ready", "extend", "status"]
    session.disconnected()
    peer.connect()
    assert peer.acknowledge_all() == ["hello", "ready", "status"]


def test_what_was_not_acknowledged_is_said_again_after_a_reconnect_with_a_new_id() -> None:
    session, peer = make()
    peer.connect()
    peer.acknowledge_all()
    report(session, "extend", lasting=False, seconds=5)
    (before,) = peer.heard()
    session.disconnected()
    peer.connect()
    (hello,) = peer.heard()
    assert isinstance(hello, Request)
    assert isinstance(before, Request)
    session.receive(Failure(id=before.id, number=-32000, message="say hello first").encode(), 100.0)
    session.receive(Result(id=hello.id, result={}).encode(), 100.0)
    assert peer.requests() == [("extend", {"seconds": 5})]


def test_hello_says_what_holds_when_it_is_said() -> None:
    build = 200
    session = Session(lambda: Hello(token="t", pid=1, sdk="test", build=build))
    peer = Peer(session)
    peer.connect()
    assert peer.requests()[0][1]["build"] == 200
    build = 300
    session.disconnected()
    peer.connect()
    assert peer.requests()[0][1]["build"] == 300


def test_reports_in_a_tight_loop_cost_one_message_per_round_trip_and_the_last_one_counts() -> None:
    session, peer = make()
    peer.connect()
    peer.acknowledge_all()
    for number in range(1000):
        report(session, "status", text=str(number))
    (first,) = peer.heard()
    assert isinstance(first, Request)
    assert first.params == {"text": "0"}
    session.receive(Result(id=first.id, result={}).encode(), 100.0)
    assert peer.requests() == [("status", {"text": "999"})]


def test_a_report_without_acknowledgement_is_repeated_ever_more_rarely() -> None:
    session, peer = make()
    peer.connect()
    (hello,) = peer.heard()
    times = []
    for _ in range(6):
        due = session.next_due
        assert due is not None
        session.tick(due - 0.001)
        assert not session.outgoing
        session.tick(due)
        (again,) = peer.heard()
        assert again == hello
        times.append(due)
    assert times[0] == 100.0 + RESEND_AFTER
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert gaps == [4.0, 8.0, 16.0, RESEND_MAX, RESEND_MAX]


def test_there_is_nothing_to_wake_up_for_once_everything_is_acknowledged_or_nobody_is_there() -> None:
    session, peer = make()
    report(session, "ready")
    assert session.next_due is None
    peer.connect()
    assert session.next_due is not None
    peer.acknowledge_all()
    assert session.next_due is None
    assert session.settled
    report(session, "status", text="x")
    assert not session.settled
    session.disconnected()
    assert session.next_due is None


def test_a_refused_hello_silences_the_session_until_the_next_connection() -> None:
    session, peer = make()
    report(session, "ready")
    peer.connect()
    (hello,) = peer.heard()
    assert isinstance(hello, Request)
    session.receive(Failure(id=hello.id, number=-32000, message="unknown token").encode(), 100.0)
    assert session.phase is Phase.REFUSED
    report(session, "status", text="x")
    session.tick(1e9)
    assert not session.outgoing
    assert session.next_due is None
    peer.connect()
    assert peer.acknowledge_all() == ["hello", "ready", "status"]


def test_a_refused_report_is_not_repeated() -> None:
    session, peer = make()
    peer.connect()
    peer.acknowledge_all()
    report(session, "status", text="x")
    (status,) = peer.heard()
    assert isinstance(status, Request)
    session.receive(Failure(id=status.id, number=-32602, message="no").encode(), 100.0)
    assert session.settled


def test_a_repeat_in_progress_is_ignored_and_a_finished_one_gets_the_same_answer() -> None:
    session, peer = make()
    peer.connect()
    peer.acknowledge_all()
    request = Request(id=7, method="reload", params={"build": 3})
    call = peer.ask(request)
    assert call is not None
    assert peer.ask(request) is None
    assert peer.heard() == []
    answer = Result(id=7, result={"verdict": "ok", "took": 0.5})
    session.answer(call[0], answer)
    assert peer.heard() == [answer]
    assert peer.ask(request) is None
    assert peer.heard() == [answer]
    session.answer(call[0], Result(id=7, result="another"))
    assert peer.heard() == []


def test_the_same_id_with_another_content_is_another_request() -> None:
    _, peer = make()
    peer.connect()
    peer.acknowledge_all()
    assert peer.ask(Request(id=1, method="prepare", params={"patch": "a"})) is not None
    assert peer.ask(Request(id=1, method="prepare", params={"patch": "b"})) is not None


def test_a_restarted_supervisor_is_not_given_answers_of_the_one_before() -> None:
    session, peer = make()
    peer.connect()
    peer.acknowledge_all()
    request = Request(id=1, method="prepare", params={"patch": "a"})
    first = peer.ask(request)
    assert first is not None
    session.answer(first[0], Result(id=1, result="go ahead, then"))
    peer.heard()
    session.disconnected()
    peer.connect()
    peer.acknowledge_all()
    assert peer.ask(request) is not None, "a program that could be patched then may be busy now"


def test_an_answer_that_outlives_its_connection_is_only_sent_if_it_is_asked_for_again() -> None:
    session, peer = make()
    peer.connect()
    peer.acknowledge_all()
    request = Request(id=1, method="reload", params={"build": 3})
    call = peer.ask(request)
    assert call is not None
    session.disconnected()
    peer.connect()
    peer.acknowledge_all()
    answer = Result(id=1, result="done")
    session.answer(call[0], answer)
    assert peer.heard() == []
    assert peer.ask(request) is None
    assert peer.heard() == [answer]


def test_a_repeat_on_the_new_connection_joins_the_call_in_progress() -> None:
    session, peer = make()
    peer.connect()
    peer.acknowledge_all()
    request = Request(id=1, method="reload", params={"build": 3})
    call = peer.ask(request)
    assert call is not None
    session.disconnected()
    peer.connect()
    peer.acknowledge_all()
    assert peer.ask(request) is None
    answer = Result(id=1, result="done")
    session.answer(call[0], answer)
    assert peer.heard() == [answer]


def test_remembered_answers_are_bounded_and_calls_in_progress_are_never_forgotten() -> None:
    session, peer = make()
    peer.connect()
    peer.acknowledge_all()
    slow = Request(id="slow", method="reload", params={})
    assert peer.ask(slow) is not None
    for number in range(REMEMBERED_ANSWERS * 2):
        call = peer.ask(Request(id=number, method="reload", params={}))
        assert call is not None
        session.answer(call[0], Result(id=number, result={}))
    peer.heard()
    assert peer.ask(slow) is None
    assert peer.ask(Request(id=REMEMBERED_ANSWERS * 2 - 1, method="reload", params={})) is None
    assert len(peer.heard()) == 1
    assert peer.ask(Request(id=0, method="reload", params={})) is not None
    assert len(session._served) <= REMEMBERED_ANSWERS + 1


def test_ping_is_answered_without_the_program() -> None:
    _, peer = make()
    peer.connect()
    peer.acknowledge_all()
    assert peer.ask(Request(id=3, method="ping")) is None
    assert peer.heard() == [Result(id=3, result={})]
