"""The audit: whatever is changed, removed, moved or cut off shows, and where; nothing happens unrecorded."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from store_kit import Bench, apply, begin, benches, info, memory_folder, open_store, roll_back, staged

from asyncsup import failpoints
from asyncsup.errors import StateError
from asyncsup.patch.audit import MAX_TEXT, Examiner, Head, Row, digest, encode, plain_text
from asyncsup.patch.doctor import diagnose
from asyncsup.patch.facts import Layout
from asyncsup.patch.ledger import examine_export, examine_state
from asyncsup.patch.store import Store

AT = "2026-11-23T12:00:00.000Z"


def chain(*events: str) -> list[Row]:
    """Records as state.db would hold them."""
    rows: list[Row] = []
    for number, event in enumerate(events, start=1):
        before = Head(seq=rows[-1].seq, hash=rows[-1].hash or "") if rows else None
        line = encode(before, event, AT, {"txn": number % 3, "detail": "größer\n\x07"})
        rows.append(Row(seq=number, txn=number % 3, line=line, hash=digest(line)))
    return rows


def faults(
    rows: list[Row], *, noted: Head | None = None, anchors: tuple[str, ...] = ()
) -> list[tuple[str, int | None]]:
    examiner = Examiner(anchors)
    for row in rows:
        examiner.take(row)
    examiner.finish()
    if noted is not None:
        examiner.compare(noted)
    return [(fault.code, fault.seq) for fault in examiner.faults]


ROWS = chain("one", "two", "three", "four", "five")
HEAD = Head(seq=5, hash=ROWS[-1].hash or "")


# --- records ------------------------------------------------------------------------------------------------


def test_a_record_is_canonical_json_and_carries_the_hash_of_the_one_before() -> None:
    first, second = ROWS[:2]
    assert first.line == (
        '{"at":"2026-11-23T12:00:00.000Z","detail":"größer\\n\\u0007","event":"one","prev":"'
        + "0" * 64 + '","seq":1,"txn":1}'
    ).encode()  # fmt: skip
    assert json.loads(second.line)["prev"] == hashlib.sha256(first.line).hexdigest() == first.hash


def test_a_record_takes_durations_names_of_any_bytes_and_nothing() -> None:
    fields = {"took": 0.25, "path": "odd-\udcff", "nothing": None, "deep": [{"pause": 1.0, "n": 2}]}
    value = json.loads(encode(None, "x", AT, fields))
    assert value["took_us"] == 250_000
    assert value["path"] == "odd-\\udcff"
    assert value["deep"] == [{"pause_us": 1_000_000, "n": 2}]
    assert "nothing" not in value


def test_no_text_in_a_record_is_without_end() -> None:
    text = json.loads(encode(None, "patch.held", AT, {"reason": "ü" * 10**6}))["reason"]
    assert len(text) == MAX_TEXT
    assert text.endswith("ü…")
    assert plain_text(text) == text


# --- tampering ----------------------------------------------------------------------------------------------


def test_an_untouched_chain_holds() -> None:
    assert faults(ROWS, noted=HEAD, anchors=tuple(row.hash or "" for row in ROWS)) == []


def test_any_byte_that_is_changed_shows_at_its_record() -> None:
    for at, row in enumerate(ROWS):
        for position in range(len(row.line)):
            for bit in (0x01, 0x20, 0x80):
                line = bytearray(row.line)
                line[position] ^= bit
                found = faults([*ROWS[:at], replace(row, line=bytes(line)), *ROWS[at + 1 :]], noted=HEAD)
                assert ("audit.changed", row.seq) in found
                assert {seq for _, seq in found} == {row.seq}


def test_a_changed_record_with_its_hash_made_anew_breaks_the_link_behind_it() -> None:
    for at, row in enumerate(ROWS):
        line = row.line.replace(b"gr", b"GR")
        found = faults([*ROWS[:at], replace(row, line=line, hash=digest(line)), *ROWS[at + 1 :]], noted=HEAD)
        assert found == [("audit.head", 5)] if row.seq == 5 else [("audit.chain", row.seq + 1)]


def test_a_changed_hash_shows() -> None:
    for at, row in enumerate(ROWS):
        found = faults([*ROWS[:at], replace(row, hash="f" * 64), *ROWS[at + 1 :]], noted=HEAD)
        assert found == [("audit.changed", row.seq)]


def test_removed_records_show_where_they_were() -> None:
    for first in range(5):
        for last in range(first, 5):
            found = faults([*ROWS[:first], *ROWS[last + 1 :]], noted=HEAD)
            if last == 4:
                assert ("audit.truncated", first + 1) in found
            else:
                assert found == [("audit.missing", first + 1)]


def test_moved_records_show() -> None:
    for first in range(5):
        for second in range(first + 1, 5):
            swapped = list(ROWS)
            # The lines trade places; their numbers stay, as the primary key of the table.
            swapped[first] = replace(ROWS[second], seq=first + 1)
            swapped[second] = replace(ROWS[first], seq=second + 1)
            found = faults(swapped, noted=HEAD)
            assert ("audit.order", first + 1) in found
            assert ("audit.order", second + 1) in found


def test_an_inserted_record_shows() -> None:
    for at in range(1, 5):
        forged = encode(Head(seq=at, hash=ROWS[at - 1].hash or ""), "forged", AT, {})
        row = Row(seq=at + 1, txn=None, line=forged, hash=digest(forged))
        later = [replace(each, seq=each.seq + 1) for each in ROWS[at:]]
        assert ("audit.order", at + 2) in faults([*ROWS[:at], row, *later], noted=HEAD)
        assert faults([*ROWS[:at], row, *ROWS[at:]], noted=HEAD)[0] == ("audit.order", at + 1)


def test_a_record_filed_under_another_transaction_shows() -> None:
    assert faults([*ROWS[:2], replace(ROWS[2], txn=7), *ROWS[3:]], noted=HEAD) == [("audit.filed", 3)]


def test_a_cut_tail_is_found_by_a_hash_that_was_kept() -> None:
    kept = ROWS[3].hash or ""
    assert faults(ROWS[:4], anchors=(kept,)) == []
    assert faults(ROWS[:3], anchors=(kept,)) == [("audit.anchor", None)]


def test_a_chain_made_anew_is_found_only_by_a_hash_that_was_kept() -> None:
    """What is said to be beyond us is, and the remedy is one."""
    anew = chain("one", "two", "THREE", "four", "five")
    head = Head(seq=5, hash=anew[-1].hash or "")
    assert faults(anew, noted=head) == []
    assert faults(anew, noted=head, anchors=(HEAD.hash,)) == [("audit.anchor", None)]
    assert faults(anew, noted=head, anchors=(ROWS[1].hash or "",)) == []


@pytest.mark.parametrize("line", [b"", b"{}", b"[1]", b"\xff", b'{"seq": 3}', b'{"prev":[],"seq":3,"txn":0}'])
def test_what_is_no_record_is_a_fault_and_no_crash(line: bytes) -> None:
    for row in (replace(ROWS[2], line=line), replace(ROWS[2], line=line, hash=digest(line))):
        assert {seq for _, seq in faults([*ROWS[:2], row, *ROWS[3:]])} & {3, 4}


# --- in the database ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """A state directory in which things have happened, closed; and its head."""

    folder: Path
    head: str

    def copy(self, to: Path) -> Path:
        to.mkdir()
        shutil.copy(self.folder / "state.db", to)
        return to

    def tampered(self, to: Path, *statements: str) -> Path:
        copy = self.copy(to)
        with contextlib.closing(sqlite3.connect(copy / "state.db")) as database:
            for statement in statements:
                assert database.execute(statement).rowcount > 0, statement
            database.commit()
        return copy


def eventful(base: Path) -> Kept:
    with contextlib.ExitStack() as stack:
        b = Bench(base, stack, Layout.OVERLAY, "web", "db")
        floor = replace(info(b.patch(300, modified={"app.json": b"1"})), build_floor=250)
        patch = b.patch(301, modified={"app.json": b"2"})
        txn = b.store.begin(action="apply", patch=floor, targets=["web"], asked_by="somebody")
        b.store.stage(txn, "web", b.patch(300, modified={"app.json": b"1"}))
        b.store.record(txn, "prepare", target="web", instance="web:0", detail="go ahead", took=0.01)
        b.store.switch(txn)
        b.store.commit(txn)
        b.store.finish(txn, verdict="committed")
        apply(b.store, patch, "web", "db")
        roll_back(b.store, "web")
        undone = staged(b.store, b.patch(302, modified={"app.json": b"3"}))
        b.store.switch(undone)
        b.store.finish(undone, verdict="rolled_back", error="it crashed", code="patch.probation_failed")
        b.store.hold("a" * 64, "it crashed")
        b.store.hold("b" * 64, "it crashed as well")
        b.store.unhold("b" * 64)
        b.store.write_down_attempt(
            action="apply", patch={"patch": None}, targets=["web"], asked_by="nobody", verdict="refused",
            error="too old", code="gate.build", request={"by": {"via": "control"}},
        )  # fmt: skip
        b.store.prune("web", 0)
        b.store.release("db")
        head = b.store.history.head().hash
        assert b.store.history.examine([head]).ok
    return Kept(base / "state", head)


NO_TIMES = ["'nan'", "'inf'", "'1e300'", "'-1.0'", "'soon'", "''", "x'ff'"]
"""In SQL: what the latest time cannot be."""


@pytest.fixture
def memory() -> Iterator[Path]:
    with memory_folder() as base:
        yield base


@pytest.fixture(scope="module")
def kept() -> Iterator[Kept]:
    with memory_folder() as base:
        yield eventful(base)


def codes(state: Path, *anchors: str) -> list[tuple[str, int | None]]:
    return [(fault.code, fault.seq) for fault in examine_state(state, anchors).faults]


def test_every_row_and_column_of_the_audit_is_watched(kept: Kept, memory: Path) -> None:
    count = examine_state(kept.folder).records
    assert count > 25
    assert codes(kept.folder, kept.head) == []
    last = ("audit.truncated", count)
    for seq in range(1, count + 1):
        state = kept.tampered(memory / f"d{seq}", f"DELETE FROM audit WHERE seq = {seq}")
        assert codes(state) == [last if seq == count else ("audit.missing", seq)]
        for column, value in (
            ("record", "replace(record, 'event', 'evil')"),
            ("hash", "'0' || substr(hash, 2) || 'f'"),
            ("txn", "coalesce(txn, 0) + 1"),
        ):
            change = f"UPDATE audit SET {column} = {value} WHERE seq = {seq}"
            found = codes(kept.tampered(memory / f"{column}{seq}", change))
            assert {where for _, where in found} == {seq}, (column, found)


@pytest.mark.parametrize(
    ("statements", "code"),
    [
        (["DELETE FROM audit WHERE seq > 20"], "audit.truncated"),
        (["DELETE FROM audit"], "audit.missing"),
        (["DELETE FROM meta WHERE key = 'head'"], "audit.head"),
        (["UPDATE meta SET value = replace(value, 'a', 'b') WHERE key = 'head'"], "audit.head"),
        (["UPDATE audit SET seq = 1000 WHERE seq = 7"], "audit.missing"),
        # Beside the chain, and found by what it says of it.
        (["UPDATE transactions SET build = 400 WHERE txn = 1"], "audit.history"),
        (["UPDATE transactions SET asked_by = 'nobody' WHERE txn = 2"], "audit.history"),
        (["UPDATE transactions SET phase = 'committed' WHERE phase = 'aborted'"], "audit.history"),
        (["UPDATE transactions SET verdict = 'committed', error = NULL WHERE txn = 4"], "audit.history"),
        (["UPDATE transactions SET floor = NULL WHERE txn = 1"], "audit.history"),
        (["DELETE FROM transactions WHERE txn = 3"], "audit.history"),
        (
            [
                "INSERT INTO transactions (action, phase, state, asked_by, started) "
                "VALUES ('apply', 'aborted', 'x', 'y', 0)"
            ],
            "audit.history",
        ),
        (["DELETE FROM held"], "audit.held"),
        (["INSERT INTO held VALUES ('cc', 'so there', '')"], "audit.held"),
        (["UPDATE marks SET highest = 1 WHERE target = 'web'"], "audit.marks"),
        (["UPDATE marks SET floor = NULL WHERE target = 'web'"], "audit.marks"),
        (["DELETE FROM marks WHERE target = 'db'"], "audit.marks"),
        (["UPDATE meta SET value = '1000.0' WHERE key = 'clock'"], "audit.clock"),
        *(([f"UPDATE meta SET value = {value} WHERE key = 'clock'"], "audit.clock") for value in NO_TIMES),
    ],
)  # fmt: skip
def test_tampering_with_the_database_is_found(
    statements: list[str], code: str, kept: Kept, memory: Path
) -> None:
    assert code in {found for found, _ in codes(kept.tampered(memory / "x", *statements))}


@pytest.mark.parametrize("value", NO_TIMES)
def test_a_latest_time_that_is_none_is_an_error_at_the_start(value: str, kept: Kept, memory: Path) -> None:
    """Taken for a time, it would bring what has expired back, or end the supervisor with each write."""
    state = kept.tampered(memory / "copy", f"UPDATE meta SET value = {value} WHERE key = 'clock'")
    with pytest.raises(StateError) as caught:
        Store.open(state)
    assert caught.value.error_code == "state.clock"
    assert "audit.clock" in {finding.code for finding in diagnose(state).problems}


def test_a_tail_cut_off_with_everything_that_tells_of_it_takes_a_hash_to_be_found(
    kept: Kept, memory: Path
) -> None:
    rows = sqlite3.connect(kept.folder / "state.db").execute("SELECT seq, hash, record FROM audit").fetchall()
    cut = next(seq for seq, _, record in rows if json.loads(record)["event"] == "txn.attempted")
    before = rows[cut - 2][1]
    state = kept.tampered(
        memory / "x",
        f"DELETE FROM audit WHERE seq >= {cut}",
        f"UPDATE meta SET value = '{cut - 1} {before}' WHERE key = 'head'",
    )
    # The attempt is in the history still.
    assert codes(state) == [("audit.history", None)]
    with contextlib.closing(sqlite3.connect(state / "state.db")) as database:
        database.execute("DELETE FROM transactions WHERE state = 'refused'")
        database.commit()
    assert codes(state) == []
    assert codes(state, before) == []
    assert codes(state, kept.head) == [("audit.anchor", None)]


def test_what_is_written_after_a_tail_was_cut_off_leaves_the_gap_to_be_seen() -> None:
    with memory_folder() as base, contextlib.ExitStack() as stack:
        b = Bench(base, stack, Layout.OVERLAY)
        apply(b.store, b.patch(300, modified={"app.json": b"1"}))
        b.store.close()
        count = examine_state(base / "state").records
        with contextlib.closing(sqlite3.connect(base / "state/state.db")) as database:
            database.execute(f"DELETE FROM audit WHERE seq > {count - 3}")
            database.commit()
        b.store = Store.open(base / "state")
        b.store.hold("a" * 64, "x")
        found = [(fault.code, fault.seq) for fault in b.store.history.examine().faults]
        assert found == [("audit.missing", count - 2)]


def test_a_flipped_bit_in_the_file_is_found_whatever_it_hits(kept: Kept, memory: Path) -> None:
    content = (kept.folder / "state.db").read_bytes()
    text = b'"event":"txn.confirmed"'
    assert content.count(text) == 3
    for number, match in enumerate(re.finditer(re.escape(text), content)):
        state = kept.copy(memory / f"f{number}")
        changed = bytearray(content)
        changed[match.start() + 12] ^= 4
        (state / "state.db").write_bytes(changed)
        assert [code for code, _ in codes(state)] == ["audit.changed"]
    (state / "state.db").write_bytes(content[:4096] + b"\0" * (len(content) - 4096))
    with pytest.raises(StateError) as caught:
        examine_state(state)
    assert caught.value.error_code == "state.database"


def test_an_examination_changes_nothing_and_needs_no_supervisor(kept: Kept, memory: Path) -> None:
    state = kept.copy(memory / "x")
    before = (state / "state.db").read_bytes()
    assert examine_state(state, [kept.head]).ok
    assert (state / "state.db").read_bytes() == before
    with pytest.raises(StateError) as caught:
        examine_state(memory)
    assert caught.value.error_code == "state.database_missing"


def test_an_export_is_judged_like_the_database(kept: Kept) -> None:
    with contextlib.closing(sqlite3.connect(kept.folder / "state.db")) as database:
        lines = [
            f"{line}\n".encode() for (line,) in database.execute("SELECT record FROM audit ORDER BY seq")
        ]
    found = examine_export(lines, [kept.head])
    assert found.ok
    assert found.head == Head(seq=len(lines), hash=kept.head)
    assert [f.seq for f in examine_export([*lines[:4], *lines[5:]]).faults] == [5]
    assert [
        f.seq for f in examine_export([*lines[:4], lines[4].replace(b":", b": ", 1), *lines[5:]]).faults
    ] == [5, 6]
    assert not examine_export([]).ok
    assert not examine_export(lines[:-1], [kept.head]).ok


def test_the_recipe_in_the_documentation_follows_the_chain(kept: Kept, memory: Path, capfd: Any) -> None:
    text = (Path(__file__).parent.parent / "docs/audit.md").read_text()
    recipe = re.search(r"```python\n(import hashlib.*?)```", text, re.DOTALL)
    assert recipe is not None
    with contextlib.closing(sqlite3.connect(kept.folder / "state.db")) as database:
        lines = [line for (line,) in database.execute("SELECT record FROM audit ORDER BY seq")]
    with contextlib.chdir(memory):
        Path("audit.jsonl").write_text("".join(f"{line}\n" for line in lines))
        exec(recipe[1], {})
        assert capfd.readouterr().out == f"{kept.head}\n"
        Path("audit.jsonl").write_text("".join(f"{line}\n" for line in (*lines[:5], *lines[6:])))
        with pytest.raises(AssertionError):
            exec(recipe[1], {})


def test_every_event_is_documented_and_every_documented_one_exists() -> None:
    here = Path(__file__).parent.parent
    source = "".join(path.read_text() for path in (here / "asyncsup").rglob("*.py"))
    table = (here / "docs/audit.md").read_text().split("| event | fields |")[1].split("\n\n")[0]
    documented = {
        name
        for row in table.splitlines()
        for name in re.findall(r"`(\w+\.\w+)`", row.split("|")[1:2][0] if "|" in row else "")
    }
    used = set(re.findall(r'(?:record|note|advance)\(\s*(?:[\w.]+, )*"(\w+\.\w+)"', source))
    used |= set(re.findall(r'event="(\w+\.\w+)"', source)) | {"txn.begun", "txn.attempted"}
    assert documented == used


# --- nothing happens unrecorded -----------------------------------------------------------------------------


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    with benches() as make:
        yield make


def events(store: Store, txn: int | None = None) -> list[str]:
    return [json.loads(row.line)["event"] for row in store.history.records(after=0, txn=txn, limit=1000)]


def test_a_transaction_is_written_down_from_beginning_to_end(bench: Callable[..., Bench]) -> None:
    b = bench(Layout.OVERLAY)
    patch = b.patch(300, modified={"app.json": b"2"})
    txn = b.store.begin(
        action="apply", patch=info(patch), targets=["web"], asked_by="root", request={"by": {"uid": 0}}
    )
    b.store.stage(txn, "web", patch)
    b.store.record(txn, "prepare", target="web", instance="web:0", detail="go ahead", took=0.5)
    b.store.switch(txn)
    b.store.record(txn, "reload", target="web", instance="web:0", detail="by sdk")
    b.store.commit(txn)
    b.store.finish(txn, verdict="committed", facts={"instances": [{"name": "web:0", "reload_took": 0.25}]})
    assert events(b.store, txn) == [
        "txn.begun", "txn.step", "txn.switched", "txn.step", "txn.confirmed", "txn.ended",
    ]  # fmt: skip
    records = [json.loads(row.line) for row in b.store.history.records(txn=txn, limit=10)]
    assert records[0]["by"] == {"uid": 0}
    assert records[1]["took_us"] == 500_000
    assert records[4]["targets"] == [{"target": "web", "generation": 1, "build": 300}]
    assert records[5]["instances"] == [{"name": "web:0", "reload_took_us": 250_000}]


def test_an_undone_transaction_is_written_down_as_such(bench: Callable[..., Bench]) -> None:
    b = bench(Layout.OVERLAY)
    txn = staged(b.store, b.patch(300, modified={"app.json": b"2"}))
    b.store.switch(txn)
    b.store.finish(txn, verdict="rolled_back", error="it crashed", code="x")
    assert events(b.store, txn) == [
        "txn.begun", "txn.switched", "txn.switched_back", "txn.undone", "txn.ended",
    ]  # fmt: skip


def test_an_attempt_is_found_in_the_history_like_a_transaction(bench: Callable[..., Bench]) -> None:
    b = bench(Layout.OVERLAY)
    gates = [{"target": "web", "build": 0, "gates": [{"name": "region", "ok": False}]}]
    number = b.store.write_down_attempt(
        action="apply", patch={"patch": "f" * 64, "build": 300}, targets=["web"], asked_by="root",
        verdict="refused", error="other region", code="gate.region",
        request={"by": {"via": "control", "uid": 0}, "gates": gates},
    )  # fmt: skip
    (entry,) = b.store.history.latest("web")
    assert (entry["txn"], entry["verdict"], entry["code"], entry["build"]) == (
        number,
        "refused",
        "gate.region",
        300,
    )
    shown = b.store.history.find("ffff")
    assert shown["request"] == {"by": {"via": "control", "uid": 0}, "gates": gates}
    assert (shown["steps"], shown["files"]) == ([], [])
    assert shown["audit"]["count"] == 1
    # It holds nothing: the next patch goes through, also after a restart.
    b.reopen()
    apply(b.store, b.patch(301, modified={"app.json": b"2"}))


def test_what_was_noted_goes_along_with_the_next_write_and_survives_one_that_fails(
    bench: Callable[..., Bench],
) -> None:
    b = bench(Layout.OVERLAY)
    database = b.store._database
    count = len(events(b.store))
    database.note("txn.step", txn=1, step="first")
    with pytest.raises(RuntimeError), database.write():
        database.record("patch.held", patch="x")
        raise RuntimeError
    assert len(database.records()) == count
    database.note("txn.step", txn=1, step="second")
    with database.write():
        database.record("patch.held", patch="y")
    tail = [json.loads(row.line) for row in database.records(after=count)]
    assert [entry.get("step") or entry["patch"] for entry in tail] == ["first", "second", "y"]


def test_what_is_noted_at_the_very_end_is_written_when_the_store_is_closed(
    bench: Callable[..., Bench],
) -> None:
    b = bench(Layout.OVERLAY)
    b.store.note("supervisor.stopping", reason="SIGTERM")
    b.reopen()
    assert "supervisor.stopping" in events(b.store)


def test_names_of_any_bytes_in_an_error_can_be_written_down(bench: Callable[..., Bench]) -> None:
    b = bench(Layout.OVERLAY)
    txn = begin(b.store, b.patch(300, modified={"app.json": b"2"}))
    b.store.record(txn, "stage", detail="\udcff.log")
    odd = {"patch": None, "name": "\udcff.zip"}
    b.store.write_down_attempt(
        action="apply",
        patch=odd,
        targets=[],
        asked_by="x",
        verdict="refused",
        error="x",
        code="x",
        request={},
    )
    b.store.finish(txn, verdict="refused", error="\udcff.log is in the way", code="x")
    b.store.hold("a" * 64, "\udcff.log")
    assert b.store.history.transaction(txn)["error"] == "\\udcff.log is in the way"
    assert b.store.history.examine().ok


# --- crashes ------------------------------------------------------------------------------------------------

POINTS = [
    "store.begin.recorded",
    "store.stage.recorded",
    "store.switch.renamed",
    "store.switch.recorded",
    "store.commit.begun",
    "store.commit.recorded",
    "store.commit.tidied",
    "store.switch_back.recorded",
    "store.abort.undone",
    "store.prune.discarded",
    "store.recover.one",
]


@pytest.mark.parametrize("point", POINTS)
def test_a_crash_leaves_a_chain_that_holds_and_no_confirmed_patch_without_its_record(
    point: str, bench: Callable[..., Bench]
) -> None:
    b = bench(Layout.OVERLAY)
    patches = [b.patch(build, modified={"app.json": b"%d" % build}) for build in (300, 301, 302)]
    apply(b.store, patches[0])
    b.store.close()

    def work() -> None:
        store = Store.open(b.base / "state")
        store.recover()
        apply(store, patches[1])
        txn = staged(store, patches[2])
        store.switch(txn)
        store.finish(txn, verdict="rolled_back", error="x", code="y")
        store.prune("web", 0)
        store.close()

    if point == "store.recover.one":
        b.store = Store.open(b.base / "state")
        staged(b.store, patches[1])
        b.store.close()
    pid = os.fork()
    if pid == 0:
        os.environ[failpoints.VARIABLE] = f"{point}:kill"
        work()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    state = b.base / "state"
    assert codes(state) == []
    b.store = Store.open(state)
    recovered = b.store.recover()
    assert b.store.history.examine().ok
    for entry in b.store.history.latest():
        known = events(b.store, entry["txn"])
        assert known[0] == "txn.begun"
        if entry["verdict"] == "committed":
            assert "txn.confirmed" in known
            assert "txn.undone" not in known
        else:
            assert "txn.undone" in known
    for each in recovered:
        assert each.txn is not None
        steps = [step for step in b.store.history.transaction(each.txn)["steps"] if step["step"] == "recover"]
        assert steps[-1]["detail"] == each.action.replace("_", " ")


# --- builds only go up --------------------------------------------------------------------------------------


def test_marks_go_up_with_patches_and_stay_whatever_becomes_of_the_generations(
    bench: Callable[..., Bench],
) -> None:
    b = bench(Layout.OVERLAY, build=200)
    assert b.store.marks("web") is None
    for build, floor in ((300, 250), (310, 100), (320, None)):
        patch = b.patch(build, modified={"app.json": b"%d" % build})
        txn = b.store.begin(
            action="apply", patch=replace(info(patch), build_floor=floor), targets=["web"], asked_by="x"
        )
        b.store.stage(txn, "web", patch)
        b.store.switch(txn)
        b.store.commit(txn)
        b.store.finish(txn, verdict="committed")
    expected = (320, 250)

    def marks() -> tuple[int, int | None]:
        found = b.store.marks("web")
        assert found is not None
        return found.highest, found.floor

    assert marks() == expected
    roll_back(b.store)
    assert (marks(), b.store.state("web").build) == (expected, 310)
    b.store.prune("web", 0)
    assert marks() == expected
    b.store.release("web")
    assert (marks(), b.store.state("web").build) == (expected, 310)
    # Another layout, and another build in the configuration.
    b.reopen(replace(b.targets[0], layout=Layout.TREE, build=1))
    assert (marks(), b.store.state("web").build) == (expected, 310)
    # Taken out of the configuration, and put back later.
    b.reopen(replace(b.targets[0], name="other", root=b.base / "elsewhere"))
    b.reopen(replace(b.targets[0], layout=Layout.TREE, build=1))
    assert (marks(), b.store.state("web").build) == (expected, 310)
    # By hand.
    b.store.close()
    shutil.rmtree(b.base / "state/generations/web")
    (b.base / "state/generations/web").mkdir()
    b.store = open_store(b.base, replace(b.targets[0], layout=Layout.TREE, build=1))
    assert marks() == expected
    assert b.store.history.examine().ok


def test_a_patch_that_was_not_confirmed_leaves_no_mark(bench: Callable[..., Bench]) -> None:
    b = bench(Layout.OVERLAY)
    txn = staged(b.store, b.patch(300, modified={"app.json": b"2"}))
    b.store.switch(txn)
    b.store.finish(txn, verdict="rolled_back", error="x", code="y")
    assert b.store.marks("web") is None


def test_an_older_state_db_put_back_is_refused_and_nothing_newer_is_removed(
    bench: Callable[..., Bench],
) -> None:
    b = bench(Layout.OVERLAY)
    apply(b.store, b.patch(300, modified={"app.json": b"1"}))
    b.store.close()
    older = (b.base / "state/state.db").read_bytes()
    b.store = Store.open(b.base / "state")
    apply(b.store, b.patch(301, modified={"app.json": b"2"}))
    b.store.close()
    newer = (b.base / "state/state.db").read_bytes()
    (b.base / "state/state.db").write_bytes(older)
    with pytest.raises(StateError) as caught:
        open_store(b.base, *b.targets)
    assert caught.value.error_code == "state.generation"
    (b.base / "state/state.db").write_bytes(newer)
    b.store = Store.open(b.base / "state")
    assert (b.root / "app.json").read_bytes() == b"2"
