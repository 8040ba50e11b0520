"""`asyncsup demo`: the four cases, played against real targets in a temporary folder.

Each case has a target of its own, a fresh copy of the same program at build 200, all under one real
`asyncsup serve`. Each is played with a native package and with one in the prototype's layout, and before that
with one byte of the package flipped. What is claimed is checked from outside: the pid, the files, and what
the program says of itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from asyncsup.client import ControlClient
from asyncsup.errors import AsyncsupError, RemoteError, SupervisorUnreachableError, UsageError
from asyncsup.patch.build import build_patch, build_prototype_patch
from asyncsup.patch.manifest import Kind
from asyncsup.render import Ink, report_lines

REGION: Final = "us-east-1"
BUILD_BEFORE: Final = 200
PATIENCE_SECONDS: Final = 30.0

Format = Literal["native", "prototype"]
Say = Callable[[str], None]


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One of the four: what the patch is, and what must come of it."""

    name: str
    title: str
    kind: Kind
    build: int
    region: str
    refused_by: str | None = None


CASES: Final = (
    Case(
        name="warm", title="Warm: the job changes, the process stays",
        kind=Kind.WARM, build=300, region=REGION,
    ),
    Case(
        name="cold", title="Cold: the program itself becomes v2.0",
        kind=Kind.COLD, build=300, region=REGION,
    ),
    Case(
        name="region", title=f"Region: target in {REGION}, patch for India",
        kind=Kind.WARM, build=300, region="India", refused_by="gate.region",
    ),
    Case(
        name="build", title="Build: target at 200, patch at 100",
        kind=Kind.WARM, build=100, region=REGION, refused_by="gate.build",
    ),
)  # fmt: skip


class Sight(msgspec.Struct, frozen=True, kw_only=True):
    """What can be seen of a target from outside."""

    pid: int
    restarts: int
    build: int
    says: str
    files: str
    """One digest over every path and its content."""


class Play(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of one play."""

    title: str
    exit_status: int
    code: str | None
    pid_before: int
    pid_after: int
    report: Mapping[str, Any]
    faults: tuple[str, ...]


class Stage:
    """The temporary folder, the supervisor in it, and the packages."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._program = demo_program()
        names = [f"{case.name}-{format_}" for format_ in ("native", "prototype") for case in CASES]
        lines = [
            f'[supervisor]\nregion = "{REGION}"\nlog_level = "warning"\n',
            '[patch]\ntrust = "digest"\nprobation = "200ms"\n',
            f'[defaults]\nprotocol = "sdk"\nbuild = {BUILD_BEFORE}\nlayout = "tree"\n',
        ]
        for name in names:
            shutil.copytree(self._program, folder / name)
            command = json.dumps([sys.executable, str(folder / name / "demo_target.py")])
            lines.append(f'[target.{name}]\nroot = "{name}"\ncommand = {command}\n')
        self.config = folder / "asyncsup.toml"
        self.config.write_text("\n".join(lines), encoding="utf-8")
        (folder / "packages").mkdir()

    def __enter__(self) -> Stage:
        self._errors = (self.folder / "serve.err").open("wb")
        self._supervisor = subprocess.Popen(
            [sys.executable, "-m", "asyncsup", "-c", str(self.config), "serve"],
            stdin=subprocess.DEVNULL, stdout=self._errors, stderr=self._errors,
        )  # fmt: skip
        self.client = ControlClient(f"ipc://{self.folder}/.asyncsup/run/control.sock")
        try:
            self._await_supervisor()
            self.client.call("wait", {"names": ["all"], "for": "ready", "timeout": PATIENCE_SECONDS})
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self._supervisor.terminate()
        try:
            self._supervisor.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self._supervisor.kill()
            self._supervisor.wait()
        self._errors.close()

    def _await_supervisor(self) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                self.client.call("supervisor.info", timeout=5)
            except SupervisorUnreachableError:
                if self._supervisor.poll() is not None or time.monotonic() > deadline:
                    text = (self.folder / "serve.err").read_text(errors="replace").strip()
                    raise AsyncsupError(f"the demo's supervisor did not start:\n{text}") from None
                time.sleep(0.02)
            else:
                return

    def package(self, case: Case, format_: Format) -> Path:
        """Build the patch of a case: a new job for the warm ones, a new program for the cold one."""
        target = f"{case.name}-{format_}"
        output = self.folder / "packages" / f"{target}.zip"
        old = self._program
        changed, new, deleted = self._changes(case)
        if format_ == "prototype":
            build_prototype_patch(
                output=output,
                region=case.region,
                build=case.build,
                warm=case.kind is Kind.WARM,
                new={f"/{path}": content for path, content in new.items()},
                modified={f"/{path}": content for path, content in changed.items()},
                deleted=[f"/{path}" for path in deleted],
            )
            return output
        after = self.folder / "packages" / target
        shutil.copytree(old, after)
        for path, content in {**changed, **new}.items():
            (after / path).parent.mkdir(parents=True, exist_ok=True)
            (after / path).write_bytes(content)
        for path in deleted:
            (after / path).unlink()
        build_patch(
            old=old,
            new=after,
            output=output,
            name=f"demo-{case.name}",
            version="2.0",
            build=case.build,
            kind=case.kind,
            targets=[target],
            regions=[case.region],
        )
        return output

    def _changes(self, case: Case) -> tuple[dict[str, bytes], dict[str, bytes], list[str]]:
        """Modified and new content by path, and deleted paths."""
        if case.kind is Kind.COLD:
            source = (self._program / "demo_target.py").read_bytes()
            program = source.replace(b'VERSION = "1.0"', b'VERSION = "2.0"')
            assert program != source
            return {"demo_target.py": program}, {}, []
        job = json.loads((self._program / "work/job.json").read_bytes())
        job["job"] = "patched while it ran"
        return (
            {"work/job.json": json.dumps(job).encode()},
            {"work/rest/res.json": b'{"resource": "new"}\n'},
            ["work/libs/lib.txt"],
        )

    def look(self, target: str) -> Sight:
        found = self.client.call("status", names=[target])["targets"][0]
        instance = found["instances"][0]
        root = self.folder / target
        digest = hashlib.sha256()
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
        return Sight(
            pid=instance["pid"] or 0,
            restarts=instance["restarts"],
            build=found["build"],
            says=instance["status_text"],
            files=digest.hexdigest(),
        )

    def play(self, case: Case, format_: Format, *, flipped: bool) -> Play:
        target = f"{case.name}-{format_}"
        package = self.folder / "packages" / f"{target}.zip"
        if not package.exists():
            package = self.package(case, format_)
        checksum = hashlib.sha256(package.read_bytes()).hexdigest()
        if flipped:
            data = bytearray(package.read_bytes())
            data[len(data) // 2] ^= 1
            package = package.with_suffix(".flipped.zip")
            package.write_bytes(data)
        before = self.look(target)
        exit_status, code, report = 0, None, {}
        try:
            report = self.client.call(
                "patch.apply", path=str(package), sha256=checksum, target=target, timeout=PATIENCE_SECONDS
            )
        except RemoteError as error:
            exit_status, code = error.remote_exit_status, error.error_code
            report = error.details["report"]
        expected = "demo.flipped" if flipped else case.refused_by
        after = self._settled(case, target, before) if expected is None else self.look(target)
        faults = (
            _faults_of_a_refusal(case, before, after, (exit_status, code), flipped=flipped)
            if expected is not None
            else _faults_of_an_apply(case, before, after, exit_status)
        )
        title = f"{case.title} ({format_} package{', one byte flipped' if flipped else ''})"
        return Play(
            title=title,
            exit_status=exit_status,
            code=code,
            pid_before=before.pid,
            pid_after=after.pid,
            report=report,
            faults=tuple(faults),
        )

    def _settled(self, case: Case, target: str, before: Sight) -> Sight:
        """The program's own words follow its acknowledgement by a moment; wait for them, not for luck."""
        wanted = "v2.0" if case.kind is Kind.COLD else "patched while it ran"
        deadline = time.monotonic() + PATIENCE_SECONDS
        while wanted not in (after := self.look(target)).says and time.monotonic() < deadline:
            time.sleep(0.02)
        return after


def _faults_of_a_refusal(
    case: Case, before: Sight, after: Sight, outcome: tuple[int, str | None], *, flipped: bool
) -> list[str]:
    exit_status, code = outcome
    faults = []
    if exit_status != (21 if flipped else 20):
        faults.append(f"exit status {exit_status} instead of {21 if flipped else 20}")
    if not flipped and code != case.refused_by:
        faults.append(f"refused by {code} instead of {case.refused_by}")
    if before != after:
        faults.append(f"something was touched: {before} became {after}")
    return faults


def _faults_of_an_apply(case: Case, before: Sight, after: Sight, exit_status: int) -> list[str]:
    faults = []
    if exit_status != 0:
        faults.append(f"exit status {exit_status} instead of 0")
    if after.build != case.build:
        faults.append(f"the target is at build {after.build} instead of {case.build}")
    if case.kind is Kind.WARM:
        if (after.pid, after.restarts) != (before.pid, before.restarts):
            faults.append(f"the process was restarted: pid {before.pid} became {after.pid}")
        if "patched while it ran" not in after.says:
            faults.append(f"it does not work on the new job: {after.says!r}")
    else:
        if after.pid == before.pid:
            faults.append("the process was not replaced")
        if "v2.0" not in after.says:
            faults.append(f"it did not come back as v2.0: {after.says!r}")
    return faults


def demo_program() -> Path:
    """The folder with the demo target: beside this file where installed, in `examples/` in a checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "demo_target", here.parent / "examples" / "demo_target"):
        if (folder / "demo_target.py").exists():
            return folder
    raise AsyncsupError("the demo's target program is missing from this installation")


def run_demo(*, as_json: bool = False, colour: bool = False, keep: Path | None = None) -> int:
    """Play all cases, print what happens, and return the exit status: 0 only if all went as they should.

    Args:
        keep: a folder to play in and leave behind, instead of a temporary one.

    Raises:
        UsageError: ``demo.folder``: that folder is of no use.
    """
    ink = Ink(colour)
    say: Say = (lambda _: None) if as_json else _say
    folder = Path(tempfile.mkdtemp(prefix="asyncsup-demo-")) if keep is None else _empty_folder(keep)
    plays: list[Play] = []
    try:
        with Stage(folder) as stage:
            say(f"{2 * len(CASES)} targets at build {BUILD_BEFORE} in {REGION} are ready, one supervisor.")
            formats: tuple[Format, ...] = ("native", "prototype")
            for format_ in formats:
                for case in CASES:
                    for flipped in (True, False):
                        play = stage.play(case, format_, flipped=flipped)
                        plays.append(play)
                        _show(play, say, ink)
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    failed = [play for play in plays if play.faults]
    if as_json:
        _say(json.dumps({"ok": not failed, "plays": [_to_json(play) for play in plays]}))
    say("")
    if failed:
        say(ink("red", f"{len(failed)} of {len(plays)} plays did not go as they should."))
        return 1
    say(ink("green", f"All {len(plays)} plays went as they should."))
    return 0


def _empty_folder(path: Path) -> Path:
    """The absolute path of a folder that is made if need be; one with anything in it is not played in."""
    folder = Path(os.path.abspath(path))  # noqa: PTH100 - also where the working directory is a link
    try:
        folder.mkdir(parents=True, exist_ok=True)
        occupied = any(folder.iterdir())
    except OSError as error:
        raise UsageError(f"{folder} cannot be played in: {error.strerror}", code="demo.folder") from None
    if occupied:
        raise UsageError(f"{folder} is not empty; name a new folder", code="demo.folder")
    return folder


def _show(play: Play, say: Say, ink: Ink) -> None:
    say("")
    say(ink("bold", f"== {play.title}"))
    for line in report_lines(play.report, ink=ink):
        say(f"   {line}")
    same = f"pid {play.pid_before}: the same process" if play.pid_before == play.pid_after else (
        f"pid {play.pid_before} -> {play.pid_after}: a new process"
    )  # fmt: skip
    say(f"   exit status {play.exit_status}; {same}")
    for fault in play.faults:
        say(ink("red", f"   NOT as it should be: {fault}"))
    if not play.faults:
        say(ink("green", "   as it should be"))


def _to_json(play: Play) -> dict[str, Any]:
    return {
        "title": play.title,
        "ok": not play.faults,
        "faults": list(play.faults),
        "exit_status": play.exit_status,
        "code": play.code,
        "pid_before": play.pid_before,
        "pid_after": play.pid_after,
        "report": play.report,
    }


def _say(line: str) -> None:
    sys.stdout.write(f"{line}{os.linesep}")
    sys.stdout.flush()
