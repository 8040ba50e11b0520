"""`docs/protocol.md` is exact to the byte."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from asyncsup.control import METHODS, failure_of
from asyncsup.errors import TargetNotFoundError
from target_sdk import HandoverError
from target_sdk.protocol import (
    APPLICATION_ERROR,
    COMMIT,
    REFUSE,
    Abort,
    Failure,
    Hello,
    Message,
    Notification,
    Offer,
    Prepare,
    PrepareAnswer,
    Reload,
    ReloadAnswer,
    Request,
    Result,
    TakeOver,
    Verdict,
    decode,
)

DOC = (Path(__file__).parent.parent / "docs" / "protocol.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"```wire (\w+)\n(.*?)\n```", DOC, re.DOTALL))

HELLO = Hello(token="5f0e", pid=4711, sdk="python/0.1.0", name="web", build=200, region="us-east-1")
PREPARE = Prepare(
    patch="9c56", kind="warm", build=300, region="us-east-1", changed=["work/job.json"], deadline=10.0
)
RELOAD = Reload(patch="9c56", build=300, root="/srv/web", changed=["work/job.json"])

CODE: dict[str, Message] = {
    "request": Request(id=1, method="status", params={"names": ["web"]}),
    "result": Result(id=1, result={"seq": 7, "targets": []}),
    "failure": failure_of(
        1, TargetNotFoundError("no target or instance 'web'; there are none", name="web")
    ),
    "cancel": Request(id=2, method="cancel", params={"id": 1}),
    "event": Notification(
        method="event",
        params={
            "seq": 8, "at": "2026-11-22T10:00:00.000Z", "type": "instance.state", "target": "web",
            "instance": "web:0", "from": "starting", "to": "running", "pid": 4711, "reason": "said ready",
        },
    ),
    "hello": Request(id=1, method=Hello.METHOD, params=HELLO.params()),
    "welcome": Result(
        id=1, result={"name": "web", "instance": "web:0", "build": 200, "region": "us-east-1"}
    ),
    "prepare": Request(id=1, method=Prepare.METHOD, params=PREPARE.params()),
    "go_ahead": Result(id=1, result=PrepareAnswer(verdict=Verdict.GO_AHEAD).result()),
    "wait": Result(
        id=1,
        result=PrepareAnswer(verdict=Verdict.WAIT, retry_after=2.0, reason="settling 3 orders").result(),
    ),
    "not_allowed": Result(
        id=1, result=PrepareAnswer(verdict=Verdict.NOT_ALLOWED, reason="year-end closing").result()
    ),
    "reload": Request(id=2, method=Reload.METHOD, params=RELOAD.params()),
    "reloaded": Result(id=2, result=ReloadAnswer(ok=True, took=0.004).result()),
    "reload_failed": Result(
        id=2, result=ReloadAnswer(ok=False, took=0.001, reason="job.json: steps must be positive").result()
    ),
    "abort": Request(id=3, method=Abort.METHOD, params=Abort(patch="9c56").params()),
    "drain": Request(id=4, method="drain", params={"deadline": 30.0}),
    "handover_failed": Failure(
        id=4, number=APPLICATION_ERROR, message="the successor ended before it had taken over",
        data={"code": HandoverError.code},
    ),
    "take_over": Notification(method=TakeOver.METHOD, params=TakeOver(pid=4712, build=300).params()),
    "offer": Notification(method=Offer.METHOD, params=Offer(descriptors=1000, size=28893).params()),
    "commit": Notification(method=COMMIT),
    "refuse": Notification(
        method=REFUSE, params={"reason": "30 descriptors do not fit into the limit of open files"}
    ),
}  # fmt: skip


def test_the_document_and_the_code_know_the_same_examples() -> None:
    assert EXAMPLES.keys() == CODE.keys()


@pytest.mark.parametrize("name", CODE)
def test_what_the_code_writes_is_what_the_document_shows(name: str) -> None:
    assert CODE[name].encode().decode() == EXAMPLES[name]


@pytest.mark.parametrize("name", CODE)
def test_what_the_document_shows_is_read(name: str) -> None:
    assert decode(EXAMPLES[name].encode()) == CODE[name]


def test_every_control_method_is_documented_and_every_documented_one_exists() -> None:
    table = DOC[DOC.index("| method | params | result |") : DOC.index("`names` are names of targets")]
    rows = re.findall(r"^\| ((?:`[a-z.]+` ?)+)\|", table, re.MULTILINE)
    documented = {name for row in rows for name in re.findall(r"`([a-z.]+)`", row)}
    assert documented == set(METHODS)
