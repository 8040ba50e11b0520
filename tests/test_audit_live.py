"""What a running supervisor writes down: who asked, what was decided, what everybody answered; and what it
lets nobody do: go back to an older build, or to an older time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pwd
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import ssh_kit
from conftest import Serve, wait_for
from test_patching import Field

from asyncsup import cli
from asyncsup.client import ControlClient
from asyncsup.errors import RemoteError
from asyncsup.patch.audit import digest
from asyncsup.patch.clock import SLACK_SECONDS, SeenClock
from asyncsup.patch.database import Database
from asyncsup.patch.manifest import FileChange, Kind, Manifest, Op, Requires, encode_manifest
from asyncsup.patch.signing import sign_package

DOWN = "autostart = false"


class Ground:
    """A supervisor with one target that is nothing but files, and patches for it."""

    def __init__(self, serve: Serve) -> None:
        self.serve = serve
        serve.alone = True
        self.folder = serve.folder
        (self.folder / "web").mkdir()
        (self.folder / "web/a.txt").write_text("200")

    def start(self, patch: str = 'trust = "none"', target: str = "") -> None:
        self.client = self.serve.start(
            f'[supervisor]\nregion = "home"\n[patch]\nprobation = "0s"\n{patch}\n'
            f'[target.web]\ncommand = "sleep 1000"\nroot = "web"\nbuild = 200\n{target or DOWN}\n'
        )

    def again(self, **options: str) -> None:
        self.client.close()
        self.serve.stop()
        self.start(**options)

    def package(self, build: int, *, sign: str | None = None, **more: Any) -> Path:
        content = str(build).encode()
        change = FileChange(
            path="a.txt", op=Op.MODIFIED, sha256=hashlib.sha256(content).hexdigest(), size=len(content)
        )
        manifest = Manifest(
            name="rules", version=str(build), build=build, kind=Kind.WARM, targets=("web",),
            regions=("home",), files=(change,), **more,
        )  # fmt: skip
        path = self.folder / f"{build}-{len(list(self.folder.glob('*.zip')))}.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("manifest.json", encode_manifest(manifest))
            archive.writestr("files/a.txt", content)
        if sign is not None:
            sign_package(path, key=ssh_kit.key(sign).private)
        return path

    def apply(self, package: Path, **params: Any) -> Any:
        return self.client.call("patch.apply", path=str(package), **params)

    def refused(self, package: Path, **params: Any) -> str:
        with pytest.raises(RemoteError) as caught:
            self.apply(package, **params)
        return caught.value.error_code

    def content(self) -> str:
        return (self.folder / "web/a.txt").read_text()


@pytest.fixture
def ground(serve: Serve) -> Iterator[Ground]:
    ground = Ground(serve)
    yield ground
    if hasattr(ground, "client"):
        ground.client.close()


def records(client: ControlClient, **params: Any) -> list[dict[str, Any]]:
    found = client.call("audit.list", {"after": 0, "limit": 1000, **params})["records"]
    assert all(digest(each["line"].encode()) == each["hash"] for each in found)
    return [json.loads(each["line"]) for each in found]


def only(found: list[dict[str, Any]], event: str) -> dict[str, Any]:
    (record,) = [each for each in found if each["event"] == event]
    return record


def myself(pid: int) -> dict[str, Any]:
    user = pwd.getpwuid(os.getuid()).pw_name
    return {"via": "control", "uid": os.getuid(), "gid": os.getgid(), "pid": pid, "user": user}


Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(serve: Serve, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command line in this process: its exit status and its output."""

    def run(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        status = cli.main([*arguments, "-c", str(serve.config)])
        return status, capsys.readouterr().out

    return run


# --- who, what, when ----------------------------------------------------------------------------------------


def test_a_patch_is_written_down_with_who_asked_every_gate_every_step_and_every_answer(field: Field) -> None:
    field.start("web", each={"web": "instances = 2"})
    report = field.apply(field.package("web"))
    txn = report["txn"]
    found = records(field.client, txn=txn)
    begun, ended = only(found, "txn.begun"), only(found, "txn.ended")
    assert begun["by"] == myself(os.getpid())
    assert (begun["patch"], begun["build"], begun["kind"]) == (report["patch"], 300, "warm")
    assert begun["trust"] == {"mode": "none"}
    (decided,) = begun["gates"]
    assert (decided["target"], decided["build"]) == ("web", 200)
    assert {gate["name"] for gate in decided["gates"]} > {"region", "build", "held", "expired"}
    assert all(gate["ok"] for gate in decided["gates"])
    steps = [(each["step"], each.get("instance")) for each in found if each["event"] == "txn.step"]
    for step in ("prepare", "reload"):
        assert {instance for name, instance in steps if name == step} == {"web:0", "web:1"}
    assert ("switch", None) in steps
    assert ended["verdict"] == "committed"
    assert [(i["name"], i["prepare"], i["reload"]) for i in ended["instances"]] == [
        ("web:0", "go_ahead", "ok"), ("web:1", "go_ahead", "ok"),
    ]  # fmt: skip
    assert all(i["reload_took_us"] > 0 for i in ended["instances"])
    # The head that the report and the event carry is one that the chain has.
    (event,) = [e for e in field.client.call("events.since", seq=0)["events"] if e["type"] == "patch.ended"]
    assert report["audit"] == event["audit"]
    value = field.client.call("audit.verify", heads=[report["audit"]["hash"]])
    assert (value["ok"], value["faults"]) == (True, [])
    assert not field.client.call("audit.verify", heads=["0" * 64])["ok"]
    shown = field.client.call("patch.show", id=str(txn))
    assert shown["request"]["by"] == begun["by"]
    assert shown["audit"]["last"] <= report["audit"]["seq"]


def test_whatever_is_refused_is_written_down_with_what_refused_it(ground: Ground, command: Command) -> None:
    ground.start()
    path = ground.package(100)
    assert ground.refused(path) == "gate.build"
    bad = ground.folder / "bad.zip"
    bad.write_bytes(b"PK no zip")
    assert ground.refused(bad) == "zip.not_a_zip"
    unknown = ground.package(300)
    assert ground.refused(unknown, target="web", sha256="0" * 64) == "digest.sha256"
    attempts = [each for each in records(ground.client) if each["event"] == "txn.attempted"]
    assert [(each["verdict"], each["code"]) for each in attempts] == [
        ("refused", "gate.build"), ("refused", "zip.not_a_zip"), ("refused", "digest.sha256"),
    ]  # fmt: skip
    first, second, third = attempts
    closed = [gate["code"] for gate in first["gates"][0]["gates"] if not gate["ok"]]
    assert closed == ["gate.build"]
    assert second["package"] == {"file": "bad.zip"}
    assert third["trust"] == {"mode": "none", "checked_against": "sha256"}
    history = ground.client.call("patch.history")["transactions"]
    assert [entry["code"] for entry in history] == ["digest.sha256", "zip.not_a_zip", "gate.build"]
    _, shown = command("patch", "show", str(history[-1]["txn"]))
    assert "gate.build" in shown
    assert f"uid {os.getuid()}" in shown
    # What is there already is no refusal, and written down as well.
    assert ground.apply(unknown)["verdict"] == "committed"
    again = ground.apply(unknown)
    assert again["verdict"] == "already"
    assert records(ground.client, txn=again["txn"])[0]["verdict"] == "already"


def test_who_asked_is_the_process_behind_the_socket_or_the_owner_of_the_file(ground: Ground) -> None:
    ground.start('trust = "none"\nauto = true')
    process = subprocess.Popen(
        [
            sys.executable, "-m", "asyncsup", "patch", "apply", str(ground.package(300)), "-c",
            str(ground.serve.config), "-q",
        ]
    )  # fmt: skip
    assert process.wait(60) == 0
    path = ground.package(301)
    uid, gid = (65534, 65534) if os.getuid() == 0 else (os.getuid(), os.getgid())
    os.chown(path, uid, gid)
    path.rename(ground.serve.inbox / "p.zip")
    settled = ground.serve.inbox / "applied/p.zip.json"
    wait_for(lambda: settled.exists() and not list(ground.serve.inbox.glob("*.zip")), "the patch")
    first, second = [each["by"] for each in records(ground.client) if each["event"] == "txn.begun"]
    assert first == myself(process.pid)
    assert (second["via"], second["uid"], second["gid"]) == ("inbox", uid, gid)
    assert "pid" not in second
    report = json.loads(settled.read_text())
    assert ground.client.call("audit.verify", heads=[report["audit"]["hash"]])["ok"]


def test_commit_abort_rollback_prune_release_and_a_retry_say_who(ground: Ground) -> None:
    ground.start('trust = "none"\ncommit = "manual"\nkeep = 5')
    me = myself(os.getpid())
    first = ground.apply(ground.package(300))
    assert ground.client.call("patch.commit", id=str(first["txn"]))["verdict"] == "committed"
    second = ground.apply(ground.package(301))
    assert ground.client.call("patch.abort", id=str(second["txn"]))["verdict"] == "rolled_back"
    picky = f'["sh", "-c", "test $(cat {ground.folder}/web/a.txt) != 302"]'
    ground.again(patch='trust = "none"\nkeep = 5', target=f"reload_command = {picky}")
    bad = ground.package(302)
    with pytest.raises(RemoteError) as caught:
        ground.apply(bad)
    assert caught.value.error_code == "patch.rolled_back"
    assert ground.refused(bad) == "gate.held"
    with pytest.raises(RemoteError):
        ground.apply(bad, retry_held=True)
    ground.client.call("patch.rollback", target="web")
    ground.apply(ground.package(303))
    ground.client.call("patch.prune", target="web", keep=0)
    ground.client.call("target.release", target="web")
    found = records(ground.client)
    assert only(found, "txn.commit_asked")["by"] == me
    assert (only(found, "txn.abort_asked")["txn"], only(found, "txn.abort_asked")["by"]) == (
        second["txn"],
        me,
    )
    held = [each for each in found if each["event"] == "patch.held"]
    assert {each["patch"] for each in held} == {caught.value.details["report"]["patch"]}
    assert only(found, "txn.attempted")["code"] == "gate.held"
    retried = [each for each in found if each.get("wish", {}).get("retry_held")]
    assert len(retried) == 1
    assert "tried again" in str(retried[0]["gates"])
    (back,) = [each for each in found if each["event"] == "txn.begun" and each["action"] == "rollback"]
    assert (back["by"], back["back"]["reference"]) == (me, "web")
    pruned = [each for each in found if each["event"] == "target.pruned"]
    # What was rolled back goes by itself.
    assert [(each["build"], each["by"]) for each in pruned] == [(300, {"via": "supervisor"}), (200, me)]
    assert only(found, "target.releasing")["by"] == me
    assert only(found, "target.released")["files"] == 1
    assert [each["event"] for each in found].count("supervisor.started") == 2
    assert ground.client.call("audit.verify")["ok"]


def test_a_supervisor_that_was_killed_finds_its_chain_whole_and_writes_down_what_it_takes_back(
    ground: Ground, command: Command
) -> None:
    ground.serve.environ = {"ASYNCSUP_FAILPOINT": "store.switch.recorded:kill"}
    ground.start()
    with contextlib.suppress(Exception):
        ground.apply(ground.package(300))
    assert ground.serve.process is not None
    ground.serve.process.wait(60)
    ground.client.close()
    assert command("audit", "verify", "--state-dir", str(ground.folder / ".asyncsup"))[0] == 0
    ground.serve.environ = {}
    ground.start()
    found = records(ground.client, txn=1)
    assert [each["event"] for each in found if each["event"] != "txn.step"] == [
        "txn.begun", "txn.switched", "txn.switched_back", "txn.undone", "txn.ended",
    ]  # fmt: skip
    assert [each["detail"] for each in found if each.get("step") == "recover"] == ["switched back"]
    assert ground.client.call("audit.verify")["ok"]


def test_the_commands_work_with_a_supervisor_and_without_one(
    ground: Ground, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    ground.start()
    report = ground.apply(ground.package(300))
    ground.refused(ground.package(100))
    head = report["audit"]["hash"]
    status, verified = command("audit", "verify", "--head", head, "--json")
    assert (status, json.loads(verified)["ok"]) == (0, True)
    _, exported = command("audit", "export")
    lines = exported.splitlines()
    assert json.loads(lines[0])["event"] == "chain.begun"
    assert [json.loads(line)["prev"] for line in lines[1:]] == [digest(line.encode()) for line in lines[:-1]]
    listed = command("audit", "list", "-n", "3")[1].splitlines()
    assert len(listed) == 3
    assert "gate.build" in listed[-1]
    monkeypatch.setattr("asyncsup.cli.audit.PAGE", 2)
    over_pages = command("audit", "list", "-n", "3")[1].splitlines()
    assert over_pages == listed
    of_one = command("audit", "list", "--txn", "1", "--json")[1].splitlines()
    assert {json.loads(line)["txn"] for line in of_one} == {1}
    assert command("audit", "verify", "--head", "0" * 64)[0] == 1
    # Beside the running supervisor, and after it.
    state = ("--state-dir", str(ground.folder / ".asyncsup"))
    for running in (True, False):
        if not running:
            ground.serve.stop()
        assert command("audit", "verify", "--head", head, *state)[0] == 0
        assert command("audit", "export", *state)[1].startswith(exported)
    (ground.folder / "audit.jsonl").write_text(exported)
    file = ("--file", str(ground.folder / "audit.jsonl"))
    assert command("audit", "verify", *file)[0] == 0
    (ground.folder / "audit.jsonl").write_text(exported.replace("committed", "refused", 1))
    status, tampered = command("audit", "verify", *file)
    assert status == 1
    assert "audit.chain" in tampered
    assert command("audit", "verify")[0] == 7


# --- builds only go up --------------------------------------------------------------------------------------


def test_no_older_build_comes_back_but_by_a_rollback_or_a_signed_downgrade(
    ground: Ground, command: Command
) -> None:
    signers = ground.folder / "signers"
    signers.write_text(f'alice@example.org namespaces="asyncsup-patch" {ssh_kit.key("alice").line}\n')
    required = f'trust = "required"\nallowed_signers = "{signers}"'
    ground.start(required)
    assert ground.refused(ground.package(300)) == "trust.unsigned"
    three_hundred = ground.package(300, sign="alice", build_floor=250)
    report = ground.apply(three_hundred)
    assert [signer["principals"] for signer in report["signers"]] == ["alice@example.org"]
    first, second = [
        each for each in records(ground.client) if each["event"] in {"txn.attempted", "txn.begun"}
    ]
    assert (first["code"], first["trust"]["mode"]) == ("trust.unsigned", "required")
    assert second["trust"]["signers"][0]["fingerprint"] == ssh_kit.key("alice").public.fingerprint
    assert "alice@example.org" in command("patch", "show", str(report["txn"]))[1]

    ground.client.call("patch.rollback", target="web")
    assert ground.content() == "200"
    # Higher than what is there, lower than what was.
    assert ground.refused(ground.package(280, sign="alice")) == "gate.build"
    # What was there may come again.
    assert ground.apply(three_hundred)["verdict"] == "committed"
    ground.client.call("patch.rollback", target="web")
    # Neither the generations' end, nor a release, nor another layout makes it forget.
    ground.client.call("patch.prune", target="web", keep=0)
    ground.client.call("target.release", target="web")
    ground.again(patch=required, target=f'layout = "tree"\n{DOWN}')
    assert ground.refused(ground.package(280, sign="alice")) == "gate.build"
    below = ground.package(240, sign="alice", downgrade=True, requires=Requires(build_max=300))
    assert ground.refused(below) == "gate.floor"
    lower = ground.package(260, sign="alice", downgrade=True, requires=Requires(build_max=300))
    assert ground.apply(lower)["verdict"] == "committed"
    assert ground.client.call("show", name="web")["marks"] == {"highest": 260, "floor": 250}
    assert ground.refused(ground.package(255, sign="alice")) == "gate.build"
    assert ground.apply(ground.package(270, sign="alice"))["verdict"] == "committed"
    # Whoever has kept it cannot lower with it what came after it was made.
    assert ground.apply(ground.package(310, sign="alice"))["verdict"] == "committed"
    assert ground.refused(lower) == "gate.requires"
    assert ground.content() == "310"
    assert ground.client.call("audit.verify")["ok"]


# --- a clock that was set back ------------------------------------------------------------------------------


def test_the_latest_time_is_kept_while_the_clock_is_set_back_and_forth() -> None:
    wall, elapsed = [1000.0], [50.0]
    clock = SeenClock(0.0, wall=lambda: wall[0], elapsed=lambda: elapsed[0])
    assert clock.behind() is None
    wall[0] = 1000.0 - SLACK_SECONDS
    assert clock.behind() is None
    wall[0] -= 1
    assert clock.behind() == 1000.0
    # It goes on counting, whatever becomes of the clock.
    elapsed[0] += 10_000
    assert clock.behind() == 11_000.0
    wall[0] = 11_000.0
    assert clock.behind() is None
    # Forward is no reason to doubt; what was seen then counts from then on.
    wall[0] = 90_000.0
    assert clock.behind() is None
    wall[0] = 20_000.0
    assert clock.behind() == 90_000.0
    clock.trust(wall[0])
    assert clock.behind() is None


def test_a_time_that_was_seen_before_the_start_counts() -> None:
    clock = SeenClock(5000.0, wall=lambda: 1000.0, elapsed=lambda: 0.0)
    assert clock.behind() == 5000.0


def test_nothing_that_has_expired_comes_back_to_life_while_the_clock_is_behind(ground: Ground) -> None:
    # As if a supervisor had been at work tomorrow, and somebody had set the clock back since then.
    (ground.folder / ".asyncsup").mkdir()
    database = Database.open(ground.folder / ".asyncsup/state.db")
    database.set_meta("clock", repr(time.time() + 86400))
    database.close()
    tonight = (datetime.now(UTC) + timedelta(hours=12)).strftime("%Y%m%d%H%M%SZ")
    signers = ground.folder / "signers"
    signers.write_text(
        f'alice@example.org valid-before="{tonight}" {ssh_kit.key("alice").line}\n'
        f"bob@example.org {ssh_kit.key('bob').line}\n"
    )
    ground.start(f'trust = "required"\nallowed_signers = "{signers}"')
    expires = datetime.now(UTC).replace(microsecond=0) + timedelta(days=300)
    expiring = ground.package(300, expires=expires, sign="bob")
    assert ground.refused(expiring) == "gate.clock"
    assert ground.refused(ground.package(299, sign="alice")) == "trust.expired_key"
    assert ground.apply(ground.package(299, sign="bob"))["verdict"] == "committed"
    assert ground.refused(expiring) == "gate.clock"
    plans = {
        trusted: ground.client.call("patch.plan", path=str(expiring), trust_clock=trusted)
        for trusted in (True, False)
    }
    assert {trusted: plan["code"] for trusted, plan in plans.items()} == {True: None, False: "gate.clock"}
    assert ground.refused(expiring) == "gate.clock"  # to plan with it trusts nobody
    assert ground.apply(expiring, trust_clock=True)["verdict"] == "committed"
    assert only(records(ground.client), "clock.trusted")["by"] == myself(os.getpid())
    assert ground.apply(ground.package(301, expires=expires, sign="alice"))["verdict"] == "committed"
    assert ground.client.call("audit.verify")["ok"]
