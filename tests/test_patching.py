"""Patches through a real supervisor onto real processes: what is promised, and every way it can go wrong."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import ssh_kit
from conftest import Asked, Serve, end_process, wait_for

from asyncsup.client import ControlClient
from asyncsup.errors import AsyncsupError, RemoteError
from asyncsup.patch.build import build_patch, build_prototype_patch
from asyncsup.patch.manifest import Kind, Requires

PROGRAM = Path(__file__).parent / "programs" / "patchable.py"
FILES = {"a.txt": "old-a", "b.txt": "old-b"}


class Field:
    """A supervisor with patchable targets, and what it takes to patch them."""

    def __init__(self, serve: Serve) -> None:
        self.serve = serve
        self.folder = serve.folder
        self.program = PROGRAM
        self.python = [sys.executable]
        self._packages = 0

    def start(
        self,
        *names: str,
        layout: str = "tree",
        start_timeout: str = "60s",
        defaults: str = "",
        patch: str = "",
        each: Mapping[str, str] | None = None,
    ) -> None:
        text = [
            '[supervisor]\nregion = "us-east-1"\n',
            f'[patch]\ntrust = "none"\nprobation = "0s"\nack_timeout = "20s"\n{patch}\n',
            '[defaults]\nprotocol = "sdk"\nbuild = 200\nrestart_delay = "50ms"\n'
            f'stop_timeout = "5s"\nstart_timeout = "{start_timeout}"\nlayout = "{layout}"\n{defaults}\n',
        ]
        for name in names:
            root = self.folder / name
            if not root.exists():
                root.mkdir()
                shutil.copy(self.program, root / "program.py")
                for path, content in FILES.items():
                    (root / path).write_text(content)
            (self.folder / f"{name}.work").mkdir(exist_ok=True)
            command = json.dumps([*self.python, str(root / "program.py")])
            text.append(
                f'[target.{name}]\nroot = "{name}"\ndirectory = "{name}.work"\ncommand = {command}\n'
                f"{(each or {}).get(name, '')}\n"
            )
        self.client = self.serve.start("\n".join(text))
        self.client.call("wait", {"names": ["all"], "for": "ready", "timeout": 100})
        for name in names:
            self.said(name, "old-a")

    def crash(self) -> None:
        """The machine loses power: no supervisor, and none of its processes."""
        with ControlClient(self.serve.endpoint) as client:
            targets = client.call("status")["targets"]
        self.serve.kill()
        for pid in [instance["pid"] for target in targets for instance in target["instances"]]:
            if pid is not None:
                end_process(pid)

    def drop(self, package: Path, name: str) -> None:
        """Into the inbox, at once."""
        shutil.copy(package, self.serve.inbox / f".{name}")
        (self.serve.inbox / f".{name}").rename(self.serve.inbox / name)

    def behave(self, name: str, **behaviour: Any) -> None:
        """In one step: the program may be reading it."""
        temporary = self.folder / f"{name}.work" / "behaviour.new"
        temporary.write_text(json.dumps(behaviour))
        temporary.replace(temporary.with_name("behaviour.json"))

    def package(
        self,
        *targets: str,
        build: int = 300,
        kind: Kind = Kind.WARM,
        regions: tuple[str, ...] = ("us-east-1",),
        files: Mapping[str, str] | None = None,
        before: Mapping[str, str] | None = None,
        **more: Any,
    ) -> Path:
        """A patch that changes a.txt and b.txt, adds sub/c.txt, and for cold ones the program."""
        self._packages += 1
        old, new = (self.folder / f"{age}-{self._packages}" for age in ("old", "new"))
        for folder in (old, new):
            folder.mkdir()
            for path, content in (before or FILES).items():
                (folder / path).write_text(content)
            shutil.copy(self.program, folder / "program.py")
        for path, content in (files or {"a.txt": "new-a", "b.txt": "new-b", "sub/c.txt": "new-c"}).items():
            (new / path).parent.mkdir(exist_ok=True)
            (new / path).write_text(content)
        if kind is Kind.COLD:
            text = (new / "program.py").read_text()
            (new / "program.py").write_text(text.replace('VERSION = "one"', 'VERSION = "two"'))
        output = self.folder / f"patch-{self._packages}.zip"
        build_patch(
            old=old, new=new, output=output, name="test",
            version=str(build), build=build, kind=kind, targets=targets, regions=regions, **more,
        )  # fmt: skip
        return output

    def apply(self, package: Path, **params: Any) -> Any:
        return self.client.call("patch.apply", path=str(package), **params)

    @contextlib.contextmanager
    def no_room(self) -> Iterator[None]:
        """For the block, the supervisor cannot write to files any more, as if the disk were full."""
        pid = int((self.folder / ".asyncsup/lock").read_text())
        before = resource.prlimit(pid, resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        try:
            yield
        finally:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, before)

    def fail_at(self, points: str) -> None:
        """Ask for failures by `ASYNCSUP_FAILPOINT`; what hangs goes on."""
        path = self.folder / "failpoints"
        self.serve.environ["ASYNCSUP_FAILPOINT"] = f"@{path}"
        path.with_suffix(".new").write_text(points)
        path.with_suffix(".new").rename(path)

    @contextlib.contextmanager
    def applying(self, package: Path) -> Iterator[list[Any]]:
        """Apply in the background while the block runs; the list then holds the report or the error."""
        outcome: list[Any] = []

        def apply() -> None:
            with ControlClient(self.serve.endpoint) as other:
                try:
                    outcome.append(other.call("patch.apply", path=str(package)))
                except AsyncsupError as error:
                    outcome.append(error)

        thread = threading.Thread(target=apply)
        thread.start()
        try:
            yield outcome
        finally:
            thread.join(100)

    def refused(self, package: Path, **params: Any) -> RemoteError:
        with pytest.raises(RemoteError) as caught:
            self.apply(package, **params)
        report = caught.value.details["report"]
        assert report["code"] == caught.value.error_code
        assert report["reason"] == caught.value.message
        return caught.value

    def target(self, name: str) -> Any:
        return self.client.call("status", names=[name])["targets"][0]

    def instance(self, name: str) -> Any:
        return self.target(name)["instances"][0]

    def said(self, name: str, text: str) -> Any:
        return wait_for(
            lambda: self.instance(name) if text in self.instance(name)["status_text"] else None,
            f"{name} to say {text!r}",
        )

    def steps(self) -> list[str]:
        """What every patch so far has done, as events tell."""
        events = self.client.call("events.since", seq=0)["events"]
        return [event["step"] for event in events if event["type"] == "patch.step"]

    def content(self, name: str) -> dict[str, str]:
        root = self.folder / name
        paths = (path for path in sorted(root.rglob("*")) if path.is_file())
        return {str(path.relative_to(root)): path.read_text() for path in paths}

    def picture(self, *names: str) -> Any:
        """Everything that must be as before when nothing may have been touched."""
        found = [self.target(name) for name in names]
        return [
            (
                self.content(t["name"]),
                t["build"],
                [(i["pid"], i["restarts"], i["status_text"]) for i in t["instances"]],
            )
            for t in found
        ]


# --- what is promised ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["tree", "overlay"])
def test_a_warm_patch_changes_the_files_and_tells_the_process_which_stays(field: Field, layout: str) -> None:
    field.start("web", layout=layout)
    before = field.instance("web")
    report = field.apply(field.package("web"))
    assert report["verdict"] == "committed"
    after = field.said("web", "build=300 a.txt=new-a b.txt=new-b sub/c.txt=new-c")
    assert (after["pid"], after["restarts"]) == (before["pid"], 0)
    (entry,) = report["targets"]
    assert (entry["build_before"], entry["build_after"]) == (200, 300)
    assert {(f["path"], f["op"]) for f in entry["files"]} == {
        ("a.txt", "modified"), ("b.txt", "modified"), ("sub/c.txt", "new"),
    }  # fmt: skip
    (told,) = entry["instances"]
    assert (told["prepare"], told["reload"], told["told_by"]) == ("go_ahead", "ok", "sdk")
    assert told["reload_took"] > 0
    states = {
        event["to"]
        for event in field.client.call("events.since", seq=0)["events"]
        if event["type"] == "instance.state"
    }
    assert states == {"starting", "running", "reloading"}


@pytest.mark.parametrize("layout", ["tree", "overlay"])
def test_a_cold_patch_replaces_the_program(field: Field, layout: str) -> None:
    field.start("web", layout=layout)
    before = field.instance("web")
    report = field.apply(field.package("web", kind=Kind.COLD))
    assert report["verdict"] == "committed"
    after = field.said("web", "two build=300 a.txt=new-a")
    assert after["pid"] != before["pid"]
    assert report["targets"][0]["pids_before"] == [before["pid"]]
    assert report["targets"][0]["pids_after"] == [after["pid"]]
    assert [step["step"] for step in report["steps"]] == [
        "stage", "prepare", "stop", "switch", "start", "probation", "commit",
    ]  # fmt: skip


def test_one_patch_over_several_targets_with_several_instances(field: Field) -> None:
    field.start("a", "b", "c", defaults="instances = 2")
    report = field.apply(field.package("a", "b", "c"))
    assert report["verdict"] == "committed"
    for name in "abc":
        field.said(name, "build=300 a.txt=new-a")
        assert field.content(name)["sub/c.txt"] == "new-c"
    assert sum(len(entry["instances"]) for entry in report["targets"]) == 6
    assert len([step for step in report["steps"] if step["step"] == "switch"]) == 1


def test_rollback_goes_back_one_generation_at_a_time_and_patches_stack(field: Field) -> None:
    field.start("web")
    field.apply(field.package("web", build=300))
    field.apply(field.package("web", build=400, before={"a.txt": "new-a"}, files={"a.txt": "newer-a"}))
    field.said("web", "build=400 a.txt=newer-a b.txt=new-b")
    pid = field.instance("web")["pid"]
    report = field.client.call("patch.rollback", target="web")
    assert (report["verdict"], report["action"]) == ("committed", "rollback")
    field.said("web", "build=300 a.txt=new-a b.txt=new-b")
    field.client.call("patch.rollback", target="web")
    after = field.said("web", "build=200 a.txt=old-a b.txt=old-b")
    assert after["pid"] == pid
    assert "sub/c.txt" not in field.content("web")
    with pytest.raises(RemoteError, match="no earlier generation"):
        field.client.call("patch.rollback", target="web")
    field.apply(field.package("web", build=500))
    field.said("web", "build=500 a.txt=new-a")


def test_a_patch_of_several_targets_is_taken_back_as_a_whole_or_on_one_of_them(field: Field) -> None:
    field.start("a", "b", defaults="instances = 2")
    first = field.apply(field.package("a", "b", build=300))
    field.apply(field.package("b", build=400, before={"a.txt": "new-a"}, files={"a.txt": "newer-a"}))

    def refused(**params: Any) -> tuple[str, int]:
        before = field.picture("a", "b")
        with pytest.raises(RemoteError) as caught:
            field.client.call("patch.rollback", params)
        assert field.picture("a", "b") == before
        return caught.value.error_code, caught.value.remote_exit_status

    for params in ({"target": "a", "together": True}, {"target": str(first["txn"])}):
        assert refused(**params) == ("gate.later_patch", 20)
    assert refused(target="a") == ("rollback.several", 2)
    assert refused(target="b", to_build=200) == ("rollback.several", 2)
    assert refused(target="a", to_build=1) == ("patch.not_found", 4)
    assert refused(target="a", only=True, together=True) == ("request.invalid", 2)
    assert refused(target=str(first["txn"]), only=True) == ("usage", 2)
    assert refused(target="feedfeed") == ("patch.not_found", 4)
    assert refused(target="nobody") == ("target.not_found", 4)

    field.client.call("patch.rollback", target="b")
    pids = [i["pid"] for name in "ab" for i in field.target(name)["instances"]]
    report = field.client.call("patch.rollback", target=first["patch"][:8])
    assert (report["verdict"], report["build"], report["patch"]) == ("committed", 200, first["patch"])
    assert [entry["target"] for entry in report["targets"]] == ["a", "b"]
    assert len([step for step in report["steps"] if step["step"] == "switch"]) == 1
    for name in "ab":
        field.said(name, "build=200 a.txt=old-a b.txt=old-b")
    assert [i["pid"] for name in "ab" for i in field.target(name)["instances"]] == pids

    # One of them alone, several patches at once, and the other one that is left.
    again = field.apply(field.package("a", "b", build=500))
    field.apply(field.package("a", build=600, before={"a.txt": "new-a"}, files={"a.txt": "newest-a"}))
    report = field.client.call("patch.rollback", target="a", to_build=200, only=True)
    assert [entry["target"] for entry in report["targets"]] == ["a"]
    field.said("a", "build=200 a.txt=old-a")
    field.said("b", "build=500 a.txt=new-a")
    report = field.client.call("patch.rollback", target=str(again["txn"]))
    assert [entry["target"] for entry in report["targets"]] == ["b"]
    field.said("b", "build=200 a.txt=old-a")
    with pytest.raises(RemoteError, match="not in force on any target"):
        field.client.call("patch.rollback", target=str(again["txn"]))


def test_a_whole_patch_that_one_target_cannot_give_back_stays_everywhere(field: Field) -> None:
    field.start("a", "b")
    field.apply(field.package("a", "b"))
    field.behave("b", prepare="refuse")
    with pytest.raises(RemoteError) as caught:
        field.client.call("patch.rollback", target="a", together=True)
    assert caught.value.error_code == "patch.not_allowed"
    for name in "ab":
        field.said(name, "build=300 a.txt=new-a")
    field.behave("b")
    field.client.call("patch.rollback", target="b", together=True)
    for name in "ab":
        field.said(name, "build=200 a.txt=old-a")


def test_a_patched_target_stays_patched_when_the_supervisor_is_restarted(field: Field) -> None:
    field.start("web")
    field.apply(field.package("web"))
    field.client.close()
    field.serve.stop()
    field.client = field.serve.start()
    field.said("web", "build=300 a.txt=new-a")
    assert field.target("web")["build"] == 300
    field.client.call("patch.rollback", target="web")
    field.said("web", "build=200 a.txt=old-a")


def test_the_same_patch_again_is_a_success_that_does_nothing(field: Field) -> None:
    field.start("web")
    package = field.package("web")
    field.apply(package)
    field.said("web", "build=300")
    before = field.picture("web")
    report = field.apply(package)
    assert report["verdict"] == "already"
    assert report["targets"][0]["already"]
    assert field.picture("web") == before


def test_a_stopped_target_gets_the_files_and_stays_stopped(field: Field) -> None:
    field.start("web")
    field.client.call("stop", names=["web"])
    for package in (
        field.package("web"),
        field.package("web", build=400, kind=Kind.COLD, before={"a.txt": "new-a"}, files={"a.txt": "newest"}),
    ):
        assert field.apply(package)["verdict"] == "committed"
        assert field.target("web")["state"] == "stopped"
    field.client.call("start", names=["web"])
    field.said("web", "two build=400 a.txt=newest")


def test_wait_is_honoured_and_then_the_patch_goes_on(field: Field) -> None:
    field.start("web")
    field.behave("web", prepare="wait")
    with field.applying(field.package("web")) as outcome:
        wait_for(
            lambda: [
                e for e in field.client.call("events.since", seq=0)["events"] if e.get("step") == "wait"
            ],
            "the target to be asked",
        )
        assert field.target("web")["busy"] == "patch"
        field.behave("web", prepare="go")
    assert outcome[0]["verdict"] == "committed"
    field.said("web", "build=300")


def test_programs_without_the_sdk_are_told_by_signal_command_or_not_at_all(field: Field) -> None:
    script = (
        "trap 'echo reloaded $(cat $ASYNCSUP_ROOT/a.txt)' HUP\necho up\n"
        "while :; do sleep 3600 & wait $!; kill $!; done"
    )
    (field.folder / "script.sh").write_text(script)
    text = ['[supervisor]\nregion = "us-east-1"\n[patch]\ntrust = "none"\nprobation = "0s"\n']
    for name, how in (
        ("sig", 'reload_signal = "HUP"'),
        ("cmd", "reload_command = \"sh -c 'kill -HUP $MAINPID'\""),
        ("mute", ""),
    ):
        (field.folder / name).mkdir()
        for path, content in FILES.items():
            (field.folder / name / path).write_text(content)
        text.append(
            f'[target.{name}]\ncommand = "sh script.sh"\nroot = "{name}"\nmin_uptime = "20ms"\n{how}\n'
        )
    field.client = field.serve.start("".join(text))

    def logged(name: str, text: str) -> None:
        wait_for(lambda: text in field.client.call("logs", name=name)["chunks"][0]["text"], f"{name}: {text}")

    for name in ("sig", "cmd", "mute"):
        logged(name, "up")
    pids = {name: field.instance(name)["pid"] for name in ("sig", "cmd", "mute")}
    package = field.package("sig", "cmd", "mute", files={"a.txt": "fresh"})
    report = field.apply(package)
    told = {i["name"]: i["told_by"] for entry in report["targets"] for i in entry["instances"]}
    assert told == {"sig:0": "signal", "cmd:0": "command", "mute:0": "nobody"}
    for name in ("sig", "cmd"):
        logged(name, "reloaded fresh")
    assert {name: field.instance(name)["pid"] for name in pids} == pids
    assert field.content("mute")["a.txt"] == "fresh"


# --- refused before anything is touched ---------------------------------------------------------------------


def test_the_gates_refuse_and_nothing_is_touched(field: Field) -> None:
    field.start("web", "other", each={"other": 'patch = { allow = ["cold"] }'})
    soon = datetime.now(UTC) + timedelta(days=1)
    before = field.picture("web", "other")
    cases = {
        "gate.region": field.package("web", regions=("India",)),
        "gate.build": field.package("web", build=100),
        "gate.target": field.package("nobody"),
        "gate.requires": field.package("web", requires=Requires(build_min=250)),
        "gate.expired": field.package(
            "web", created=soon - timedelta(days=9), expires=soon - timedelta(days=2)
        ),
        "gate.kind": field.package("other"),
        "gate.build_conflict": field.package("web", build=200),
    }
    for code, package in cases.items():
        error = field.refused(package)
        assert (error.error_code, error.remote_exit_status) == (code, 20), error
        assert error.details["report"]["verdict"] == "refused"
        plan = None if code == "gate.target" else field.client.call("patch.plan", path=str(package))
        assert plan is None or (plan["verdict"], plan["targets"][0]["refused"]["code"]) == ("refused", code)
    # One target of several is enough.
    error = field.refused(field.package("web", "other"))
    assert (error.error_code, error.details["target"]) == ("gate.kind", "other")
    assert field.picture("web", "other") == before


def test_a_warm_patch_of_the_program_itself_is_refused(field: Field) -> None:
    """Its process would go on with the old one."""
    field.start("web", "reexec", each={"reexec": "patch = { warm_program = true }"})
    before = field.picture("web")

    def package(name: str, kind: Kind = Kind.WARM, build: int = 300) -> Path:
        changed = {"a.txt": "new-a", "program.py": PROGRAM.read_text() + "# changed\n"}
        return field.package(name, kind=kind, build=build, files=changed)

    warm = package("web")
    plan = field.client.call("patch.plan", path=str(warm))
    error = field.refused(warm)
    assert (error.error_code, error.remote_exit_status) == ("gate.kind", 20)
    assert (plan["code"], plan["reason"]) == ("gate.kind", error.message)
    assert "program.py is what the processes of web run" in error.message
    assert field.picture("web") == before
    # Of what nobody runs the next start is of the new one.
    field.client.call("stop", names=["web"])
    assert field.client.call("patch.plan", path=str(warm))["verdict"] == "apply"
    field.client.call("start", names=["web"])
    assert field.apply(package("web", Kind.COLD))["verdict"] == "committed"
    # What is there already needs no permission.
    again = package("web", build=400)
    assert field.refused(again).error_code == "gate.kind"
    assert field.apply(package("reexec"))["verdict"] == "committed"


def test_drift_is_refused_and_named(field: Field) -> None:
    field.start("web")
    (field.folder / "web" / "a.txt").write_text("changed by hand")
    before = field.picture("web")
    error = field.refused(field.package("web"))
    assert error.remote_exit_status == 20
    assert "a.txt" in error.message
    assert field.picture("web") == before


def test_each_target_has_its_policy_for_drift_and_everybody_says_what_it_did(field: Field) -> None:
    field.start("a", "b", layout="overlay", each={"b": 'patch = { drift = "keep" }'})
    for name in "ab":
        (field.folder / name / "a.txt").write_text("by hand")
    package = field.package("a", "b")
    error = field.refused(package)
    assert (error.error_code, error.details["target"]) == ("gate.base", "a")
    assert "`--drift keep` leaves such a file as it is" in error.message
    plan = {t["target"]: t for t in field.client.call("patch.plan", path=str(package))["targets"]}
    assert (plan["a"]["refused"]["code"], plan["b"]["refused"]) == ("gate.base", None)

    def of(target: Any) -> dict[str, Any]:
        return next(file for file in target["files"] if file["path"] == "a.txt")

    assert (of(plan["a"])["decision"], of(plan["b"])["decision"]) == ("refuse", "keep")
    plan = {
        t["target"]: t
        for t in field.client.call("patch.plan", path=str(package), drift="overwrite")["targets"]
    }
    assert {of(entry)["decision"] for entry in plan.values()} == {"overwrite"}

    def asyncsup(*words: str, status: int = 0) -> str:
        result = subprocess.run(
            [sys.executable, "-m", "asyncsup", "-c", str(field.serve.config), *words],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert result.returncode == status, result.stdout + result.stderr
        return result.stdout

    assert "nothing drifted" in asyncsup("patch", "drift")
    told = asyncsup("patch", "apply", str(package), "--drift", "keep")
    assert "kept      a.txt  (is not the file the patch was made for" in told
    for name in "ab":
        field.said(name, "build=300 a.txt=by hand b.txt=new-b sub/c.txt=new-c")
    assert "target a: 1 file drifted\n  a.txt  is not the file" in asyncsup("patch", "drift", "a", status=1)
    both = asyncsup("patch", "drift", "a", "b", status=1)
    assert both.count("1 file drifted") == 2
    assert both == asyncsup("patch", "drift", "[ab]", status=1) == asyncsup("patch", "drift", status=1)
    assert "no target or instance" in asyncsup("patch", "drift", "a", "c", "--json", status=4)
    with pytest.raises(RemoteError, match="give one of"):
        field.client.call("patch.drift", target="a", names=["b"])
    assert "drifted files\n  a.txt  is not the file" in asyncsup("show", "a")
    txn = field.client.call("patch.history", target="a")["transactions"][0]["txn"]
    assert "kept      a.txt" in asyncsup("patch", "show", str(txn))

    report = field.apply(
        field.package("a", build=400, before={"a.txt": "new-a"}, files={"a.txt": "newer-a"}),
        drift="overwrite",
    )
    saved = Path(of(report["targets"][0])["saved"])
    assert saved.read_text() == "by hand"
    field.said("a", "build=400 a.txt=newer-a")
    assert field.client.call("patch.drift", target="a")["targets"][0]["files"] == []
    field.client.call("patch.rollback", target="a")
    field.said("a", "build=300 a.txt=by hand")
    with pytest.raises(RemoteError, match="drift: must be one of refuse, keep, overwrite"):
        field.client.call("patch.rollback", target="a", drift="perhaps")


def test_one_byte_flipped_is_refused(field: Field) -> None:
    field.start("web")
    package = field.package("web")
    checksum = hashlib.sha256(package.read_bytes()).hexdigest()
    before = field.picture("web")
    good = package.read_bytes()
    for position in range(0, len(good), max(1, len(good) // 40)):
        data = bytearray(good)
        data[position] ^= 0x10
        package.write_bytes(data)
        error = field.refused(package, sha256=checksum)
        assert (error.error_code, error.remote_exit_status) == ("digest.sha256", 21)
    assert field.picture("web") == before


def test_trust_digest_wants_a_digest(serve: Serve, field: Field) -> None:
    field.start("web")
    field.client.close()
    serve.stop()
    serve.write(serve.config.read_text().replace('trust = "none"', 'trust = "digest"'))
    field.client = serve.start()
    field.said("web", "old-a")
    package = field.package("web")
    error = field.refused(package)
    assert (error.error_code, error.remote_exit_status) == ("trust.digest_missing", 21)
    checksum = hashlib.sha256(package.read_bytes()).hexdigest()
    package.with_name(f"{package.name}.sha256").write_text(f"{checksum}  {package.name}\n")
    assert field.apply(package)["verdict"] == "committed"


def test_a_key_that_is_revoked_while_a_patch_waits_does_not_sign_it_any_more(
    serve: Serve, field: Field
) -> None:
    field.start("web")
    field.client.close()
    serve.stop()
    alice, bob = (f"{name} {ssh_kit.key(name).line}\n" for name in ("alice", "bob"))
    signers = field.folder / "signers"
    signers.write_text(alice + bob)
    required = 'trust = "required"\nallowed_signers = "signers"'
    serve.write(serve.config.read_text().replace('trust = "none"', required))
    field.client = serve.start()
    field.said("web", "old-a")
    package = field.package("web")
    sign = ["patch", "sign", str(package), "--key", str(ssh_kit.key("alice").private)]
    subprocess.run([sys.executable, "-m", "asyncsup", *sign], check=True, stdout=subprocess.DEVNULL)
    before = field.picture("web")

    field.behave("web", prepare="wait")
    with field.applying(package) as outcome:
        wait_for(lambda: "wait" in field.steps(), "the target to be asked")
        signers.write_text(bob)
        field.behave("web")
    assert (outcome[0].error_code, outcome[0].remote_exit_status) == ("trust.unknown_key", 21)
    assert outcome[0].details["report"]["verdict"] == "refused"
    assert field.picture("web") == before

    signers.write_text(alice + bob)
    assert field.apply(package)["verdict"] == "committed"


def test_a_prototype_package_goes_through_the_same_checks(field: Field) -> None:
    field.start("web")
    package = field.folder / "legacy.zip"

    def build(**more: Any) -> int:
        settings: dict[str, Any] = {"region": "us-east-1", "build": 300, "warm": True}
        return build_prototype_patch(output=package, **{**settings, **more})

    before = field.picture("web")
    build(modified={"/a.txt": b"x"}, region="India")
    assert field.refused(package).error_code == "gate.region"
    build(modified={"/a.txt": b"x"}, build=100)
    assert field.refused(package).error_code == "gate.build"
    crc = build(
        modified={"/web/a.txt": b"new-a"}, new={"/sub/c.txt": b"new-c"}, deleted=["/b.txt", "/none.txt"]
    )
    error = field.refused(package, crc32=str(crc ^ 1))
    assert (error.error_code, error.remote_exit_status) == ("digest.crc32", 21)
    assert field.picture("web") == before
    report = field.apply(package, crc32=str(crc))
    assert report["verdict"] == "committed"
    field.said("web", "build=300 a.txt=new-a sub/c.txt=new-c")
    assert "b.txt" not in field.content("web")


# --- refused by the target: nothing changed -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("behaviour", "code", "says"),
    [
        ("refuse", "patch.not_allowed", "closed today"),
        ("raise", "patch.not_allowed", "confused"),
        ("never", "patch.no_answer", "did not answer `prepare` within 5 s"),
        ("wait", "patch.still_waiting", "in the middle of something"),
        ("die", "patch.target_died", "ended before it answered"),
    ],
)
@pytest.mark.parametrize("kind", list(Kind))
def test_a_target_that_does_not_give_its_go_ahead_keeps_everything(
    field: Field, behaviour: str, code: str, says: str, kind: Kind
) -> None:
    field.start(
        "good",
        "web",
        patch='wait_max = "300ms"\n',
        each={"web": 'patch = { ack_timeout = "5s" }'} if behaviour == "never" else None,
    )
    field.behave("web", prepare=behaviour)
    before = field.picture("good", "web")
    error = field.refused(field.package("good", "web", kind=kind))
    assert (error.error_code, error.remote_exit_status) == (code, 22), error
    assert says in error.message
    assert error.details["report"]["verdict"] == "target_refused"
    if behaviour == "die":
        field.said("web", "build=200 a.txt=old-a b.txt=old-b")
        assert field.picture("good") == before[:1]
        assert field.content("web") == before[1][0]
    else:
        assert field.picture("good", "web") == before
    wait_for(lambda: "aborted" in field.client.call("logs", name="good")["chunks"][0]["text"], "the abort")
    field.behave("web")
    if behaviour == "never":
        field.client.call("restart", names=["web"])  # its handler is stuck for good
    assert field.apply(field.package("good", "web", kind=kind))["verdict"] == "committed"
    field.said("web", "build=300 a.txt=new-a")


# --- applied and undone -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("behaviour", "says"),
    [
        ("fail", "these files are no good"),
        ("never", "no answer within 5 s"),
        ("die", "ended before it answered"),
    ],
)
def test_a_warm_patch_that_is_not_taken_up_goes_back_everywhere(
    field: Field, behaviour: str, says: str
) -> None:
    field.start(
        "good", "web", defaults='[defaults.patch]\nack_timeout = "5s"' if behaviour == "never" else ""
    )
    field.behave("web", reload=behaviour)
    pid = field.instance("good")["pid"]
    package = field.package("good", "web")
    error = field.refused(package)
    if behaviour == "never":
        # Its handler is stuck for good: the files are back, and it is said that this process is not well.
        assert (error.error_code, error.remote_exit_status) == ("patch.rollback_failed", 24)
        assert "`asyncsup restart web:0` would" in error.message
    else:
        assert (error.error_code, error.remote_exit_status) == ("patch.rolled_back", 23)
    assert says in error.message
    assert field.content("good") == field.content("web")
    assert field.content("web")["a.txt"] == "old-a"
    assert field.target("web")["build"] == 200
    assert field.said("good", "build=200 a.txt=old-a b.txt=old-b")["pid"] == pid
    if behaviour != "never":
        field.said("web", "build=200 a.txt=old-a b.txt=old-b")
    held = field.refused(package)
    assert held.error_code == "gate.held"


@pytest.mark.parametrize("how", ["die", "done", "mute", "late-die"])
def test_a_cold_patch_that_does_not_come_up_goes_back_everywhere(field: Field, how: str) -> None:
    field.start(
        "good",
        "web",
        defaults='restart = "on-failure"',
        each={"web": 'start_timeout = "15s"'} if how == "mute" else None,
    )
    # The new program misbehaves, the old one does not.
    field.behave("web", start=how, version="two")
    package = field.package("good", "web", kind=Kind.COLD, probation=60.0 if how == "late-die" else 0.0)
    pids = [field.instance(name)["pid"] for name in ("good", "web")]
    error = field.refused(package)
    assert (error.error_code, error.remote_exit_status) == ("patch.rolled_back", 23), error.message
    assert "web:0" in error.message
    for name, pid in zip(("good", "web"), pids, strict=True):
        after = field.said(name, "one build=200 a.txt=old-a b.txt=old-b")
        assert after["state"] == "running"
        assert after["pid"] != pid
        assert field.content(name)["a.txt"] == "old-a"
        assert field.target(name)["build"] == 200


def test_an_instance_that_ends_while_others_still_start_undoes_a_cold_patch(field: Field) -> None:
    field.start("web", defaults="instances = 2")
    field.behave("web", start="uneven", version="two")
    error = field.refused(field.package("web", kind=Kind.COLD))
    assert error.error_code == "patch.rolled_back"
    assert "web:0" in error.message
    field.said("web", "one build=200 a.txt=old-a")
    assert field.target("web")["state"] == "running"


def test_an_instance_that_starts_while_the_files_change_and_dies_of_them_undoes_a_warm_patch(
    field: Field,
) -> None:
    # One more death and its policy gives it up: it is started again on the files it could live with.
    field.start(
        "web",
        defaults='instances = 2\nstart_limit_burst = 2\n[defaults.patch]\nack_timeout = "5s"',
    )
    field.behave("web", start="picky", instance="web:1")
    pids = [instance["pid"] for instance in field.target("web")["instances"]]
    os.kill(pids[1], signal.SIGKILL)
    wait_for(
        lambda: (i := field.target("web")["instances"][1])["state"] == "starting" and i["pid"] != pids[1],
        "the second instance to start again",
    )
    error = field.refused(field.package("web"))
    assert error.error_code == "patch.rolled_back"
    assert "web:1" in error.message
    assert field.content("web")["a.txt"] == "old-a"
    field.client.call("wait", {"names": ["all"], "for": "ready", "timeout": 60})
    assert field.said("web", "build=200 a.txt=old-a")["pid"] == pids[0]


def test_a_crash_in_probation_undoes_a_warm_patch(field: Field) -> None:
    field.start("web")
    pid = field.instance("web")["pid"]
    with field.applying(field.package("web", probation=30.0)) as outcome:
        field.said("web", "build=300 a.txt=new-a")
        wait_for(lambda: "reload" in field.steps(), "its answer")
        os.kill(pid, signal.SIGKILL)
    assert outcome[0].error_code == "patch.rolled_back"
    assert "killed by SIGKILL" in outcome[0].message
    field.said("web", "a.txt=old-a b.txt=old-b")
    assert field.target("web")["build"] == 200


def test_an_instance_that_says_in_probation_that_it_failed_undoes_the_patch_everywhere(field: Field) -> None:
    field.start("good", "web", defaults="instances = 2")
    field.behave("web", reload="regret")
    pids = [instance["pid"] for instance in field.target("web")["instances"]]
    error = field.refused(field.package("good", "web", probation=60.0))
    assert (error.error_code, error.remote_exit_status) == ("patch.rolled_back", 23)
    assert "said within probation that it has failed: these files turn out to be no good" in error.message
    for name in ("good", "web"):
        field.said(name, "build=200 a.txt=old-a b.txt=old-b")
        assert field.content(name)["a.txt"] == "old-a"
    after = field.target("web")["instances"]
    assert [instance["pid"] for instance in after] == pids
    assert [instance["failure"] for instance in after] == [None, None]
    events = field.client.call("events.since", seq=0)["events"]
    assert [e["instance"] for e in events if e["type"] == "instance.failed"] == ["web:0"]


def test_a_stop_during_a_patch_puts_everything_back_first(field: Field) -> None:
    field.start("web", "good")
    package = field.package("web", "good", probation=60.0)
    with field.applying(package) as outcome:
        field.said("web", "build=300 a.txt=new-a")
        field.client.call("stop", names=["web"])
    assert outcome[0].error_code == "patch.rolled_back"
    assert "asked to stop web" in outcome[0].message
    assert field.target("web")["state"] == "stopped"
    field.said("good", "build=200 a.txt=old-a")
    assert field.content("web")["a.txt"] == field.content("good")["a.txt"] == "old-a"
    # That was nobody's fault but the operator's: the patch is not on hold.
    assert field.client.call("patch.plan", path=str(package))["verdict"] == "apply"


def test_the_end_of_the_supervisor_during_a_patch_puts_everything_back_first(field: Field) -> None:
    field.start("web")
    with field.applying(field.package("web", probation=60.0)) as outcome:
        field.said("web", "build=300")
        assert field.serve.stop() == 0
    assert isinstance(outcome[0], AsyncsupError)
    field.client.close()
    assert field.content("web")["a.txt"] == "old-a"
    field.client = field.serve.start()
    field.said("web", "build=200 a.txt=old-a")


def test_a_manual_commit_waits_for_the_operator(field: Field) -> None:
    field.start("web", patch='commit = "manual"\n')
    report = field.apply(field.package("web"))
    assert report["verdict"] == "uncommitted"
    field.said("web", "build=300 a.txt=new-a")
    assert field.target("web")["busy"] == "patch"
    final = field.client.call("patch.commit", id=str(report["txn"]))
    assert final["verdict"] == "committed"
    assert final["steps"][-1]["step"] == "commit"
    wait_for(lambda: field.target("web")["busy"] is None, "the target to be free")
    with pytest.raises(RemoteError) as caught:
        field.client.call("patch.commit", id=str(report["txn"]))
    assert caught.value.error_code == "patch.not_found"


def test_a_patch_that_is_being_undone_waits_for_no_commit(field: Field) -> None:
    field.fail_at("")
    field.start("web", patch='commit = "manual"\n')
    txn = field.apply(field.package("web"))["txn"]
    field.fail_at("undo.switching:hang")
    aborting = Asked(field.serve.endpoint, "patch.abort", id=str(txn))
    wait_for(lambda: field.target("web")["uncommitted"] is None, "it to wait no more")
    assert field.target("web")["busy"] == "patch"
    with pytest.raises(RemoteError) as caught:
        field.client.call("patch.commit", id=str(txn))
    assert caught.value.error_code == "patch.not_found"
    field.fail_at("")
    assert aborting.result()["verdict"] == "rolled_back"
    field.said("web", "build=200 a.txt=old-a")


def test_an_uncommitted_patch_is_undone_by_abort_crash_and_the_end_of_the_supervisor(field: Field) -> None:
    field.start("web", patch='commit = "manual"\n')
    report = field.apply(field.package("web"))
    aborted = field.client.call("patch.abort", id=report["patch"][:8])
    assert (aborted["verdict"], aborted["txn"]) == ("rolled_back", report["txn"])
    assert "aborted by" in aborted["reason"]
    field.said("web", "build=200 a.txt=old-a")

    assert field.apply(field.package("web"))["verdict"] == "uncommitted"
    os.kill(field.instance("web")["pid"], signal.SIGKILL)
    field.said("web", "build=200 a.txt=old-a")
    wait_for(lambda: field.target("web")["busy"] is None, "the target to be free")
    assert field.content("web")["a.txt"] == "old-a"

    assert field.apply(field.package("web", build=301))["verdict"] == "uncommitted"
    field.client.close()
    assert field.serve.stop() == 0
    assert field.content("web")["a.txt"] == "old-a"
    field.client = field.serve.start()
    field.said("web", "build=200 a.txt=old-a")
    history = field.client.call("patch.history")["transactions"]
    assert [entry["verdict"] for entry in history] == ["rolled_back"] * 3


@pytest.mark.parametrize("kind", list(Kind))
def test_with_manual_rollback_a_patch_that_fails_stays_until_somebody_decides(
    field: Field, kind: Kind
) -> None:
    field.start("a", "b", each={"b": 'patch = { rollback = "manual" }'})
    field.behave("b", reload="fail", start="die")
    package = field.package("a", "b", kind=kind)
    error = field.refused(package)
    assert (error.error_code, error.remote_exit_status) == ("patch.undecided", 25)
    report = error.details["report"]
    txn = report["txn"]
    assert (report["verdict"], report["steps"][-1]["step"]) == ("undecided", "undecided")
    assert f"`asyncsup patch abort {txn}` takes it back" in error.message
    for name in "ab":
        assert field.content(name)["a.txt"] == "new-a"
        assert (field.target(name)["undecided"], field.target(name)["busy"]) == (txn, None)
    assert field.client.call("patch.show", id=str(txn))["verdict"] == "undecided"
    # Nobody else patches meanwhile, and one target alone is no decision about both.
    busy = field.refused(field.package("a", build=400, before={"a.txt": "new-a"}, files={"a.txt": "x"}))
    assert (busy.error_code, busy.details["txn"]) == ("target.busy", txn)
    with pytest.raises(RemoteError, match="taken back as a whole"):
        field.client.call("patch.rollback", target="a", only=True)

    # It survives an orderly restart of the supervisor, and one that is none.
    field.behave("b")
    for stop in (field.serve.stop, field.crash):
        field.client.close()
        stop()
        field.client = field.serve.start()
        for name in "ab":
            field.said(name, "build=300 a.txt=new-a")
            assert field.target(name)["undecided"] == txn

    report = field.client.call("patch.abort", id=str(txn))
    assert report["verdict"] == "rolled_back"
    for name in "ab":
        field.said(name, "build=200 a.txt=old-a b.txt=old-b")
        assert field.target(name)["undecided"] is None
    assert field.refused(package).error_code == "gate.held"
    assert field.client.call("patch.show", id=str(txn))["verdict"] == "rolled_back"
    with pytest.raises(RemoteError) as caught:
        field.client.call("patch.abort", id=str(txn))
    assert caught.value.error_code == "patch.not_found"


def test_an_undecided_patch_can_be_kept_or_taken_back_by_the_target_s_name(field: Field) -> None:
    field.start("a", "b", patch='rollback = "manual"\n')
    package = field.package("a", "b")
    field.behave("b", reload="regret")
    field.client.call("stop", names=["a"])
    error = field.refused(field.package("a", "b", probation=60.0))
    assert error.error_code == "patch.undecided"
    report = field.client.call("patch.rollback", target="a")
    assert (report["verdict"], report["txn"]) == ("rolled_back", error.details["report"]["txn"])
    field.said("b", "build=200 a.txt=old-a")
    assert (field.target("a")["state"], field.content("a")["a.txt"]) == ("stopped", "old-a")

    field.behave("b", reload="fail")
    assert field.refused(package).error_code == "patch.undecided"
    field.behave("b")
    # Whatever else is to be done with the targets can be done.
    field.client.call("restart", names=["b"])
    field.said("b", "build=300 a.txt=new-a")
    report = field.client.call("patch.commit", id=str(field.target("b")["undecided"]))
    assert report["verdict"] == "committed"
    assert [field.target(name)["build"] for name in "ab"] == [300, 300]
    assert field.apply(package)["verdict"] == "already"
    field.client.call("patch.rollback", target="b", together=True)
    field.said("b", "build=200 a.txt=old-a")
    assert field.client.call("audit.verify")["ok"]


@pytest.mark.parametrize(("verb", "verdict"), [("abort", "rolled_back"), ("commit", "committed")])
def test_an_undecided_patch_of_a_target_that_is_configured_no_more_can_be_decided_about(
    field: Field, verb: str, verdict: str
) -> None:
    field.start("a", "b", patch='rollback = "manual"\n')
    field.behave("b", reload="fail")
    error = field.refused(field.package("b"))
    assert error.error_code == "patch.undecided"
    txn = str(error.details["report"]["txn"])
    both = field.serve.config.read_text()
    field.serve.write(both.partition("[target.b]")[0])
    assert field.client.call("config.apply")["removed"] == ["b"]
    assert field.client.call(f"patch.{verb}", id=txn, timeout=60)["verdict"] == verdict
    assert field.client.call("patch.show", id=txn)["verdict"] == verdict

    field.behave("b")
    field.serve.write(both)
    assert field.client.call("config.apply")["added"] == ["b"]
    field.said("b", "build=300 a.txt=new-a" if verb == "commit" else "build=200 a.txt=old-a")
    assert field.target("b")["undecided"] is None
    assert field.client.call("audit.verify")["ok"]
    field.client.close()
    assert field.serve.stop() == 0


def test_manual_rollback_undoes_what_fails_before_the_switch_and_what_somebody_ends(field: Field) -> None:
    field.start("web", patch='rollback = "manual"\n')
    field.behave("web", prepare="refuse")
    before = field.picture("web")
    assert field.refused(field.package("web")).error_code == "patch.not_allowed"
    assert field.picture("web") == before
    field.behave("web")
    with field.applying(field.package("web", probation=60.0)) as outcome:
        field.said("web", "build=300")
        txn = field.client.call("patch.history")["transactions"][0]["txn"]
        assert field.client.call("patch.abort", id=str(txn))["verdict"] == "rolled_back"
    assert outcome[0].error_code == "patch.rolled_back"
    field.said("web", "build=200 a.txt=old-a")


def test_a_supervisor_killed_in_probation_leaves_the_patch_undecided(field: Field) -> None:
    field.start("web", patch='rollback = "manual"\n')
    package = field.package("web", probation=60.0)
    with field.applying(package):
        field.said("web", "build=300")
        field.crash()
    field.client.close()
    field.client = field.serve.start()
    field.said("web", "build=300 a.txt=new-a")
    undecided = field.target("web")["undecided"]
    assert field.client.call("patch.show", id=str(undecided))["code"] == "patch.interrupted"
    assert field.client.call("patch.abort", id=str(undecided))["verdict"] == "rolled_back"
    field.said("web", "build=200 a.txt=old-a")
    # It was not the patch's fault.
    assert field.client.call("patch.plan", path=str(package))["verdict"] == "apply"


def test_a_committed_patch_is_reported_as_such_though_nothing_can_be_written_any_more(field: Field) -> None:
    field.fail_at("store.commit.recorded:hang")
    field.start("web")
    with field.applying(field.package("web")) as outcome:
        wait_for(
            lambda: (
                field.client.call("patch.history")["transactions"][0:1]
                and field.client.call("patch.history")["transactions"][0]["verdict"] == "committed"
            ),
            "the commit",
        )
        with field.no_room():
            field.fail_at("")
            wait_for(lambda: outcome, "the answer")
    assert outcome[0]["verdict"] == "committed"
    assert any(step["step"] == "write down" for step in outcome[0]["steps"])
    assert (field.target("web")["build"], field.target("web")["busy"]) == (300, None)
    assert field.client.call("patch.rollback", target="web")["verdict"] == "committed"


@pytest.mark.parametrize("verb", ["commit", "abort"])
def test_an_undecided_patch_is_so_though_that_cannot_be_written_down(field: Field, verb: str) -> None:
    field.fail_at("transaction.reload:hang")
    field.start("web", patch='rollback = "manual"\n')
    field.behave("web", reload="fail")
    with field.applying(field.package("web")) as outcome:
        wait_for(lambda: "switch" in field.steps(), "the switch")
        with field.no_room():
            field.fail_at("")
            wait_for(lambda: outcome, "the answer")
    assert outcome[0].error_code == "patch.undecided"
    txn = outcome[0].details["report"]["txn"]
    assert (field.target("web")["undecided"], field.content("web")["a.txt"]) == (txn, "new-a")
    busy = field.refused(field.package("web", build=400))
    assert (busy.error_code, busy.details["txn"]) == ("target.busy", txn)
    assert field.client.call("patch.show", id=str(txn))["verdict"] == "undecided"
    field.behave("web")
    report = field.client.call(f"patch.{verb}", id=str(txn))
    assert report["verdict"] == ("committed" if verb == "commit" else "rolled_back")
    assert field.target("web")["undecided"] is None


def test_a_patch_that_failed_is_held_though_the_supervisor_is_killed_while_it_is_undone(field: Field) -> None:
    field.start("web")
    field.client.close()
    field.serve.stop()
    field.fail_at("store.abort.recorded:kill")
    field.serve.alone = True
    field.client = field.serve.start()
    field.said("web", "old-a")
    field.behave("web", reload="fail")
    package = field.package("web")
    pid = field.instance("web")["pid"]
    with field.applying(package):
        assert field.serve.process is not None
        field.serve.process.wait(60)
    os.kill(pid, signal.SIGKILL)
    field.client.close()
    field.fail_at("")
    field.client = field.serve.start()
    field.said("web", "old-a")
    held = field.refused(package)
    assert held.error_code == "gate.held"
    assert "these files are no good" in held.message


def test_the_patch_that_waits_for_its_commit_is_meant_though_the_same_one_is_queued(field: Field) -> None:
    field.start("web", patch='commit = "manual"\n')
    package = field.package("web")
    report = field.apply(package)
    with field.applying(package) as second:
        wait_for(lambda: field.target("web")["waiting"], "the second one to wait")
        assert field.client.call("patch.abort", id=report["patch"])["txn"] == report["txn"]
        wait_for(lambda: second, "the second one's turn")
        with field.applying(package) as third:
            wait_for(lambda: field.target("web")["waiting"], "the third one to wait")
            final = field.client.call("patch.commit", id=report["patch"][:8])
    assert (final["verdict"], final["txn"]) == ("committed", second[0]["txn"])
    assert third[0]["verdict"] == "already"


def test_abort_ends_a_patch_that_a_target_makes_wait(field: Field) -> None:
    field.start("web")
    field.behave("web", prepare="wait")
    before = field.picture("web")
    with field.applying(field.package("web")) as outcome:
        waiting = wait_for(
            lambda: [
                e for e in field.client.call("events.since", seq=0)["events"] if e.get("step") == "wait"
            ],
            "the target to be asked",
        )
        report = field.client.call("patch.abort", id=str(waiting[0]["txn"]))
    assert report["verdict"] == "refused"
    assert outcome[0].error_code == "request.cancelled"
    assert field.picture("web") == before


def test_a_patch_on_hold_is_tried_again_only_when_told_to(field: Field) -> None:
    field.start("web")
    field.behave("web", reload="fail")
    package = field.package("web")
    assert field.refused(package).error_code == "patch.rolled_back"
    field.behave("web")
    assert field.refused(package).error_code == "gate.held"
    for retry, code in ((False, "gate.held"), (True, None)):
        assert field.client.call("patch.plan", path=str(package), retry_held=retry)["code"] == code
    assert field.apply(package, retry_held=True)["verdict"] == "committed"
    assert field.apply(package)["verdict"] == "already"


def test_old_generations_are_pruned_and_a_target_is_released(field: Field) -> None:
    field.start("web", patch="keep = 1\n")
    field.apply(field.package("web"))
    field.apply(field.package("web", build=400, before={"a.txt": "new-a"}, files={"a.txt": "v4"}))
    field.apply(field.package("web", build=500, before={"a.txt": "v4"}, files={"a.txt": "v5"}))
    field.said("web", "build=500 a.txt=v5")
    generations = field.folder / ".asyncsup/generations/web"
    assert len(list(generations.iterdir())) == 2
    assert field.client.call("patch.prune", target="web", keep=0)["pruned"]["web"]
    assert len(list(generations.iterdir())) == 1
    before = field.content("web")
    field.client.call("stop", names=["web"])
    assert field.client.call("target.release", target="web")["released"]
    assert field.content("web") == before
    assert not (field.folder / "web").is_symlink()


def test_abort_ends_a_patch_that_is_still_being_verified_by_the_name_of_its_file(field: Field) -> None:
    """It has neither a number nor an id by then."""
    field.fail_at("")
    field.start("web")
    before = field.picture("web")
    package = field.package("web")
    field.fail_at("overseer.verify:hang")

    def aborted(name: str) -> Any:
        try:
            return field.client.call("patch.abort", id=name)
        except RemoteError as error:
            assert error.error_code == "patch.not_found"
            return error if package.name in error.message else None

    with field.applying(package) as outcome:
        # Whoever does not know its name is told.
        wait_for(lambda: aborted("0000"), "the patch to be under way")
        report = aborted(package.name)
    assert (report["verdict"], report["code"]) == ("target_refused", "request.cancelled")
    assert "aborted by" in report["reason"]
    assert outcome[0].error_code == "request.cancelled"
    assert field.picture("web") == before
    field.fail_at("")
    assert field.apply(package)["verdict"] == "committed"


def test_the_command_line_commits_aborts_prunes_and_releases(field: Field) -> None:
    field.start("web", patch='commit = "manual"\nkeep = 9\n')

    def asyncsup(*words: str) -> str:
        result = subprocess.run(
            [sys.executable, "-m", "asyncsup", "-c", str(field.serve.config), *words],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    package = str(field.package("web"))
    assert "waits for `asyncsup patch commit 1`" in asyncsup("patch", "apply", package)
    assert "everything is as it was before" in asyncsup("patch", "abort", "1")
    # An abort is nobody's fault: the same package may be tried again.
    asyncsup("patch", "apply", package)
    assert "COMMITTED" in asyncsup("patch", "commit", "2")
    assert "web: removed generation 0" in asyncsup("patch", "prune", "web", "--keep", "0")
    asyncsup("stop", "web")
    assert "ordinary again" in asyncsup("target", "release", "web")
    assert not (field.folder / "web").is_symlink()


# --- two at once --------------------------------------------------------------------------------------------


def test_patches_for_different_targets_run_side_by_side_and_for_the_same_one_in_turn(field: Field) -> None:
    field.start("a", "b")
    with field.applying(field.package("a", build=300, probation=60.0)) as outcome:
        field.said("a", "build=300")
        assert field.apply(field.package("b", build=300))["verdict"] == "committed"
        busy = field.refused(field.package("a", build=400), wait_busy=False)
        assert (busy.error_code, busy.remote_exit_status) == ("target.busy", 8)
        assert "a is busy: patch for" in busy.message
        field.client.call("stop", names=["a"])
    assert outcome[0].error_code == "patch.rolled_back"
    assert field.content("b")["a.txt"] == "new-a"
    assert field.content("a")["a.txt"] == "old-a"


def test_what_waits_for_several_targets_keeps_none_of_them(field: Field) -> None:
    field.start("a", "b", each={"b": '[target.b.patch]\ncommit = "manual"\n'})
    first = field.apply(field.package("b"))
    both = field.package("a", "b", build=400)
    assert field.refused(both, wait_busy=False).error_code == "target.busy"
    with field.applying(both) as outcome:
        wait_for(lambda: field.target("a")["waiting"], "the second patch to wait")
        field.client.call("stop", names=["a"])
    assert outcome[0].error_code == "request.cancelled"
    assert field.target("b")["waiting"] == []
    field.client.call("start", names=["a"])
    pid = field.said("a", "old-a")["pid"]
    with field.applying(both) as outcome:
        wait_for(lambda: field.target("a")["waiting"], "the second patch to wait")
        assert (field.target("a")["busy"], field.target("b")["busy"]) == (None, "patch")
        field.client.call("restart", names=["a"], timeout=60)
        assert field.instance("a")["pid"] != pid
        field.client.call("patch.abort", id=str(first["txn"]))
    assert outcome[0]["verdict"] == "uncommitted"
    assert {field.target(name)["busy"] for name in "ab"} == {"patch"}
    field.client.call("patch.commit", id=str(outcome[0]["txn"]))
    field.said("a", "build=400 a.txt=new-a")
    wait_for(lambda: not any(field.target(name)["busy"] for name in "ab"), "both to be free")


# --- the inbox ----------------------------------------------------------------------------------------------


def test_the_inbox_lists_what_is_complete_and_moves_what_was_dealt_with(field: Field) -> None:
    field.start("web")
    good, bad = field.package("web"), field.package("web", build=100)
    data = good.read_bytes()
    inbox = field.serve.inbox
    with (inbox / "good.zip").open("wb") as file:
        file.write(data[: len(data) // 2])
        file.flush()
        (listed,) = field.client.call("patch.list")["inbox"]
        assert (listed["file"], listed["state"]) == ("good.zip", "incomplete")
        file.write(data[len(data) // 2 :])
    shutil.copy(bad, inbox / "old.zip")
    (inbox / "junk.zip").write_bytes(b"PK\x05\x06" + b"\0" * 18)
    (inbox / "notes.txt").write_text("not a patch")
    listing = {entry["file"]: entry for entry in field.client.call("patch.list")["inbox"]}
    assert {name: entry["state"] for name, entry in listing.items()} == {
        "good.zip": "complete", "old.zip": "complete", "junk.zip": "malformed",
    }  # fmt: skip
    assert (listing["good.zip"]["build"], listing["good.zip"]["targets"]) == (300, ["web"])
    wait_for(
        lambda: [
            e for e in field.client.call("events.since", seq=0)["events"] if e.get("file") == "good.zip"
        ],
        "the arrival to be noticed",
    )

    assert field.client.call("patch.apply", name="good.zip")["verdict"] == "committed"
    with pytest.raises(RemoteError):
        field.client.call("patch.apply", name="old.zip")
    with pytest.raises(RemoteError):
        field.client.call("patch.apply", name="junk")
    assert sorted(path.name for path in inbox.iterdir()) == ["applied", "notes.txt", "rejected"]
    report = json.loads((inbox / "applied/good.zip.json").read_text())
    assert (report["verdict"], report["targets"][0]["build_after"]) == ("committed", 300)
    assert (inbox / "applied/good.zip").read_bytes() == data
    assert json.loads((inbox / "rejected/old.zip.json").read_text())["code"] == "gate.build"
    assert json.loads((inbox / "rejected/junk.zip.json").read_text())["verdict"] == "refused"


def test_auto_applies_what_arrives_once_its_digest_is_there(field: Field) -> None:
    field.start("web", patch="auto = true\n")
    field.client.close()
    field.serve.stop()
    field.serve.write(field.serve.config.read_text().replace('trust = "none"', 'trust = "digest"'))
    field.client = field.serve.start()
    field.said("web", "old-a")
    package = field.package("web")
    shutil.copy(package, field.serve.inbox / "p.zip")
    wait_for(lambda: "waits in the inbox" in field.serve.errors(), "the supervisor to miss the digest")
    checksum = hashlib.sha256(package.read_bytes()).hexdigest()
    (field.serve.inbox / "p.zip.sha256").write_text(f"{checksum}  p.zip\n")
    field.said("web", "build=300 a.txt=new-a")
    wait_for((field.serve.inbox / "applied/p.zip.json").exists, "the report")


def test_a_patch_that_waits_in_the_inbox_keeps_none_waiting_for_other_targets(field: Field) -> None:
    field.start("a", "b", patch="auto = true\n", each={"a": '[target.a.patch]\ncommit = "manual"\n'})
    field.drop(field.package("a"), "1.zip")
    txn = wait_for(lambda: field.target("a")["uncommitted"], "the first to wait for its commit")
    field.drop(field.package("a", build=301, before={"a.txt": "new-a"}, files={"a.txt": "x"}), "2.zip")
    wait_for(lambda: field.target("a")["waiting"], "the second to wait for the first")
    field.drop(field.package("b"), "3.zip")
    field.said("b", "build=300 a.txt=new-a")
    field.client.call("patch.commit", id=str(txn))
    field.said("a", "build=301 a.txt=x")
    wait_for((field.serve.inbox / "applied/3.zip.json").exists, "the report")


def test_a_patch_of_the_inbox_that_is_aborted_is_not_applied_again(field: Field) -> None:
    field.start("a", "b", patch="auto = true\n", each={"a": '[target.a.patch]\ncommit = "manual"\n'})
    field.drop(field.package("a"), "1.zip")
    txn = wait_for(lambda: field.target("a")["uncommitted"], "the first to wait for its commit")
    # Whatever else comes has the inbox looked at again.
    field.drop(field.package("b"), "2.zip")
    wait_for((field.serve.inbox / "applied/2.zip.json").exists, "the report")
    field.drop(field.package("b", build=301, before={"a.txt": "new-a"}, files={"a.txt": "x"}), "3.zip")
    wait_for((field.serve.inbox / "applied/3.zip.json").exists, "the report")
    assert field.target("a")["waiting"] == []
    # Another one under its name is another matter.
    field.drop(field.package("a", build=302), "1.zip")
    field.drop(field.package("b", build=302, before={"a.txt": "x"}, files={"a.txt": "y"}), "4.zip")
    wait_for((field.serve.inbox / "applied/4.zip.json").exists, "the report")
    assert field.client.call("patch.abort", id=str(txn))["verdict"] == "rolled_back"
    other = wait_for(lambda: field.target("a")["uncommitted"], "the other one to wait for its commit")
    field.said("a", "build=302 a.txt=new-a")
    assert field.client.call("patch.abort", id=str(other))["verdict"] == "rolled_back"
    wait_for((field.serve.inbox / "rejected/1.zip.json").exists, "the report")
    field.said("a", "build=200 a.txt=old-a")
    history = field.client.call("patch.history", target="a")["transactions"]
    assert [(entry["txn"], entry["verdict"]) for entry in history] == [
        (other, "rolled_back"),
        (txn, "rolled_back"),
    ]


def test_the_end_of_the_supervisor_is_no_reason_to_reject_a_package_of_the_inbox(field: Field) -> None:
    field.start("a", "b", "c", patch="auto = true\n", each={"b": '[target.b.patch]\ncommit = "manual"\n'})
    field.drop(field.package("a", probation=600.0), "a.zip")
    field.drop(field.package("b"), "b.zip")
    field.drop(field.package("c", probation=600.0), "stopped.zip")
    field.said("a", "build=300")
    field.said("c", "build=300")
    wait_for(lambda: field.target("b")["uncommitted"], "the patch of b to wait for its commit")
    field.drop(field.package("b", build=400, before={"a.txt": "new-a"}, files={"a.txt": "x"}), "queued.zip")
    wait_for(lambda: field.target("b")["waiting"], "the next one to wait for its turn")
    field.client.call("stop", names=["c"])
    wait_for((field.serve.inbox / "rejected/stopped.zip.json").exists, "what an operator stopped to be filed")
    field.client.close()
    assert field.serve.stop() == 0
    inbox = sorted(path.name for path in field.serve.inbox.glob("*.zip"))
    assert inbox == ["a.zip", "b.zip", "queued.zip"]
    assert [path.name for path in (field.serve.inbox / "rejected").glob("*.zip")] == ["stopped.zip"]
    assert field.content("a")["a.txt"] == field.content("b")["a.txt"] == "old-a"

    field.client = field.serve.start()
    field.said("a", "build=300 a.txt=new-a")
    txn = wait_for(lambda: field.target("b")["uncommitted"], "the patch of b to wait for its commit")
    field.client.call("patch.abort", id=str(txn))
    wait_for((field.serve.inbox / "rejected/b.zip.json").exists, "what an operator aborted to be filed")


def test_a_package_can_be_sent_over_the_socket(field: Field) -> None:
    field.start("web")
    package = field.package("web")
    upload = field.client.upload(package)
    assert field.client.call("patch.verify", upload=upload)["build"] == 300
    assert field.client.call("patch.apply", upload=upload)["verdict"] == "committed"
    field.said("web", "build=300")
    assert not list((field.folder / ".asyncsup/uploads").iterdir())


# --- looking back -------------------------------------------------------------------------------------------


def test_a_package_that_has_no_room_is_not_kept_by_half(field: Field) -> None:
    field.start("web")
    large = field.folder / "large"
    large.write_bytes(bytes(5000))
    with field.no_room(), pytest.raises(RemoteError) as caught:
        field.client.upload(large)
    assert caught.value.error_code == "upload.failed"
    assert not list((field.folder / ".asyncsup/uploads").iterdir())
    upload = field.client.upload(field.package("web"))
    assert field.client.call("patch.apply", upload=upload)["verdict"] == "committed"


def test_history_and_show_tell_what_happened_step_by_step(field: Field) -> None:
    field.start("web")
    report = field.apply(field.package("web"))
    field.behave("web", prepare="refuse")
    field.refused(field.package("web", build=400, before={"a.txt": "new-a"}, files={"a.txt": "x"}))
    field.behave("web")
    back = field.client.call("patch.rollback", target="web")
    history = field.client.call("patch.history", target="web")["transactions"]
    assert [(entry["action"], entry["verdict"]) for entry in history] == [
        ("rollback", "committed"), ("apply", "target_refused"), ("apply", "committed"),
    ]  # fmt: skip
    shown = field.client.call("patch.show", id=str(report["txn"]))
    assert shown["asked_by"].startswith("root" if os.geteuid() == 0 else "")
    assert [step["step"] for step in shown["steps"]] == [step["step"] for step in report["steps"]]
    latest = field.client.call("patch.show", id=report["patch"][:10])
    assert (latest["txn"], latest["action"]) == (back["txn"], "rollback")


def test_plan_says_what_apply_would_do_and_does_nothing(field: Field) -> None:
    field.start("web")
    before = field.picture("web")
    plan = field.client.call("patch.plan", path=str(field.package("web")))
    assert plan["verdict"] == "apply"
    (entry,) = plan["targets"]
    assert all(gate["ok"] for gate in entry["gates"])
    assert {(f["path"], f["op"]) for f in entry["files"]} == {
        ("a.txt", "modified"), ("b.txt", "modified"), ("sub/c.txt", "new"),
    }  # fmt: skip
    assert [i["told_by"] for i in entry["instances"]] == ["sdk"]
    plan = field.client.call("patch.plan", path=str(field.package("web", kind=Kind.COLD)))
    assert [i["told_by"] for i in plan["targets"][0]["instances"]] == ["restart"]
    assert field.picture("web") == before
    assert field.client.call("patch.history")["transactions"] == []
