"""Values of the control API as text: aligned, safe for a terminal, nothing left out."""

from __future__ import annotations

import re
from datetime import UTC
from typing import Any

import pytest
from control_values import (
    FILES,
    HISTORY,
    INBOX,
    PATCH_ID,
    PLAN,
    gate,
    instance,
    refused_report,
    report,
    status,
    target,
)
from hypothesis import given
from hypothesis import strategies as st

from asyncsup import render
from asyncsup.render import PLAIN, Ink, clean, clean_log, cut, duration, progress, size, width_of

EVIL = "x\x1b]0;owned\x07\x1b[2J\r\n\x9b31m\u202edne\x00\udc80"
COLOUR = Ink(True)


def text(lines: list[str]) -> str:
    return "\n".join(lines)


def uncoloured(line: str) -> str:
    return re.sub(r"\x1b\[[0-9]+m", "", line)


# --- words and numbers --------------------------------------------------------------------------------------


def test_control_and_format_characters_are_written_out() -> None:
    assert clean(EVIL) == r"x\x1b]0;owned\x07\x1b[2J\r\n\x9b31m\u202edne\x00\udc80"
    assert clean("Grüße, 世界 ✓") == "Grüße, 世界 ✓"
    assert clean(12) == "12"


@given(st.text())
def test_cleaned_text_is_always_one_printable_line(value: str) -> None:
    assert clean(value).isprintable()


@given(st.text(alphabet=st.characters(codec="utf-8") | st.sampled_from("\x1b[;m0123\t\r")))
def test_a_log_line_reaches_the_terminal_with_nothing_but_tabs_and_colours(value: str) -> None:
    plain = clean_log(value, PLAIN)
    assert all(part.isprintable() for part in plain.split("\t"))
    for part in re.split(r"\x1b\[[0-9;:]*m|\t", clean_log(value, COLOUR)):
        assert part.isprintable()


def test_colours_of_a_log_line_end_with_it_and_go_where_colour_is_not_wanted() -> None:
    line = "a\t\x1b[31mred\x1b[1;5m \x1b[2J\r"
    assert clean_log(line, COLOUR) == "a\t\x1b[31mred\x1b[1;5m \\x1b[2J\x1b[0m"
    assert clean_log(line, PLAIN) == "a\tred \\x1b[2J"
    assert clean_log("plain", COLOUR) == "plain"


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (None, "-"), (0, "0 us"), (0.000085, "85 us"), (0.0012, "1.2 ms"), (0.0123, "12 ms"), (0.9, "900 ms"),
        (1, "1.0 s"), (9.94, "9.9 s"), (42.4, "42 s"), (60, "1m 00s"), (245, "4m 05s"), (11520, "3h 12m"),
        (90000, "1d 1h"), (86400 * 400, "400d 0h"),
    ],
)  # fmt: skip
def test_durations(seconds: float | None, expected: str) -> None:
    assert duration(seconds) == expected


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (None, "-"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (20 << 20, "20.0 MiB"),
        (3 << 40, "3.0 TiB"),
    ],
)
def test_sizes(count: int | None, expected: str) -> None:
    assert size(count) == expected


def test_times_are_shown_in_the_zone_asked_for_and_nonsense_is_cleaned() -> None:
    assert render.moment("2026-11-22T10:00:01.234Z", tz=UTC) == "10:00:01.234"
    assert render.moment("2026-11-22T10:00:01+02:00", date=True, tz=UTC) == "2026-11-22 08:00:01"
    assert render.moment("soon\x1b", tz=UTC) == "soon\\x1b"
    assert render.moment(None, tz=UTC) == "-"


def test_wide_letters_count_twice_and_combining_ones_not_at_all() -> None:
    assert width_of("世界") == 4
    assert width_of("e\u0301") == 1
    assert cut("世界世界", 7) == "世界..."
    assert cut("abcdef", 6) == "abcdef"
    assert cut("abcdefg", 6) == "abc..."
    assert cut("abcdefg", 2) == ".."


@given(st.text(alphabet="ab 世e\u0301", max_size=30), st.integers(0, 30))
def test_cut_text_fits(value: str, columns: int) -> None:
    assert width_of(cut(value, columns)) <= max(columns, 0)


@pytest.mark.parametrize("width", [10, 24, 40, 80, 200])
@pytest.mark.parametrize(("done", "total"), [(0, 100), (50, 100), (100, 100), (200, 100), (0, 0)])
def test_the_progress_bar_fits_its_line(width: int, done: int, total: int) -> None:
    assert len(progress(done, total, width)) <= width


def test_the_progress_bar_says_how_far_it_is() -> None:
    assert progress(512, 1024, 80) == f"[{'#' * 20}{'.' * 20}]  50%  512 B of 1.0 KiB"


# --- status -------------------------------------------------------------------------------------------------


def test_one_instance_is_one_line_and_several_are_indented_below_their_target() -> None:
    value = status(
        target("web", instance("web:0", pid=11, restarts=2), instance("web:1", pid=12, ready=False)),
        target("pricer", instance("pricer:0", uptime=11520, status_text="job 3 of 9")),
    )
    assert render.status_lines(value) == [
        "NAME     STATE    READY   PID  UPTIME  RESTARTS  BUILD  DETAIL",
        "web      running  1/2       -  -              2    200",
        "  web:0  running  yes      11  12 s           2",
        "  web:1  running  no       12  12 s           0",
        "pricer   running  yes    4711  3h 12m         0    200  job 3 of 9",
    ]


def test_the_detail_says_what_the_target_is_busy_with_and_why_an_instance_is_down() -> None:
    down = instance(
        "a:0", state="failed", pid=None, ready=False, uptime=None, exit={"status": 1, "reason": "gave up"}
    )
    value = status(
        target("a", down, state="failed", ready=False),
        target(
            "b",
            busy="patch",
            current={"operation": "patch", "asked_by": "ann", "since": 3.21},
            waiting=[{"operation": "stop", "asked_by": "root", "since": 1}],
        ),
        target("c", instance("c:0", state="failed", pid=None, exit={"signal": "SIGKILL", "status": None})),
    )
    shown = text(render.status_lines(value))
    assert "exit status 1: gave up" in shown
    assert "busy: patch for ann, since 3.2 s; queued: stop for root" in shown
    assert "killed by SIGKILL" in shown


def test_what_is_waited_for_is_said_in_one_line() -> None:
    queued = {"operation": "stop", "asked_by": "root", "since": 1}
    current = {"operation": "patch", "asked_by": "ann", "since": 3.21}
    value = status(
        target("a", busy="patch", current=current, waiting=[queued]),
        target("b", instance("b:0", state="waiting", detail="waiting for db"), state="waiting"),
        target("c", instance("c:0", state="stopping", detail="stop by ann"), state="stopping"),
        target("d"),
        target("e", state="failed"),
    )
    awaited = "a is busy: patch for ann, since 3.2 s, b is waiting for db, c is stopping (stop by ann)"
    assert render.waiting_line(value) == awaited
    value["targets"] += [target(name, state="starting") for name in ("f", "g")]
    assert render.waiting_line(value) == f"{awaited}, 2 more"
    assert render.waiting_line(status(target("d"), target("e", state="failed"))) == ""


def test_who_is_left_while_a_supervisor_ends() -> None:
    value = status(
        target("a", instance("a:0", state="stopping"), instance("a:1", state="stopped", pid=None)),
        target("b", others=[instance("b:0", state="stopping")]),
    )
    assert render.left_line(value) == "a:0 (stopping), b:0 (running), b:0 (stopping)"
    assert render.left_line(status(target("a", instance("a:0", state="stopped", pid=None)))) == ""


def test_the_last_exit_is_said_once_and_a_start_without_a_process_has_no_status() -> None:
    def last_exit(**how: object) -> str:
        value = {**target("a", instance("a:0", exit={"at": "2026-11-22T10:00:00Z", **how})), "config": {}}
        (line,) = [
            line for line in text(render.show_lines(value, tz=UTC)).splitlines() if "last exit" in line
        ]
        return line.split("last exit", 1)[1].strip()

    at = " at 2026-11-22 10:00:00"
    assert last_exit(signal=15, reason="stopped: killed by SIGTERM") == f"stopped: killed by SIGTERM{at}"
    assert last_exit(signal=15, reason="too late") == f"killed by SIGTERM: too late{at}"
    assert last_exit(status=3, reason="exit status 3; gave up") == f"exit status 3; gave up{at}"
    assert last_exit(reason="x: command not found") == f"x: command not found{at}"
    assert last_exit() == f"ended unseen{at}"
    assert last_exit(signal=999) == f"killed by 999{at}"


def test_a_narrow_terminal_loses_columns_and_the_end_of_the_detail_never_the_name() -> None:
    value = status(target("pricer", instance("pricer:0", status_text="a long story " * 10)))
    for width in (40, 60, 80, 120):
        lines = render.status_lines(value, width=width)
        assert all(len(line) <= width for line in lines)
        assert lines[1].startswith("pricer")
        assert lines[1].endswith("...")
    assert "RESTARTS" not in render.status_lines(value, width=60)[0]
    assert "a long story " * 9 in render.status_lines(value)[1]


def test_states_are_coloured_only_when_asked_and_colour_changes_no_letter() -> None:
    value = status(
        target("up"),
        target("late", instance("late:0", ready=False), ready=False),
        target("bad", state="failed", ready=False),
        target("off", state="stopped", ready=False, wanted="down"),
    )
    coloured, plain = render.status_lines(value, ink=COLOUR), render.status_lines(value)
    assert "\x1b" not in text(plain)
    assert [uncoloured(line).rstrip() for line in coloured] == plain
    for line, code in zip(coloured[1:], (32, 33, 31, 90), strict=True):
        assert f"\x1b[{code}m" in line


def test_nothing_a_target_says_reaches_the_terminal_as_it_is() -> None:
    evil = instance(EVIL, state=EVIL, status_text=EVIL, detail=EVIL, pid=None, exit={"status": EVIL})
    value = {
        **target(EVIL, evil, evil, state=EVIL, busy=EVIL, waiting=[EVIL]),
        "config": {EVIL: [EVIL, EVIL]},
    }
    lines = [
        *render.status_lines(status(value)),
        *render.show_lines({**value, "history": HISTORY["transactions"], "log": {EVIL: {EVIL: EVIL}}}),
        *render.report_lines(report(name=EVIL, reason=EVIL, code=EVIL, verdict=EVIL), steps=True),
        *render.results_lines({"results": [{"target": EVIL, "ok": False, "detail": EVIL}]}, "start"),
        *render.inbox_lines(
            {"inbox": [{"file": EVIL, "state": EVIL, "name": EVIL, "detail": EVIL, "size": 1}]}
        ),
        *render.history_lines(
            {"transactions": [{"txn": EVIL, "error": EVIL, "name": EVIL, "started": EVIL}]}
        ),
        *render.transaction_lines(
            {"steps": [{"step": EVIL, "detail": EVIL, "at": EVIL}], "files": [{"op": EVIL}]}
        ),
        *render.verified_lines({"manifest": {"notes": EVIL, "targets": [EVIL]}, "warnings": [EVIL]}),
        *render.built_lines({"path": EVIL}),
        *render.info_lines({"version": EVIL, "trust": EVIL, "counters": {EVIL: 1}}),
        *render.plan_lines(
            {"targets": [{"target": EVIL, "gates": [gate(EVIL, EVIL, EVIL)]}], "verdict": EVIL}
        ),
        render.event_line({"type": EVIL, "at": EVIL, "seq": EVIL, EVIL: EVIL}),
        render.event_line(
            {"type": "instance.state", "instance": EVIL, "to": EVIL, "reason": EVIL, "pid": EVIL}
        ),
    ]
    assert [line for line in lines if not line.isprintable()] == []


@pytest.mark.parametrize(
    ("value", "down"),
    [
        (target("a"), False),
        (target("a", instance("a:0", ready=False)), True),
        (target("a", instance("a:0"), instance("a:1", ready=False, state="starting")), True),
        (target("a", instance("a:0", ready=False, state="exited")), False),
        (target("a", instance("a:0", ready=False, state="failed")), True),
        (target("a", instance("a:0", ready=False, state="stopped"), wanted="down"), False),
        (target("a", instance("a:0", state="reloading")), False),
    ],
)
def test_down_is_what_should_run_and_is_not_ready(value: dict[str, Any], down: bool) -> None:
    assert render.is_down(value) is down


def test_no_targets_says_so() -> None:
    assert render.status_lines(status()) == ["no targets"]


def test_show_has_state_instances_settings_output_and_history() -> None:
    value = {
        **target("pricer", instance("pricer:0", exit={"status": 1, "at": "2026-11-22T10:00:00Z"})),
        "config": {"command": ["python", "a file.py"], "restart": "always", "env": {"A": "1"}, "user": None},
        "log": {"pricer:0": {"stdout": "/logs/pricer.0.log"}},
        "history": HISTORY["transactions"],
    }
    shown = text(render.show_lines(value, tz=UTC))
    assert "command  python 'a file.py'" in shown
    assert "env      A=1" in shown
    assert "user" not in shown
    assert "last exit  exit status 1 at 2026-11-22 10:00:00" in shown
    assert "pricer:0 stdout  /logs/pricer.0.log" in shown
    assert "rolled_back" in shown


def test_results_are_one_line_for_each_target() -> None:
    value = {"results": [
        {"target": "web", "ok": True, "detail": "", "state": "running", "took": 1.2},
        {"target": "pricer", "ok": False, "detail": "pricer:0 did not become ready", "took": 3},
    ]}  # fmt: skip
    assert render.results_lines(value, "start") == [
        "ok      web     running (1.2 s)",
        "failed  pricer  pricer:0 did not become ready (3.0 s)",
    ]


# --- events -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (
            {"type": "instance.state", "target": "web", "instance": "web:0", "from": "starting",
             "to": "running", "pid": 12, "reason": "ready"},
            "instance.state      web:0  starting -> running  pid 12  (ready)",
        ),
        ({"type": "instance.status", "instance": "web:0", "text": "busy"}, "instance.status     web:0  busy"),
        (
            {"type": "patch.step", "txn": 3, "step": "stage", "target": "web", "detail": "2 files",
             "took": 0.5},
            "patch.step          txn 3  stage     web: 2 files (500 ms)",
        ),
        (
            {"type": "patch.progress", "txn": 3, "done": 512, "total": 1024},
            "patch.progress      txn 3  512 B of 1.0 KiB",
        ),
        ({"type": "patch.ended", "txn": 3, "verdict": "committed"}, "patch.ended         txn 3  committed"),
        ({"type": "inbox.changed", "file": "a.zip", "state": "complete"},
         "inbox.changed       file=a.zip, state=complete"),
        ({"type": "supervisor.stopping"}, "supervisor.stopping"),
    ],
)  # fmt: skip
def test_event_lines(event: dict[str, Any], expected: str) -> None:
    at = {"seq": 5, "at": "2026-11-22T10:00:01.234Z"}
    assert render.event_line({**at, **event}, tz=UTC) == f"10:00:01.234  #5      {expected}"


# --- patches ------------------------------------------------------------------------------------------------


def test_the_transcript_says_what_the_prototype_said_and_more() -> None:
    assert render.report_lines(report()) == [
        "patch pricing-rules 2.3.0, build 300, warm, 3f9ac1d2e5b7",
        "target pricer: build 200 -> 300, generation 17, overlay",
        "  target state",
        "    pricer:0 GO_AHEAD (0) in 1.2 ms",
        "  checks",
        "    ok       target  named by the patch",
        "    ok       region  us-east-1",
        "  files",
        "    deleted   libs/lib.txt  (was not there)",
        "    modified  job.json  (adopted)",
        "    inserted  rest/res.json",
        "  told",
        "    pricer:0  told by the SDK, acknowledged in 3.4 ms, pid 4711 (the same)",
        "verdict: COMMITTED: every instance has it (320 ms, transaction 12)",
    ]


def test_the_transcript_of_a_cold_patch_shows_the_restart() -> None:
    value = report(kind="cold")
    value["targets"][0]["instances"][0] |= {"told_by": "restart", "reload_took": 1.5, "pid_after": 4720}
    lines = render.report_lines(value)
    assert "    pricer:0  told by restart, ready after 1.5 s, pid 4711 -> 4720" in lines


def test_the_transcript_of_a_refusal_names_the_gate_and_touches_nothing() -> None:
    lines = render.report_lines(refused_report())
    assert "    refused  region  patch is for India, pricer runs in us-east-1 [gate.region]" in lines
    assert lines[-2] == "verdict: REFUSED: nothing was touched (320 ms)"
    assert lines[-1] == "reason: patch is for India, pricer runs in us-east-1 [gate.region]"
    assert "  files, not touched" in lines
    assert render.report_lines(refused_report(), reason=False)[-1] == lines[-2]


def test_a_package_that_could_not_be_opened_has_no_name() -> None:
    lines = render.report_lines({"verdict": "refused", "reason": "wrong checksum", "code": "digest.sha256"})
    assert lines[0] == "the package was not opened"


def test_a_target_that_did_not_acknowledge_is_conspicuous() -> None:
    value = report("rolled_back", reason="no ack", code="patch.reload_failed")
    value["targets"][0]["instances"] = [
        {"name": "a:0", "told_by": "sdk", "reload": "failed", "reload_took": 0.5, "reason": "bad json"},
        {"name": "a:1", "told_by": "signal", "reload": None, "pid_before": None, "pid_after": None},
        {"name": "a:2", "told_by": "nobody", "reload": None, "prepare": "not asked, stopped"},
        {"name": "a:3", "told_by": "sdk", "prepare": "not_allowed", "prepare_took": 0.1},
    ]
    lines = [line.strip() for line in render.report_lines(value)]
    assert "a:0  told by the SDK, failed after 500 ms, bad json" in lines
    assert "a:1  told by signal, no acknowledgement" in lines
    assert "a:2  told by nobody" in lines
    assert "a:3 NOT_ALLOWED (1) in 100 ms" in lines
    assert any("ROLLED_BACK: applied and undone; everything is as it was before" in line for line in lines)


@pytest.mark.parametrize("verdict", ["already", "target_refused", "rollback_failed"])
def test_every_verdict_has_its_own_words(verdict: str) -> None:
    line = render.verdict_lines({"verdict": verdict})[0]
    assert line.startswith(f"verdict: {verdict.upper()}: ")


def test_steps_are_shown_when_they_were_not_seen_live() -> None:
    assert "  stage     pricer: 3 files (20 ms)" in render.report_lines(report(), steps=True)


def test_a_plan_says_what_would_happen_to_whom() -> None:
    assert render.plan_lines(PLAN) == [
        "plan for pricing-rules 2.3.0, build 300, warm, 3f9ac1d2e5b7",
        "target pricer: would be patched",
        "  checks",
        "    ok       region  us-east-1",
        "  files",
        "    deleted   libs/lib.txt  (was not there)",
        "    modified  job.json  (adopted)",
        "    inserted  rest/res.json",
        "contents: 2 files with the content",
        "in this order",
        "  stage     pricer: 3 files for build 300",
        "  reload    pricer:0: by sdk",
        "  probation 2 s",
        "  commit",
        "if something fails, everything is put back",
        "verdict: APPLY: it would be applied",
    ]


def test_a_plan_says_what_it_would_wait_for_and_why_it_would_be_refused() -> None:
    busy = {"operation": "patch", "asked_by": "alice (pid 12)", "since": 3.0}
    target = {**PLAN["targets"][0], "waits_for": [busy], "uncommitted": 12}
    lines = render.plan_lines({**PLAN, "targets": [target], "rollback": "manual"})
    (place,) = (index for index, line in enumerate(lines) if line == "  would wait for")
    assert lines[place + 1] == (
        "    patch by alice (pid 12), for 3.0 s (transaction 12, which waits for `asyncsup patch commit`)"
    )
    assert lines[-2:] == [
        "if something fails, everything is put back before the switch; after it, that is for you to decide "
        "(`asyncsup patch abort`)",
        "verdict: APPLY: it would be applied, when its turn comes, if all is still so",
    ]
    refused = {**PLAN, "steps": [], "verdict": "refused", "code": "gate.region", "reason": "not for here"}
    assert render.plan_lines(refused)[-2:] == [
        "verdict: REFUSED: nothing would be touched",
        "reason: not for here [gate.region]",
    ]


def test_the_inbox_lists_every_package_also_the_broken_ones() -> None:
    lines = render.inbox_lines(INBOX)
    assert len(lines) == 5
    assert "no end record" in lines[3]
    assert "incomplete" in lines[2]
    assert "pricer, web" in lines[4]
    assert render.inbox_lines({"inbox": []}) == ["the inbox is empty"]
    assert all(len(line) <= 80 for line in render.inbox_lines(INBOX, width=80))


def test_history_is_a_table_in_the_order_given() -> None:
    lines = render.history_lines(HISTORY, tz=UTC)
    assert [line.split()[0] for line in lines] == ["TXN", "12", "11"]
    assert "2026-11-22 10:00:00" in lines[1]
    assert lines[2].endswith("pricer:0 did not become ready")
    assert render.history_lines({"transactions": []}) == ["no transactions"]
    assert all(len(line) <= 90 for line in render.history_lines(HISTORY, width=90, tz=UTC))


def test_a_transaction_is_shown_step_by_step() -> None:
    value = {**HISTORY["transactions"][0], "steps": report()["steps"], "files": FILES}
    shown = text(render.transaction_lines(value, tz=UTC))
    assert f"id           {PATCH_ID}" in shown
    assert "10:00:00.100  stage     pricer: 3 files (20 ms)" in shown
    assert "deleted   libs/lib.txt" in shown


def test_a_verified_package_lists_its_files_with_sizes_and_what_it_was_not_checked_against() -> None:
    value = {
        "id": PATCH_ID, "size": 2048, "format": "asyncsup.patch/1", "signatures": [],
        "manifest": {
            "name": "rules", "version": "2", "build": 3, "kind": "warm", "targets": ["a"], "regions": ["x"],
            "requires": {"build_min": 2}, "probation": 10.0,
            "files": [{"path": "a", "op": "new", "sha256": "ab" * 32, "size": 2048}],
        },
        "warnings": ["checked only against itself"],
    }  # fmt: skip
    shown = text(render.verified_lines(value))
    assert "requires   build_min 2" in shown
    assert "inserted  a  (2.0 KiB, sha256 abababababab)" in shown
    assert "warning: checked only against itself" in shown


def test_trust_none_is_loud() -> None:
    assert "UNVERIFIED" in text(render.info_lines({"trust": "none"}))


def test_whoever_is_beside_an_instance_in_its_slot_has_a_row_of_its_own() -> None:
    def instance(name: str, pid: int, **more: object) -> dict[str, Any]:
        return {"name": name, "state": "running", "ready": True, "pid": pid, "role": "current", **more}

    def column(target: dict[str, Any]) -> list[list[str]]:
        rows = render.status_lines(
            {"targets": [{"name": "web", "state": "running", "ready": True, **target}]}
        )
        return [row.split()[:2] for row in rows[1:]]

    one = {"instances": [instance("web:0", 1)], "others": [instance("web:0", 2, role="standby")]}
    assert column(one) == [["web", "running"], ["web:0", "standby"]]
    several = {
        "instances": [instance("web:0", 1), instance("web:1", 2)],
        "others": [
            instance("web:1", 3, role="successor", state="starting"),
            instance("web:0", 4, role="retiring"),
            instance("web:7", 5, role="retiring"),
        ],
    }
    assert [row[0] for row in column(several)] == ["web", "web:0", "web:0", "web:1", "web:1", "web:7"]
    assert column(several)[4] == ["web:1", "successor,"]
