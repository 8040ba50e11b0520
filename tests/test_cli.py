"""The command line: against a supervisor that is a thread, and against the real one."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import Serve, wait_for
from control_values import (
    HISTORY,
    INBOX,
    PLAN,
    instance,
    refused_report,
    report,
    status,
    target,
)
from fake_supervisor import PENDING, WAIT_SECONDS, Call, FakeSupervisor, RefusalError

import asyncsup
from asyncsup import cli
from asyncsup.cli import following, targets
from asyncsup.cli.arguments import new_parser, seconds
from asyncsup.cli.command_line import EXIT_CODES
from asyncsup.cli.verbs import VERBS, Action, Verb
from asyncsup.config import parse_duration

ASYNCSUP = [sys.executable, "-m", "asyncsup"]


class Outcome(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Outcome]


@pytest.fixture
def supervisor(short_tmp: Path) -> Iterator[FakeSupervisor]:
    with FakeSupervisor(short_tmp, {"status": lambda _: status(target("pricer"))}) as fake:
        yield fake


@pytest.fixture
def run(supervisor: FakeSupervisor, capsys: pytest.CaptureFixture[str]) -> Run:
    """Carry out a command line in this process."""

    def run(*argv: str | Path) -> Outcome:
        status = cli.main(["--endpoint", supervisor.endpoint, *map(str, argv)])
        return Outcome(status, *capsys.readouterr())

    return run


def offline(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> Outcome:
    """A command that needs no supervisor."""
    status = cli.main([str(word) for word in argv])
    return Outcome(status, *capsys.readouterr())


def process(*argv: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """A command line in a process of its own."""
    return subprocess.run(
        [*ASYNCSUP, *map(str, argv)],
        capture_output=True, text=True, timeout=WAIT_SECONDS, env={**os.environ, **environ}, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def refuse(code: str, exit_status: int, **details: Any) -> Callable[[Call], Any]:
    def handler(_: Call) -> Any:
        raise RefusalError(f"refused with {code}", code=code, exit_status=exit_status, **details)

    return handler


# --- arguments ----------------------------------------------------------------------------------------------


def verbs() -> list[list[str]]:
    found = []
    for name, verb in VERBS.items():
        found += [[name]] if isinstance(verb, Verb) else [[name, sub] for sub in verb]
    return found


def verb_of(words: list[str]) -> Verb:
    found = VERBS[words[0]]
    return found if isinstance(found, Verb) else found[words[1]]


def test_every_verb_is_where_the_table_says() -> None:
    places = [verb_of(words).where for words in verbs()]
    assert len(set(places)) == len(places)
    assert all(isinstance(verb_of(words).action, Action) for words in verbs())


@pytest.mark.parametrize("words", [[], ["patch"], ["config"], *verbs()], ids=" ".join)
def test_every_verb_has_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    outcome = offline(capsys, *words, "--help")
    assert outcome.status == 0
    assert outcome.out.startswith("usage: asyncsup")
    assert outcome.err == ""


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "a verb is missing"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["patch"], "a verb is missing; there are build, sign, verify"),
        (["statsu"], "'statsu' is not a verb of asyncsup; did you mean 'status'?"),
        (["patch", "aply"], "did you mean 'apply'?"),
        (["start"], "the following arguments are required: NAME"),
        (["start", "web", "--timeout", "soon"], "'soon' is not a duration"),
        (["wait", "web", "--for", "ever"], "invalid choice: 'ever'"),
        (["status", "--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["-c"], "expected one argument"),
    ],
)
def test_a_usage_error_is_one_line_and_2(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = offline(capsys, *argv)
    assert outcome.status == 2
    assert said in outcome.err
    assert outcome.err.startswith("asyncsup: ")
    assert outcome.err.count("\n") == 1
    assert outcome.out == ""


def test_a_usage_error_is_json_where_json_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = offline(capsys, "start", "--json")
    assert outcome.status == 2
    assert outcome.json["error"]["code"] == "usage"
    assert outcome.err.startswith("asyncsup: ")


def test_common_options_go_before_and_after_the_verb(run: Run) -> None:
    expected = status(target("pricer"))
    assert run("--json", "status").json == expected
    assert run("status", "--json").json == expected
    assert run("status", "pricer", "--json", "--no-color").json == expected


@pytest.mark.parametrize(
    "text",
    [
        "10",
        "1.5",
        "0",
        "500ms",
        "10s",
        "2m",
        "1h30m",
        "1d",
        "1.5m",
        "",
        "s",
        "-1",
        "10 s",
        "1e3",
        "5x",
        "1s2",
    ],
)
def test_durations_are_those_of_the_configuration(text: str) -> None:
    def outcome(parse: Callable[[str], float]) -> float | None:
        try:
            return parse(text)
        except (ValueError, argparse.ArgumentTypeError):
            return None

    number = re.fullmatch(r"[0-9]+(\.[0-9]+)?", text)
    assert outcome(seconds) == (float(text) if number else outcome(parse_duration))


def test_version_is_a_verb_and_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert offline(capsys, "version").out == offline(capsys, "--version").out == "asyncsup 0.1.0\n"
    assert offline(capsys, "version", "--json").json == {"version": "0.1.0"}


def test_the_documentation_has_every_verb_and_every_option() -> None:
    text = (Path(__file__).parent.parent / "docs/cli.md").read_text()
    for words in verbs():
        assert f"asyncsup {' '.join(words)}" in text
        parser = new_parser("x", "x")
        verb_of(words).configure(parser)
        for action in parser._actions:
            for option in action.option_strings:
                assert f"`{option}" in text or f" {option}" in text, f"{words}: {option}"
    for number in re.findall(r"\b(\d+) ", EXIT_CODES):
        assert f"| {number} |" in text


# --- which supervisor ---------------------------------------------------------------------------------------


def test_no_supervisor_is_7_and_says_how_to_start_one(
    short_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = offline(capsys, "--endpoint", f"ipc://{short_tmp}/no.sock", "--json", "status")
    assert outcome.status == 7
    assert (
        outcome.err
        == f"asyncsup: no supervisor at ipc://{short_tmp}/no.sock; start one with `asyncsup serve`\n"
    )
    assert outcome.json["error"] == {
        "code": "supervisor.unreachable", "exit_status": 7, "endpoint": f"ipc://{short_tmp}/no.sock",
        "message": outcome.err.removeprefix("asyncsup: ").strip(),
    }  # fmt: skip


def test_the_supervisor_is_that_of_the_configuration_file_or_the_variable(
    supervisor: FakeSupervisor, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = supervisor.folder / "x.toml"
    file.write_text('[supervisor]\nruntime_dir = "."\n')
    assert offline(capsys, "-c", file, "status").status == 0
    assert offline(capsys, "status", "-c", file).status == 0
    monkeypatch.setenv("ASYNCSUP_ENDPOINT", supervisor.endpoint)
    assert offline(capsys, "status").status == 0


def test_a_configuration_that_is_not_there_is_told_by_who_has_named_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ASYNCSUP_ENDPOINT", raising=False)
    monkeypatch.setenv("ASYNCSUP_CONFIG", str(tmp_path / "by-variable.toml"))
    for verb in (["status"], ["config", "check"]):
        assert (
            "by-variable.toml: there is no such file, named by $ASYNCSUP_CONFIG" in offline(capsys, *verb).err
        )
        named = offline(capsys, "-c", tmp_path / "by-option.toml", *verb)
        assert "by-option.toml: there is no such file, named by -c" in named.err


# --- targets ------------------------------------------------------------------------------------------------


def test_status_is_a_table_without_colour_when_piped(run: Run, supervisor: FakeSupervisor) -> None:
    outcome = run("status", "pricer", "web*")
    assert outcome == (
        0,
        "NAME    STATE    READY   PID  UPTIME  RESTARTS  BUILD  DETAIL\n"
        "pricer  running  yes    4711  12 s           0    200\n",
        "",
    )
    assert supervisor.called("status") == [{"names": ["pricer", "web*"]}]


def test_status_is_3_when_something_that_should_run_is_not_ready(
    run: Run, supervisor: FakeSupervisor
) -> None:
    down = instance("web:0", state="backoff", ready=False, pid=None)
    supervisor.handlers["status"] = lambda _: status(target("a"), target("web", down, ready=False))
    assert run("status").status == 3
    assert run("status", "--json").status == 3
    assert run("status", "-q") == (3, "", "")


def test_an_error_of_the_supervisor_keeps_its_exit_status(run: Run, supervisor: FakeSupervisor) -> None:
    supervisor.handlers["status"] = refuse("target.not_found", 4, name="nope")
    assert run("status", "nope") == (4, "", "asyncsup: refused with target.not_found\n")
    outcome = run("status", "nope", "--json")
    assert outcome.json["error"] == {
        "code": "target.not_found", "message": "refused with target.not_found", "name": "nope",
        "exit_status": 4,
    }  # fmt: skip


def test_a_control_character_in_an_error_does_not_reach_the_terminal(
    run: Run, supervisor: FakeSupervisor
) -> None:
    supervisor.handlers["status"] = refuse("x\x1b[2J", 1)
    assert run("status").err == "asyncsup: refused with x\\x1b[2J\n"


@pytest.mark.parametrize("verb", ["start", "stop", "restart", "reload"])
def test_operations_pass_on_what_was_asked(run: Run, supervisor: FakeSupervisor, verb: str) -> None:
    result = {"target": "web", "ok": True, "detail": "", "state": "running", "took": 1.5, "instances": None}
    supervisor.handlers[verb] = lambda _: {"results": [result]}
    assert run(verb, "web", "pricer:1", "--timeout", "2m") == (0, "ok      web  running (1.5 s)\n", "")
    assert run(verb, "all", "--no-wait", "--json").json == {"results": [result]}
    assert supervisor.called(verb) == [
        {"names": ["web", "pricer:1"], "wait": True, "timeout": 120.0},
        {"names": ["all"], "wait": False},
    ]


def test_a_rolling_restart_is_asked_for(run: Run, supervisor: FakeSupervisor) -> None:
    supervisor.handlers["restart"] = lambda _: {"results": []}
    assert run("restart", "web", "--rolling").status == 0
    assert supervisor.called("restart") == [{"names": ["web"], "wait": True, "rolling": True}]


def test_an_operation_that_failed_for_one_of_several_is_1(run: Run, supervisor: FakeSupervisor) -> None:
    supervisor.handlers["start"] = lambda _: {
        "results": [{"target": "a", "ok": True}, {"target": "b", "ok": False, "detail": "no such program"}]
    }
    outcome = run("start", "all")
    assert outcome.status == 1
    assert outcome.out.splitlines()[1] == "failed  b  no such program"


def test_an_operation_that_is_never_answered_ends_at_its_time_out(
    run: Run, supervisor: FakeSupervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "GRACE_SECONDS", 0.05)
    supervisor.handlers["stop"] = lambda _: PENDING
    while not supervisor.called("stop"):  # what has arrived is cancelled over a connection that stands
        outcome = run("stop", "web", "--timeout", "50ms")
        assert outcome.status == 124
        assert "no answer to stop" in outcome.err
    supervisor.wait_for("cancel")


def test_show_is_about_a_target_or_about_the_supervisor(run: Run, supervisor: FakeSupervisor) -> None:
    supervisor.handlers["show"] = lambda call: {
        **target(call.params["name"]),
        "config": {"restart": "always"},
    }
    supervisor.handlers["status"] = lambda call: status(*map(target, call.params["names"]))
    assert "restart  always" in run("show", "pricer").out
    assert run("show", "pricer", "--json").json["name"] == "pricer"
    assert run("show", "pricer", "web").out.count("restart  always") == 2
    assert [each["name"] for each in run("show", "pricer", "web", "--json").json["targets"]] == [
        "pricer",
        "web",
    ]
    assert "us-east-1" in run("show").out
    assert run("show", "--json").json["pid"] == 4711


def test_output_that_is_lost_is_shown_where_there_is_any(run: Run, supervisor: FakeSupervisor) -> None:
    losing = target("pricer")
    losing["instances"][0]["lost_bytes"] = 4_200_000
    supervisor.handlers["status"] = lambda _: status(losing, target("web"))
    supervisor.handlers["show"] = lambda _: losing
    shown = run("status").out
    assert "4.0 MiB of its output lost" in shown
    assert shown.count("lost") == 1
    assert re.search(r"^  output +4.0 MiB of its output lost$", run("show", "pricer").out, re.MULTILINE)


@pytest.mark.parametrize(
    ("refusal", "theirs", "said"),
    [
        (("unknown method 'x'; known are y", "request.unknown_method"), "0.0.9",
         "; the supervisor is version 0.0.9, this is {ours}: `asyncsup reexec` would bring it up to date"),
        (("unknown parameter 'names'; known are name", "request.invalid"), "0.0.10",
         "; the supervisor is version 0.0.10, this is {ours}: `asyncsup reexec` would bring it up to date"),
        (("name: missing; it must be a string", "request.invalid"), "1000.0",
         "; the supervisor is version 1000.0, this is {ours}"),
        (("unknown method 'x'; known are y", "request.unknown_method"), asyncsup.__version__, ""),
        (("names: must be an array of strings", "request.invalid"), "0.0.9", ""),
        (("unknown parameter is no reason", "target.busy"), "0.0.9", ""),
    ],
)  # fmt: skip
def test_versions_are_named_where_they_are_why_it_was_not_understood(
    run: Run, supervisor: FakeSupervisor, refusal: tuple[str, str], theirs: str, said: str
) -> None:
    (text, code), said = refusal, said.format(ours=asyncsup.__version__)

    def refuse(_: Call) -> Any:
        raise RefusalError(text, code=code, exit_status=2)

    supervisor.handlers["signal"] = refuse
    supervisor.info["version"] = theirs
    outcome = run("signal", "HUP", "web")
    assert (outcome.status, outcome.err) == (2, f"asyncsup: {text}{said}\n")
    assert run("signal", "HUP", "web", "--json").json["error"]["message"] == text + said


def test_signal_says_who_got_it(run: Run, supervisor: FakeSupervisor) -> None:
    supervisor.handlers["signal"] = lambda _: {"sent": [{"instance": "web:0", "pid": 12}]}
    assert run("signal", "HUP", "web").out == "sent HUP to web:0 (pid 12)\n"
    assert supervisor.called("signal") == [{"names": ["web"], "signal": "HUP"}]


def test_wait_passes_on_the_condition(run: Run, supervisor: FakeSupervisor) -> None:
    supervisor.handlers["wait"] = lambda _: {"took": 1.25}
    assert run("wait", "web", "--for", "stopped", "--timeout", "3") == (0, "stopped after 1.2 s\n", "")
    assert supervisor.called("wait") == [{"names": ["web"], "for": "stopped", "timeout": 3.0}]


# --- logs and events ----------------------------------------------------------------------------------------


def chunk(name: str, text: str, cursor: int = 0) -> dict[str, Any]:
    return {"instance": name, "stream": "stdout", "path": "/x", "text": text, "cursor": [name, cursor]}


def test_logs_of_one_instance_are_its_bytes(run: Run, supervisor: FakeSupervisor) -> None:
    supervisor.handlers["logs"] = lambda _: {"chunks": [chunk("a:0", "one\n\x1b[31mtwo\x1b[0m\x07\nno end")]}
    assert run("logs", "a", "-n", "3", "--stderr").out == "one\n\x1b[31mtwo\x1b[0m\x07\nno end\n"
    assert supervisor.called("logs") == [{"name": "a", "stream": "stderr", "lines": 3}]


def test_logs_of_several_carry_their_names(run: Run, supervisor: FakeSupervisor) -> None:
    instances = {"all": ["a:0", "bb:0", "bb:1"], "a": ["a:0"]}
    supervisor.handlers["logs"] = lambda call: {
        "chunks": [chunk(name, "x\ny") for name in instances[call.params["name"]]]
    }
    assert run("logs", "all").out.splitlines() == [
        "a:0  | x", "a:0  | y", "bb:0 | x", "bb:0 | y", "bb:1 | x", "bb:1 | y",
    ]  # fmt: skip
    assert run("logs", "a", "--json").out == (
        '{"instance":"a:0","stream":"stdout","line":"x"}\n{"instance":"a:0","stream":"stdout","line":"y"}\n'
    )


def test_the_names_that_are_in_a_log_file_are_not_there_twice(run: Run, supervisor: FakeSupervisor) -> None:
    chunks = [
        {**chunk("a:0", "a:0 | x\na:0 | a:0 | y\na:"), "prefix": "a:0 | ", "left": 7},
        chunk("b:0", "z"),
    ]
    supervisor.handlers["logs"] = lambda call: {
        "chunks": chunks if call.params["name"] == "all" else chunks[:1]
    }
    supervisor.handlers["logs.follow"] = lambda _: {
        "chunks": [{**chunk("a:0", "0 | end", 1), "size": 7, "prefix": "a:0 | "}]
    }
    assert run("logs", "a").out == "x\na:0 | y\nend\n"
    assert run("logs", "all").out == "a:0 | x\na:0 | a:0 | y\na:0 | end\nb:0 | z\n"
    assert '"line":"end"' in run("logs", "a", "--json").out


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("@1700000000", 1_700_000_000.0), ("@1700000000.5", 1_700_000_000.5),
        ("2023-11-14T22:13:20Z", 1_700_000_000.0), ("2023-11-15T00:13:20+02:00", 1_700_000_000.0),
    ],
)  # fmt: skip
def test_logs_since_a_moment(run: Run, supervisor: FakeSupervisor, text: str, found: float) -> None:
    supervisor.handlers["logs"] = lambda _: {"chunks": [chunk("a:0", "x\n")]}
    assert run("logs", "a", "--since", text).status == 0
    assert supervisor.called("logs") == [{"name": "a", "stream": "stdout", "since": found}]


def test_logs_since_is_local_time_or_so_long_ago(run: Run, supervisor: FakeSupervisor) -> None:
    supervisor.handlers["logs"] = lambda _: {"chunks": [chunk("a:0", "x\n")]}
    before = time.time()
    run("logs", "a", "--since", "10m", "-n", "5")
    run("logs", "a", "--since", "2026-11-28T10:00")
    run("logs", "a", "--since", "2026-11-28")
    ago, clock, day = supervisor.called("logs")
    assert before - 600 <= ago["since"] <= time.time() - 600
    assert ago["lines"] == 5
    assert clock["since"] == time.mktime((2026, 11, 28, 10, 0, 0, 0, 0, -1))
    assert day["since"] == time.mktime((2026, 11, 28, 0, 0, 0, 0, 0, -1))


@pytest.mark.parametrize("text", ["", "x", "@", "@x", "@-1", "@nan", "@inf", "-5m", "2026-13-01", "today"])
def test_logs_since_no_time_at_all_is_one_clear_error(run: Run, text: str) -> None:
    outcome = run("logs", "a", f"--since={text}")
    assert outcome.status == 2
    assert "is not a time: write 10m (ago)" in outcome.err


@pytest.mark.parametrize("text", ["-1", "x", "1.5", "9" * 20])
def test_logs_of_no_number_of_lines_is_refused(run: Run, text: str) -> None:
    outcome = run("logs", "a", f"-n{text}")
    assert outcome.status == 2
    assert "is not a number of lines" in outcome.err


def test_logs_needs_a_name(run: Run) -> None:
    assert run("logs").status == 2


def test_logs_of_several_come_in_the_order_of_their_times(run: Run, supervisor: FakeSupervisor) -> None:
    def at(second: int, text: str) -> str:
        return f"2026-11-28T10:00:{second:02}.000Z {text}\n"

    texts = {"a:0": at(1, "a1") + "no time\n" + at(4, "a4"), "b:0": at(2, "b2") + at(5, "b5")}
    supervisor.handlers["logs"] = lambda call: {
        "chunks": [chunk(call.params["name"], texts[call.params["name"]])]
    }
    shown = [line.rsplit(" ", 1)[1] for line in run("logs", "a:0", "b:0").out.splitlines()]
    assert shown == ["a1", "time", "b2", "a4", "b5"]


def test_logs_are_fetched_to_where_they_ended_at_first(run: Run, supervisor: FakeSupervisor) -> None:
    supervisor.handlers["logs"] = lambda _: {"chunks": [{**chunk("a:0", "on", 1), "left": 6}]}
    answers = [
        {**chunk("a:0", "e\nt", 2), "size": 3},
        {**chunk("a:0", "wo", 3), "size": 3, "gap": True},
        {**chunk("a:0", "never\n", 4), "size": 6},
    ]
    supervisor.handlers["logs.follow"] = lambda _: {"chunks": [answers.pop(0)]}
    outcome = run("logs", "a")
    assert outcome.out == "one\ntwo\n"
    assert outcome.err == "asyncsup: a:0: some output was rotated away before it was read\n"
    assert [(call["cursors"], call["timeout"]) for call in supervisor.called("logs.follow")] == [
        ([["a:0", 1]], 0), ([["a:0", 2]], 0),
    ]  # fmt: skip


def test_logs_say_when_they_begin_earlier_than_asked(run: Run, supervisor: FakeSupervisor) -> None:
    supervisor.handlers["logs"] = lambda _: {"chunks": [{**chunk("a:0", "x\n"), "exact": False}]}
    assert "a:0: lines of this log.format have no times" in run("logs", "a", "--since", "1m").err


def test_logs_follow_takes_leave_of_an_instance_and_welcomes_another(
    run: Run, supervisor: FakeSupervisor
) -> None:
    there = [chunk("a:0", "zero\n", 1), chunk("a:1", "one\n", 2)]

    def follow(call: Call) -> Any:
        if there[-1]["instance"] == "a:1":
            there[1:] = [chunk("a:2", "two\n", 3)]
            raise RefusalError("no target or instance 'a:1'", code="target.not_found", exit_status=4)
        raise RefusalError("stopping", code="supervisor.shutting_down", exit_status=8)

    supervisor.handlers["logs"] = lambda _: {"chunks": there}
    supervisor.handlers["logs.follow"] = follow
    outcome = run("logs", "-f", "a")
    assert outcome.out.splitlines() == ["a:0 | zero", "a:1 | one", "a:2 | two"]
    assert "a:1 is gone" in outcome.err
    assert supervisor.called("logs.follow")[1]["cursors"] == [["a:0", 1], ["a:2", 3]]


def test_logs_reopen(run: Run, supervisor: FakeSupervisor) -> None:
    supervisor.handlers["logs.reopen"] = lambda _: {"paths": ["/var/log/a.log"]}
    assert run("logs", "--reopen") == (0, "opened anew: /var/log/a.log\n", "")
    run("logs", "--reopen", "a")
    assert supervisor.called("logs.reopen") == [{"names": []}, {"names": ["a"]}]


def test_logs_follow_from_the_cursors_until_the_supervisor_ends(run: Run, supervisor: FakeSupervisor) -> None:
    answers = [[chunk("a:0", "half", 1)], [], [chunk("a:0", " line\nnext\n", 2)]]

    def follow(call: Call) -> Any:
        if not answers:
            raise RefusalError("stopping", code="supervisor.shutting_down", exit_status=8)
        return {"chunks": answers.pop(0)}

    supervisor.handlers["logs"] = lambda _: {"chunks": [chunk("a:0", "first\n")]}
    supervisor.handlers["logs.follow"] = follow
    outcome = run("logs", "-f", "a")
    assert outcome == (0, "first\nhalf line\nnext\n", "asyncsup: the supervisor is ending\n")
    assert [call["cursors"] for call in supervisor.called("logs.follow")] == [
        [["a:0", 0]], [["a:0", 1]], [["a:0", 1]], [["a:0", 2]],
    ]  # fmt: skip


def test_logs_follow_waits_for_a_supervisor_that_crashed(
    short_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "RETRY_SECONDS", 0.01)
    first = FakeSupervisor(
        short_tmp,
        {"logs": lambda _: {"chunks": [chunk("a:0", "first\n", 7)]}, "logs.follow": lambda _: PENDING},
    )
    second = FakeSupervisor(short_tmp, {"logs.follow": refuse("supervisor.shutting_down", 8)})

    def crash() -> None:
        first.wait_for("logs.follow")
        first.stop()
        with second:
            second.wait_for("logs.follow")

    with first:
        thread = threading.Thread(target=crash)
        thread.start()
        outcome = offline(capsys, "--endpoint", first.endpoint, "logs", "-f", "a")
        thread.join()
    assert outcome.status == 0
    assert outcome.err.splitlines() == [
        "asyncsup: the supervisor went away; waiting for it to come back (Ctrl-C ends this)",
        "asyncsup: the supervisor is back",
        "asyncsup: the supervisor is ending",
    ]
    assert second.called("logs.follow")[0]["cursors"] == [["a:0", 7]]


def test_events_without_following_are_what_is_kept(run: Run, supervisor: FakeSupervisor) -> None:
    for n in range(3):
        supervisor.emit("instance.status", instance="a:0", text=f"t{n}")
    assert len(run("events", "--no-follow").out.splitlines()) == 3
    lines = run("events", "--no-follow", "--since", "2", "--json").out.splitlines()
    assert [json.loads(line)["seq"] for line in lines] == [3]


def test_events_begin_with_a_snapshot_and_end_with_the_supervisor(
    run: Run, supervisor: FakeSupervisor
) -> None:
    supervisor.handlers["status"] = lambda _: {**status(target("pricer")), "seq": supervisor._seq}
    supervisor.emit("before")

    def script() -> None:
        supervisor.wait_for_subscriber()
        supervisor.wait_for("events.since")
        supervisor.emit("inbox.changed", file="a.zip", state="complete")
        supervisor.emit("supervisor.stopping")
        supervisor.emit("instance.state", instance="pricer:0", to="stopped")
        supervisor.stop()

    thread = threading.Thread(target=script)
    thread.start()
    outcome = run("events", "--json")
    thread.join()
    assert outcome.status == 0
    assert [json.loads(line)["type"] for line in outcome.out.splitlines()] == [
        "snapshot", "inbox.changed", "supervisor.stopping", "instance.state",
    ]  # fmt: skip
    assert outcome.err == "asyncsup: the supervisor has ended\n"


def test_events_of_what_is_named_and_of_nothing_else(run: Run, supervisor: FakeSupervisor) -> None:
    supervisor.info["groups"] = {"backend": ["db", "web"]}
    for fields in (
        {"target": "web", "instance": "web:0"}, {"target": "web", "instance": "web:1"}, {"target": "web"},
        {"target": "db", "instance": "db:0"}, {"target": "pricer"}, {"txn": 1}, {"txn": 1, "target": "db"},
        {"txn": 1}, {"txn": 2, "target": "pricer"}, {"txn": 2}, {},
    ):  # fmt: skip
        supervisor.emit("x", **fields)

    def found(*names: str) -> list[int]:
        lines = run("events", "--no-follow", "--json", *names).out.splitlines()
        return [json.loads(line)["seq"] for line in lines]

    assert found("web") == [1, 2, 3]
    assert found("web:0") == [1, 3]
    assert found("web:1", "pri*") == [2, 3, 5, 9, 10]
    assert found("backend") == [1, 2, 3, 4, 7, 8]
    assert found("all") == found() == list(range(1, 12))
    assert found("gone") == []


def test_following_events_of_what_is_named_ends_with_the_supervisor(
    run: Run, supervisor: FakeSupervisor
) -> None:
    def asked(call: Call) -> Any:
        if call.params["names"] != ["a"]:
            raise RefusalError("no target or instance 'b'", code="target.not_found", exit_status=4)
        return {**status(target("a")), "seq": 0}

    supervisor.handlers["status"] = asked
    assert run("events", "b", "--since", "1").status == 4

    def script() -> None:
        supervisor.wait_for_subscriber()
        supervisor.wait_for("events.since")
        supervisor.emit("x", target="b")
        supervisor.emit("config.applied")
        supervisor.emit("x", target="a")
        supervisor.emit("supervisor.stopping")
        supervisor.stop()

    thread = threading.Thread(target=script)
    thread.start()
    outcome = run("events", "a", "--json")
    thread.join()
    assert [json.loads(line)["type"] for line in outcome.out.splitlines()] == ["snapshot", "x"]
    assert (outcome.status, outcome.err) == (0, "asyncsup: the supervisor has ended\n")


def test_events_say_when_some_are_lost(run: Run, supervisor: FakeSupervisor) -> None:
    for _ in range(5):
        supervisor.emit("x")
    supervisor.oldest = 4
    outcome = run("events", "--since", "1", "--no-follow")
    assert outcome.err == "asyncsup: 2 events from number 2 on lost: no longer kept\n"
    lines = run("events", "--since", "1", "--no-follow", "--json").out.splitlines()
    assert json.loads(lines[0]) == {"type": "gap", "first": 2, "last": 5, "lost": 2, "restarted": False}


# --- patches ------------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path) -> Path:
    file = tmp_path / "p.zip"
    file.write_bytes(b"no real package, the supervisor is none either")
    return file


def test_apply_gives_the_path_of_a_file_and_the_checksum_beside_it(
    run: Run, supervisor: FakeSupervisor, package: Path
) -> None:
    supervisor.handlers["patch.apply"] = lambda _: report()
    outcome = run("patch", "apply", package)
    assert outcome.status == 0
    assert outcome.out.splitlines()[0] == "patch pricing-rules 2.3.0, build 300, warm, 3f9ac1d2e5b7"
    assert outcome.out.splitlines()[-1].startswith("verdict: COMMITTED")
    digest = "AB" * 32
    package.with_name("p.zip.sha256").write_text(f"{'0' * 64}  other.zip\n{digest} *p.zip\n")
    run("patch", "apply", package, "--target", "pricer", "--no-wait")
    run("patch", "apply", package, "--crc32", "851398428")
    assert supervisor.called("patch.apply") == [
        {"path": str(package), "wait_busy": True},
        {"path": str(package), "sha256": digest.lower(), "target": "pricer", "wait_busy": False},
        {"path": str(package), "crc32": "851398428", "wait_busy": True},
    ]


def test_a_checksum_file_that_names_no_checksum_is_not_passed_over(run: Run, package: Path) -> None:
    package.with_name("p.zip.sha256").write_text(f"{'0' * 64}  other.zip\n")
    outcome = run("patch", "apply", package)
    assert outcome.status == 2
    assert "p.zip.sha256 has no SHA-256 for p.zip" in outcome.err


@pytest.mark.parametrize("verb", ["plan", "apply"])
def test_where_a_checksum_and_a_name_have_come_from_is_said(
    run: Run, supervisor: FakeSupervisor, package: Path, verb: str
) -> None:
    digest = "ab" * 32

    def another(_: Call) -> Any:
        raise RefusalError(f"p.zip: {digest} was asked for", code="digest.sha256", exit_status=21)

    supervisor.handlers[f"patch.{verb}"] = another
    package.with_name("p.zip.sha256").write_text(f"{digest}  p.zip\n")
    whence = f"asyncsup: the SHA-256 that is asked for is the one in {package}.sha256\n"
    assert run("patch", verb, package).err == f"{whence}asyncsup: p.zip: {digest} was asked for\n"
    assert run("patch", verb, package, "--sha256", digest).err == f"asyncsup: p.zip: {digest} was asked for\n"

    supervisor.handlers[f"patch.{verb}"] = refuse("patch.not_found", 4)
    assert "there is no file typo.zip in this folder\n" in run("patch", verb, "typo.zip").err


def test_apply_sends_the_file_where_the_supervisor_cannot_open_it(
    run: Run, supervisor: FakeSupervisor, package: Path
) -> None:
    supervisor.handlers["patch.apply"] = lambda _: report()
    assert run("patch", "apply", package, "--upload").status == 0
    assert supervisor.uploads["upload-1"] == package.read_bytes()
    assert supervisor.called("patch.apply") == [{"upload": "upload-1", "wait_busy": True}]


def test_apply_shows_the_steps_as_they_happen(run: Run, supervisor: FakeSupervisor, package: Path) -> None:
    def apply(call: Call) -> Any:
        for step in ("stage", "switch"):
            supervisor.emit("patch.step", txn=12, step=step, target="pricer", detail="done")
        supervisor.emit("patch.step", txn=13, step="stage", target="web", detail="somebody else's")
        supervisor.emit("patch.progress", txn=12, done=1, total=2)
        supervisor.emit("patch.step", txn=12, step="commit", publish=False)
        supervisor.emit("patch.ended", txn=12, verdict="committed", publish=False)
        return report()

    supervisor.handlers["patch.apply"] = apply
    assert run("patch", "apply", package).out.splitlines()[:5] == [
        "  stage     pricer: done",
        "  switch    pricer: done",
        "  (transaction 13) stage     web: somebody else's",
        "  commit",
        "patch pricing-rules 2.3.0, build 300, warm, 3f9ac1d2e5b7",
    ]


@pytest.mark.parametrize(
    ("code", "exit_status"),
    [
        ("gate.region", 20), ("digest.sha256", 21), ("patch.target_refused", 22), ("patch.rolled_back", 23),
        ("patch.rollback_failed", 24), ("target.busy", 8), ("not_allowed", 6),
    ],
)  # fmt: skip
def test_a_patch_that_was_not_applied_has_its_exit_status_and_its_transcript(
    run: Run, supervisor: FakeSupervisor, package: Path, code: str, exit_status: int
) -> None:
    supervisor.handlers["patch.apply"] = refuse(code, exit_status, report=refused_report())
    outcome = run("patch", "apply", package)
    assert outcome.status == exit_status
    assert "refused  region  patch is for India" in outcome.out
    assert outcome.err == f"asyncsup: refused with {code}\n"
    outcome = run("patch", "apply", package, "--json")
    assert outcome.status == exit_status
    assert outcome.json["error"]["code"] == code
    assert outcome.json["error"]["report"] == refused_report()


def test_apply_with_json_prints_the_report_and_nothing_else(
    run: Run, supervisor: FakeSupervisor, package: Path
) -> None:
    supervisor.handlers["patch.apply"] = lambda _: report()
    assert run("patch", "apply", package, "--json").json == report()
    assert run("patch", "apply", package, "-q") == (0, "", "")


def test_apply_without_a_name_takes_the_inbox_oldest_build_first(
    run: Run, supervisor: FakeSupervisor
) -> None:
    supervisor.handlers |= {"patch.list": lambda _: INBOX, "patch.apply": lambda _: report()}
    outcome = run("patch", "apply")
    assert outcome.status == 0
    assert [call["name"] for call in supervisor.called("patch.apply")] == ["bad.zip", "c.zip", "b.zip"]
    assert outcome.err == "asyncsup: a.zip is not complete yet; left alone\n"
    assert len(run("patch", "apply", "--json").json["reports"]) == 3


def test_apply_of_the_inbox_stops_at_the_first_failure(run: Run, supervisor: FakeSupervisor) -> None:
    supervisor.handlers |= {"patch.list": lambda _: INBOX, "patch.apply": refuse("zip.no_end", 21)}
    outcome = run("patch", "apply")
    assert outcome.status == 21
    assert len(supervisor.called("patch.apply")) == 1
    assert "not tried, because the one before failed: c.zip, b.zip" in outcome.err


def test_apply_of_an_empty_inbox_is_nothing_to_do(run: Run, supervisor: FakeSupervisor) -> None:
    supervisor.handlers["patch.list"] = lambda _: {"inbox": [], "trust": "digest"}
    assert run("patch", "apply") == (0, "the inbox is empty\n", "")
    assert run("patch", "apply", "--sha256", "0" * 64).status == 2


def test_what_is_no_file_is_a_name_in_the_inbox_unless_it_is_a_path(
    run: Run, supervisor: FakeSupervisor
) -> None:
    supervisor.handlers["patch.apply"] = lambda _: report()
    assert run("patch", "apply", "b.zip").status == 0
    assert supervisor.called("patch.apply") == [{"name": "b.zip", "wait_busy": True}]
    outcome = run("patch", "apply", "./b.zip")
    assert (outcome.status, outcome.err) == (4, "asyncsup: there is no file ./b.zip\n")


def test_a_time_out_waits_until_the_patch_is_undone(
    run: Run, supervisor: FakeSupervisor, package: Path
) -> None:
    def apply(_: Call) -> Any:
        supervisor.emit("patch.step", txn=12, step="stage", target="pricer", detail="done")
        return PENDING

    def cancel(_: Call) -> Any:
        supervisor.emit("patch.step", txn=12, step="undo", target="pricer", detail="staged files removed")
        supervisor.emit("patch.ended", txn=12, verdict="rolled_back")
        return {}

    supervisor.handlers |= {"patch.apply": apply, "cancel": cancel}
    outcome = run("patch", "apply", package, "--timeout", "300ms")
    assert outcome.status == 124
    assert outcome.out.splitlines() == [
        "  stage     pricer: done",
        "  undo      pricer: staged files removed",
    ]
    assert "transaction 12: rolled_back (`asyncsup patch show 12`)" in outcome.err


def test_plan_is_20_when_it_would_be_refused(run: Run, supervisor: FakeSupervisor, package: Path) -> None:
    plan: dict[str, Any] = dict(PLAN)
    supervisor.handlers["patch.plan"] = lambda _: plan
    outcome = run("patch", "plan", package)
    assert outcome.status == 0
    assert outcome.out.endswith("verdict: APPLY: it would be applied\n")
    plan |= {"verdict": "refused", "exit_status": 20}
    assert run("patch", "plan", package, "--json") == (20, json.dumps(plan, indent=2) + "\n", "")


def test_list_history_show_and_rollback(run: Run, supervisor: FakeSupervisor) -> None:
    transaction = {**HISTORY["transactions"][0], "steps": report()["steps"], "files": []}
    supervisor.handlers |= {
        "patch.list": lambda _: INBOX,
        "patch.history": lambda _: HISTORY,
        "patch.show": lambda _: transaction,
        "patch.rollback": lambda _: report(action="rollback", build=200),
    }
    assert "no end record" in run("patch", "list").out
    assert "rolled_back" in run("patch", "history", "pricer", "-n", "5").out
    assert "stage     pricer: 3 files (20 ms)" in run("patch", "show", "12").out
    assert run("patch", "rollback", "pricer").out.splitlines()[0] == "rollback to build 200"
    assert supervisor.called("patch.history") == [{"target": "pricer", "limit": 5}]
    assert supervisor.called("patch.show") == [{"id": "12"}]
    assert supervisor.called("patch.rollback") == [{"target": "pricer", "wait_busy": True}]
    assert run("patch", "history", "--json").json == HISTORY


# --- patches without a supervisor ---------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name, files in {
        "old": {"job.json": "1", "libs/lib.txt": "x", "same": "s"},
        "new": {"job.json": "2", "rest/res.json": "{}", "same": "s"},
    }.items():
        for path, content in files.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_text(content)
    return tmp_path / "old", tmp_path / "new"


def build_arguments(output: Path, target: str = "pricer") -> list[str | Path]:
    return [
        "-o",
        output,
        "--name",
        "rules",
        "--version",
        "2",
        "--build",
        "300",
        "-t",
        target,
        "-r",
        "us-east-1",
    ]


def test_build_makes_a_package_that_verify_accepts(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "p.zip"
    arguments = [
        *build_arguments(output),
        "--warm",
        "--probation",
        "2s",
        "--notes",
        "n",
        "--expires",
        "2099-01-01",
    ]
    outcome = offline(capsys, "patch", "build", *folders, *arguments, "--checksum", "--build-min", "200")
    assert outcome.status == 0, outcome.err
    digest = hashlib.sha256(output.read_bytes()).hexdigest()
    assert f"sha256  {digest}" in outcome.out
    assert output.with_name("p.zip.sha256").read_text() == f"{digest}  p.zip\n"
    verified = offline(capsys, "patch", "verify", output, "--json")
    assert verified.status == 0
    manifest = verified.json["manifest"]
    assert {file["path"]: file["op"] for file in manifest["files"]} == {
        "job.json": "modified", "libs/lib.txt": "deleted", "rest/res.json": "new",
    }  # fmt: skip
    assert (manifest["probation"], manifest["expires"], manifest["notes"]) == (
        2.0,
        "2099-01-01T00:00:00Z",
        "n",
    )
    assert manifest["requires"] == {"build_min": 200}
    assert verified.json["checked_against"] == "sha256"
    assert verified.json["warnings"] == []
    assert verified.json["id"] == digest


def test_build_of_one_folder_makes_everything_new(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = offline(
        capsys, "patch", "build", folders[1], *build_arguments(tmp_path / "p.zip"), "--cold", "--json"
    )
    assert outcome.status == 0, outcome.err
    assert {file["op"] for file in outcome.json["manifest"]["files"]} == {"new"}
    assert outcome.json["manifest"]["kind"] == "cold"


def test_nobody_is_followed_when_there_is_nobody(run: Run, supervisor: FakeSupervisor) -> None:
    supervisor.handlers |= {"logs": lambda _: {"chunks": []}, "logs.follow": lambda _: {"chunks": []}}
    assert run("logs", "-f", "web").status == 0
    assert not supervisor.called("logs.follow")


def test_build_makes_prototype_packages_too(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "proto.zip"
    arguments: list[str | Path] = ["-o", output, "--build", "300", "-r", "us-east-1", "--warm", "--prototype"]
    outcome = offline(capsys, "patch", "build", *folders, *arguments, "--json")
    assert outcome.status == 0, outcome.err
    crc = str(zlib.crc32(output.read_bytes()))
    assert outcome.json["crc32"] == crc
    verified = offline(capsys, "patch", "verify", output, "--crc32", crc, "--json").json
    assert verified["format"] == "prototype"
    assert verified["checked_against"] == "crc32"
    assert {file["path"]: file["op"] for file in verified["manifest"]["files"]} == {
        "job.json": "modified", "libs/lib.txt": "deleted", "rest/res.json": "new",
    }  # fmt: skip
    assert offline(capsys, "patch", "verify", output, "--crc32", "1").status == 21


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--warm"], "a patch needs --name, -t/--target, -r/--region"),
        ([], "one of the arguments --warm --cold is required"),
        (["--warm", "--prototype"], "exactly one region"),
        (
            ["--warm", "--name", "x", "--version", "1", "-t", "a", "-r", "b", "--expires", "soon"],
            "--expires: 'soon'",
        ),
    ],
)
def test_build_says_what_is_missing(
    folders: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    extra: list[str],
    said: str,
) -> None:
    output = tmp_path / "p.zip"
    outcome = offline(capsys, "patch", "build", *folders, "-o", output, "--build", "3", *extra)
    assert outcome.status == 2
    assert said in outcome.err
    assert not output.exists()


@pytest.mark.parametrize(
    "option",
    [
        ("--include", "*.json"), ("--exclude", "*.json"), ("--expires", "2099-01-01"), ("--build-min", "0"),
        ("--build-max", "9"), ("--probation", "0"), ("--notes", "x"), ("--normal-modes",), ("--delta",),
    ],
    ids=lambda option: option[0],
)  # fmt: skip
def test_a_prototype_package_refuses_what_it_cannot_hold(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], option: tuple[str, ...]
) -> None:
    output = tmp_path / "p.zip"
    arguments: list[str | Path] = ["-o", output, "--build", "3", "-r", "here", "--warm", "--prototype"]
    outcome = offline(capsys, "patch", "build", *folders, *arguments, *option)
    assert outcome.status == 2
    assert f"a prototype package has none of {option[0]}" in outcome.err
    assert not output.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("audit", "list", "--after", "9" * 30),
        ("events", "--since", "9" * 30),
        ("patch", "build", "x", "-o", "y", "--build", "1", "--warm", "--expires", "0001-01-01T00+14:00"),
    ],
)
def test_numbers_and_times_there_are_none_of(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    assert offline(capsys, *arguments).status == 2


def test_build_into_a_folder_that_is_not_there_is_an_error_not_a_traceback(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = offline(capsys, "patch", "build", *folders, *build_arguments(tmp_path / "no/p.zip"), "--warm")
    assert outcome.status == 1
    assert f"there is no folder {tmp_path}/no" in outcome.err


def test_verify_finds_a_flipped_byte_and_a_wrong_checksum(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "p.zip"
    assert offline(capsys, "patch", "build", *folders, *build_arguments(output), "--warm").status == 0
    assert offline(capsys, "patch", "verify", output, "--sha256", "0" * 64).status == 21
    outcome = offline(capsys, "patch", "verify", output)
    assert "warning: checked only against itself" in outcome.out
    content = bytearray(output.read_bytes())
    content[len(content) // 2] ^= 1
    output.write_bytes(content)
    outcome = offline(capsys, "patch", "verify", output, "--json")
    assert outcome.status == 21
    assert outcome.json["error"]["exit_status"] == 21
    assert offline(capsys, "patch", "verify", tmp_path / "missing.zip").status == 4


# --- configuration ------------------------------------------------------------------------------------------


def test_init_writes_what_config_check_accepts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert offline(capsys, "init", tmp_path / "new").status == 0
    file = tmp_path / "new/asyncsup.toml"
    outcome = offline(capsys, "config", "check", file)
    assert (outcome.status, outcome.out) == (0, f"{file}: valid, 1 target (hello)\n")
    assert offline(capsys, "config", "check", "-c", file, "--json").json["targets"] == ["hello"]
    assert offline(capsys, "init", tmp_path / "new").status == 2
    assert offline(capsys, "init", tmp_path / "new", "--force").status == 0


def test_config_check_reports_every_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "asyncsup.toml"
    file.write_text('[target.web]\ncomand = "x"\n[patch]\nkeep = "many"\n')
    outcome = offline(capsys, "config", "check", file, "--json")
    assert outcome.status == 5
    assert len(outcome.json["error"]["problems"]) >= 2
    assert outcome.err.count("asyncsup: ") == len(outcome.err.splitlines()) >= 2
    assert offline(capsys, "config", "check", tmp_path / "missing.toml").status == 5


# --- as a process -------------------------------------------------------------------------------------------


def test_ctrl_c_while_the_command_is_still_being_loaded_is_no_traceback() -> None:
    script = (
        "import sys\n"
        "from asyncsup.cli import main\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'asyncsup.cli.command_line':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "sys.exit(main(['status']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=WAIT_SECONDS, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def through_shell(redirections: str, *argv: str | Path) -> subprocess.CompletedProcess[str]:
    command = ["sh", "-c", f'exec "$@" {redirections}', "sh", sys.executable, "-m", "asyncsup", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False)


@pytest.mark.parametrize("argv", [["version"], ["--help"], ["config", "schema"]], ids=" ".join)
def test_an_output_that_has_no_room_is_an_error_and_no_traceback(argv: list[str]) -> None:
    done = through_shell(">/dev/full", *argv)
    assert (done.returncode, done.stderr) == (1, "asyncsup: standard output: No space left on device\n")
    assert through_shell("2>/dev/full", "no-such-verb").returncode == 2


def test_streams_that_are_closed_lead_nowhere() -> None:
    done = through_shell("<&- >&- 2>&-", "version")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert through_shell(">&- 2>&-", "no-such-verb").returncode == 2


def test_status_imports_nothing_it_has_to_wait_for(supervisor: FakeSupervisor) -> None:
    script = (
        "import sys; from asyncsup.cli import main; status = main(sys.argv[1:]); "
        "print(*sorted(sys.modules), file=sys.stderr); sys.exit(status)"
    )
    file = supervisor.folder / "asyncsup.toml"
    file.write_text('[supervisor]\nruntime_dir = "."\n')
    done = subprocess.run(
        [sys.executable, "-c", script, "-c", file, "status"],
        capture_output=True, text=True, timeout=WAIT_SECONDS, check=True,
    )  # fmt: skip
    assert done.stdout.startswith("NAME")
    loaded = set(done.stderr.split())
    assert {"asyncsup.cli", "asyncsup.render", "asyncsup.quick"} <= loaded
    of_verbs = {f"asyncsup.cli.{verb_of(words).where.rpartition('.')[0]}" for words in verbs()}
    assert loaded & of_verbs == {"asyncsup.cli.targets"}
    forbidden = {
        "anyio", "asyncio", "asyncsup.client", "asyncsup.config", "asyncsup.supervisor", "concurrent.futures",
        "dataclasses", "difflib", "importlib.metadata", "inspect", "logging", "msgspec", "orjson",
        "prompt_toolkit", "shutil", "subprocess", "tempfile", "uuid", "zmq",
    }  # fmt: skip
    # What the environment itself brings along at every start is not ours.
    bare = subprocess.run(
        [sys.executable, "-c", "import sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    assert loaded & (forbidden - set(bare.stdout.split())) == set()


def test_ctrl_c_cancels_the_request_and_is_130(supervisor: FakeSupervisor) -> None:
    supervisor.handlers["stop"] = lambda _: PENDING
    child = subprocess.Popen(
        [*ASYNCSUP, "--endpoint", supervisor.endpoint, "stop", "web"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    supervisor.wait_for("stop")
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=WAIT_SECONDS)
    assert (child.returncode, out, err) == (130, b"", b"")
    assert supervisor.wait_for("cancel").params == {"id": supervisor.wait_for("stop").id}


def test_ctrl_c_during_a_patch_stays_until_it_is_undone(supervisor: FakeSupervisor, package: Path) -> None:
    def apply(_: Call) -> Any:
        supervisor.emit("patch.step", txn=3, step="stage", target="pricer", detail="done")
        return PENDING

    supervisor.handlers["patch.apply"] = apply
    child = subprocess.Popen(
        [*ASYNCSUP, "--endpoint", supervisor.endpoint, "patch", "apply", package],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "  stage     pricer: done\n"
    child.send_signal(signal.SIGINT)
    supervisor.wait_for("cancel")
    supervisor.emit("patch.step", txn=3, step="undo", detail="put back")
    supervisor.emit("patch.ended", txn=3, verdict="rolled_back")
    out, err = child.communicate(timeout=WAIT_SECONDS)
    assert child.returncode == 130
    assert out == "  undo      put back\n"
    assert "transaction 3: rolled_back" in err


def test_a_reader_that_goes_away_ends_a_follower_quietly(supervisor: FakeSupervisor) -> None:
    supervisor.handlers["status"] = lambda _: {**status(), "seq": 0}
    child = subprocess.Popen(
        [*ASYNCSUP, "--endpoint", supervisor.endpoint, "events"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"no targets\n"
    child.stdout.close()
    ended = threading.Event()

    def talk() -> None:
        while not ended.wait(0.02):
            supervisor.emit("instance.status", instance="a:0", text="x")

    thread = threading.Thread(target=talk)
    thread.start()
    try:
        assert child.wait(WAIT_SECONDS) == 0
    finally:
        ended.set()
        thread.join()
        child.kill()
    assert child.stderr is not None
    with child.stderr:
        assert child.stderr.read() == b""


def test_help_that_nobody_reads_is_no_failure() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [*ASYNCSUP, "--help"], stdout=writer, stderr=subprocess.PIPE, timeout=WAIT_SECONDS, check=False
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def on_terminal(*argv: str | Path, **environ: str) -> str:
    """What a command writes to a terminal."""
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [*ASYNCSUP, *map(str, argv)],
        stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm", **environ},
    )  # fmt: skip
    os.close(theirs)
    written = b""
    try:
        while piece := os.read(ours, 65536):
            written += piece
    except OSError:  # EIO: the last writer has closed it
        pass
    finally:
        os.close(ours)
    child.wait(WAIT_SECONDS)
    return written.decode()


def test_colour_is_for_terminals_that_want_it(
    supervisor: FakeSupervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    where = ("--endpoint", supervisor.endpoint)
    assert "\x1b[32mrunning" in on_terminal(*where, "status")
    for plain in (
        on_terminal(*where, "status", NO_COLOR="1"),
        on_terminal(*where, "status", TERM="dumb"),
        on_terminal(*where, "--no-color", "status"),
        process(*where, "status").stdout,
    ):
        assert "running" in plain
        assert "\x1b" not in plain


def test_a_terminal_shows_progress_on_one_line_and_a_pipe_does_not(
    supervisor: FakeSupervisor, package: Path
) -> None:
    def apply(_: Call) -> Any:
        supervisor.emit("patch.progress", txn=3, done=512, total=1024)
        supervisor.emit("patch.progress", txn=3, done=1024, total=1024)
        return report()

    supervisor.handlers["patch.apply"] = apply
    arguments = ("--endpoint", supervisor.endpoint, "patch", "apply", package)
    shown = on_terminal(*arguments, "--no-color")
    assert "\r[########################################] 100%  1.0 KiB of 1.0 KiB\x1b[K\r\x1b[K" in shown
    assert "%" not in process(*arguments).stdout


def test_what_a_target_writes_cannot_play_with_the_terminal(supervisor: FakeSupervisor) -> None:
    supervisor.handlers["logs"] = lambda _: {"chunks": [chunk("a:0", "\x1b[31mred\x1b[0m\x1b]0;title\x07\n")]}
    shown = on_terminal("--endpoint", supervisor.endpoint, "logs", "a")
    assert shown == "\x1b[31mred\x1b[0m\\x1b]0;title\\x07\x1b[0m\r\n"
    shown = on_terminal("--endpoint", supervisor.endpoint, "logs", "a", "--no-color")
    assert shown == "red\\x1b]0;title\\x07\r\n"


def test_names_before_lines_keep_their_colour_and_are_aligned(supervisor: FakeSupervisor) -> None:
    def shown(*names: str) -> dict[str, str]:
        supervisor.handlers["logs"] = lambda call: {"chunks": [chunk(call.params["name"], "x\n")]}
        lines = on_terminal("--endpoint", supervisor.endpoint, "logs", *names).splitlines()
        return {str(line.split("m")[1].split(" ")[0]): line for line in lines}

    two, three = shown("a:0", "longer:10"), shown("b:3", "longer:10", "a:0")
    assert two.items() <= three.items()
    assert len({line.split("m")[0] for line in three.values()}) == 3
    assert len({line.index("|") for line in three.values()}) == 1
    supervisor.handlers["logs"] = lambda call: {"chunks": [chunk(call.params["name"], "x\n")]}
    assert "\x1b" not in on_terminal("--endpoint", supervisor.endpoint, "logs", "a:0", "b:0", "--no-color")
    assert "\x1b" not in process("--endpoint", supervisor.endpoint, "logs", "a:0", "b:0").stdout


def test_a_name_the_encoding_has_no_letters_for_is_written_out(supervisor: FakeSupervisor) -> None:
    supervisor.handlers["status"] = lambda _: status(target("世界"))
    done = process("--endpoint", supervisor.endpoint, "status", PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert r"\u4e16\u754c" in done.stdout


# --- the real supervisor ------------------------------------------------------------------------------------

TARGETS = """
[supervisor]
region = "us-east-1"
[patch]
probation = "0s"
[defaults]
build = 200
min_uptime = "0s"
[target.talker]
command = ["sh", "-c", "echo hello; while :; do sleep 1; done"]
[target.idle]
command = ["sleep", "1000"]
autostart = false
[target.patched]
command = ["sleep", "1000"]
root = "work"
reload_command = ["true"]
"""


def test_a_supervisor_with_closed_streams_has_nothing_else_in_their_place(serve: Serve) -> None:
    serve.write(TARGETS.partition("[target.patched]")[0])
    serve.process = subprocess.Popen(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *serve.command()])
    with serve.connect() as client:
        info = client.call("supervisor.info")
    for pid in (serve.process.pid, info["pid"]):
        assert [str(Path(f"/proc/{pid}/fd/{number}").readlink()) for number in range(3)] == ["/dev/null"] * 3
    assert serve.stop() == 0


def test_a_day_with_the_real_supervisor(
    serve: Serve, folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*argv: str | Path) -> Outcome:
        return offline(capsys, "-c", serve.config, *argv)

    folders[0].rename(serve.folder / "work")
    serve.start(TARGETS).close()
    assert run("wait", "talker", "patched", "--for", "running", "--timeout", "20s").status == 0
    wait_for(lambda: run("status", "-q").status == 0, "everything to be ready")
    assert run("status", "nope").status == 4
    assert "talker" in run("status").out
    assert run("show", "patched").status == 0
    assert run("show").status == 0
    wait_for(lambda: run("logs", "talker").out == "hello\n", "the output of talker")
    assert run("stop", "talker").status == 0
    assert run("restart", "idle", "--timeout", "20s").status == 0
    assert run("signal", "0", "idle").status == 2
    assert run("reload", "talker").status == 3
    events = run("events", "--no-follow", "--json").out.splitlines()
    assert [json.loads(line)["seq"] for line in events] == list(range(1, len(events) + 1))

    package = serve.inbox / "p.zip"
    arguments = build_arguments(package, "patched")
    built = run("patch", "build", serve.folder / "work", folders[1], *arguments, "--warm", "--checksum")
    assert built.status == 0, built.err
    assert "p.zip" in wait_for(lambda: run("patch", "list").out, "the inbox")
    assert run("patch", "plan", "p.zip").out.splitlines()[-1] == "verdict: APPLY: it would be applied"
    applied = run("patch", "apply")
    assert applied.status == 0, applied.err
    assert applied.out.splitlines()[-1].startswith("verdict: COMMITTED")
    assert (serve.folder / "work/job.json").read_text() == "2"
    assert (
        run("patch", "apply", serve.inbox / "applied/p.zip")
        .out.splitlines()[-1]
        .startswith("verdict: ALREADY")
    )
    assert run("patch", "rollback", "patched").status == 0
    assert (serve.folder / "work/job.json").read_text() == "1"
    assert [txn["action"] for txn in run("patch", "history", "--json").json["transactions"]] == [
        "rollback",
        "apply",  # what was there already
        "apply",
    ]
    assert run("patch", "show", "1").status == 0
    assert run("patch", "show", "99").status == 4

    assert run("shutdown", "--timeout", "20s").out.endswith("the supervisor has ended\n")
    assert serve.process is not None
    assert serve.process.wait(60) == 0
    assert run("status").status == 7
