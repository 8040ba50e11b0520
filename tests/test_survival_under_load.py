"""The supervisor is killed again and again at random moments, under load: nothing is lost or doubled.

Targets flood their logs in every format, through rotation and compression; others crash by themselves; one is
patched all the time. Every line is numbered and looked for afterwards; every process keeps a lock that a
second one of the same instance would find taken, and an account of its life, of which those that nobody ends
have one only. Between the kills the test waits until something has come of the life before: however slow the
machine, so many patches are committed, and so often everybody is taken back.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from chance import EVERYTHING, dice
from conftest import Serve, end_process, processes_of_this_run, wait_for
from test_patching import PROGRAM
from told import Tell

from asyncsup.client import ControlClient
from asyncsup.errors import AsyncsupError
from asyncsup.patch.build import build_patch
from asyncsup.patch.manifest import Kind

KILLS = 200 if EVERYTHING else 16
LONGEST_LIFE_SECONDS = 1.5
PATIENCE_SECONDS = 200.0
"""Until all the output is written that has piled up, on a machine with other things to do."""
NUMBERED = Path(__file__).parent / "programs" / "numbered.py"
LINE = re.compile(rb"^(?:\S+ (?:\| )?)?(\S+-\d+-\d+) (\d{9}) x{30}$")

STEADY = {
    "raw": ("raw", 250, 0.05, 0),
    "stamped": ("timestamp", 250, 0.05, 0),
    "json": ("json", 250, 0.05, 0),
    "gush": ("raw", 25_000, 3.0, 0),
}
CRASHING = {
    "crash": ("raw", 100, 0.02, 15),
    "fall": ("timestamp", 100, 0.02, 8),
    "trip": ("json", 100, 0.02, 23),
    "slip": ("prefix", 100, 0.02, 11),
}
BY_A_KILL = {
    "supervisor.unreachable",
    # The target has not found the next supervisor in time.
    "patch.target_died",
    "patch.no_answer",
    "patch.rolled_back",
}
"""Codes of errors that a kill in the middle of a patch, or shortly before it, may cause."""

Floods = Mapping[str, tuple[str, int, float, int]]
"""By target: format, lines per burst, pause, and after how many bursts it kills itself."""


@pytest.fixture
def serve(short_tmp: Path) -> Iterator[Serve]:
    server = Serve(short_tmp)
    yield server
    server.stop(timeout=PATIENCE_SECONDS)
    for line in processes_of_this_run():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(line.split()[0]), signal.SIGKILL)


class Stage:
    """The configuration, the accounts, and the patches."""

    def __init__(self, serve: Serve, floods: Floods) -> None:
        self.serve = serve
        self.floods = floods
        self.accounts = serve.folder / "accounts"
        self.accounts.mkdir()
        self.root = serve.folder / "patched"
        self.root.mkdir()
        (self.root / "program.py").write_bytes(PROGRAM.read_bytes())
        for name in ("a.txt", "b.txt"):
            (self.root / name).write_text("0")
        text = [
            '[patch]\ntrust = "none"\nprobation = "200ms"\nkeep = 1\nack_timeout = "60s"\n',
            '[defaults]\nrestart_delay = "50ms"\nrestart_max_delay = "200ms"\nmin_uptime = "50ms"\n'
            'start_limit_interval = 0\nstop_timeout = "20s"\n',
            f"[target.patched]\ncommand = {json.dumps([sys.executable, str(self.root / 'program.py')])}\n"
            'root = "patched"\nprotocol = "sdk"\nbuild = 1\nstart_timeout = "5m"\n',
        ]
        for name, (format_, *arguments) in floods.items():
            command = [sys.executable, str(NUMBERED), str(self.accounts), *map(str, arguments)]
            text.append(
                f"[target.{name}]\ncommand = {json.dumps(command)}\ninstances = 2\n"
                f'log = {{ format = "{format_}", max_size = "700KB", max_files = 10000, max_age = "1h", '
                'compress = "gzip" }\n'
            )
        serve.write("".join(text))

    def package(self, build: int) -> Path:
        """From ``build - 1`` to ``build``; the files hold their build."""
        old, new = (self.serve.folder / f"{age}-{build}" for age in ("old", "new"))
        for folder, content in ((old, build - 1), (new, build)):
            folder.mkdir()
            for name in ("a.txt", "b.txt"):
                (folder / name).write_text(str(content if content > 1 else 0))
        output = self.serve.folder / f"{build}.zip"
        build_patch(
            old=old, new=new, output=output, name="load", version=str(build), build=build, kind=Kind.WARM,
            targets=["patched"], regions=["local"],
        )  # fmt: skip
        return output


class Patching(threading.Thread):
    """Applies one patch after the other; a supervisor that dies on the way is no reason to stop.

    Attributes:
        applied: how many are there, by what has been answered. The last build is one more.
    """

    def __init__(self, stage: Stage) -> None:
        super().__init__(daemon=True)
        self.stage = stage
        self.done = threading.Event()
        self.applied = 0
        self.fault: BaseException | None = None

    def run(self) -> None:
        try:
            build = 2
            while not self.done.is_set():
                package = self.stage.package(build)
                while not self.apply(package):
                    if self.done.is_set():
                        return
                    time.sleep(0.05)
                self.applied += 1
                build += 1
        except BaseException as error:
            self.fault = error
            raise

    def apply(self, package: Path) -> bool:
        """Whether the patch is there, by this or an earlier attempt."""
        try:
            with ControlClient(self.stage.serve.endpoint) as client:
                report = client.call(
                    "patch.apply", path=str(package), retry_held=True, timeout=PATIENCE_SECONDS
                )
        except AsyncsupError as error:
            if error.error_code not in BY_A_KILL:
                raise
            return False
        assert report["verdict"] in {"committed", "already"}, report
        return True

    def progress(self) -> None:
        """Wait for another patch."""
        before = self.applied
        wait_for(lambda: self.fault or self.applied > before, "another patch", PATIENCE_SECONDS)
        assert self.fault is None


def kill_supervisor(serve: Serve) -> None:
    """Also one that has not come up yet."""
    end_process(wait_for(lambda: serve.supervisor, "a supervisor", 60))


def kill_both(serve: Serve) -> None:
    serve.kill()
    serve.start().close()


@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    ("kill", "times", "floods"),
    [
        pytest.param(kill_supervisor, KILLS, {**STEADY, **CRASHING}, id="supervisor"),
        # Whoever ends while nobody holds his output takes along what nobody has read.
        pytest.param(kill_both, KILLS // 5, STEADY, id="keeper and supervisor"),
    ],
)
def test_killed_at_random_moments_it_loses_nothing_and_doubles_nothing(
    serve: Serve,
    kill: Callable[[Serve], None],
    times: int,
    floods: Floods,
    tell: Tell,
) -> None:
    stage = Stage(serve, floods)
    random = dice("kills")
    serve.start().close()
    patching = Patching(stage)
    patching.start()
    began = time.monotonic()
    patched, taken_back = 0, 0
    for number in range(times):
        if number % 4:
            # The others may be killed while they take back what runs. Not all of them, on a slow machine: the
            # keeper gives up when none comes to serving.
            with serve.connect() as client:
                if patched:
                    taken_back += everybody_taken_back(client)
                else:
                    patched = everybody_runs(client)
            if number % 2:
                patching.progress()
        time.sleep(random.uniform(0, LONGEST_LIFE_SECONDS))
        kill(serve)
    took = time.monotonic() - began
    client = serve.connect()
    taken_back += everybody_taken_back(client)
    patching.progress()
    patching.done.set()
    patching.join(PATIENCE_SECONDS)
    assert patching.fault is None
    assert patching.applied > times // 2
    client.call("wait", {"names": ["patched", *STEADY], "for": "ready", "timeout": PATIENCE_SECONDS})
    expect_as_patched(stage, client, patched, patching.applied)
    wait_for(
        lambda: all(len(lives) > 1 for _, lives in lives_of(stage, CRASHING)), "crashes", PATIENCE_SECONDS
    )
    client.call("stop", {"names": ["all"]}, timeout=PATIENCE_SECONDS)
    client.close()
    assert serve.stop(timeout=PATIENCE_SECONDS) == 0
    wait_for(lambda: not processes_of_this_run(), "all processes to be gone")
    assert {instance: len(lives) for instance, lives in lives_of(stage, STEADY)} == dict.fromkeys(
        (f"{name}:{index}" for name in STEADY for index in range(2)), 1
    )
    lines, lives = check_lines(stage)
    assert "Traceback" not in serve.errors()
    tell(
        f"{times} kills in {took:.0f} s: {lives} processes, {lines} lines, {patching.applied} patches; "
        f"at least {taken_back} times a process was taken back"
    )


def everybody_runs(client: ControlClient) -> int:
    """Wait for all that nobody is going to end; returns the pid of who is patched."""

    def pids() -> list[int] | None:
        targets = client.call("status", names=["patched", *STEADY])["targets"]
        found = [instance["pid"] for target in targets for instance in target["instances"]]
        return found if all(found) else None

    wait_for(pids, "everybody to run", PATIENCE_SECONDS)
    return int(client.call("status", names=["patched"])["targets"][0]["instances"][0]["pid"])


def everybody_taken_back(client: ControlClient) -> int:
    """How many processes this supervisor has found of the one before: all that nobody has ended."""
    adopted: int = client.call("supervisor.info")["adopted"]
    assert adopted >= 2 * len(STEADY) + 1
    return adopted


def lives_of(stage: Stage, floods: Floods) -> Iterator[tuple[str, list[Path]]]:
    """By instance, the accounts of its processes."""
    for name in floods:
        if name in stage.floods:
            for index in range(2):
                yield f"{name}:{index}", list(stage.accounts.glob(f"life-{name}:{index}-*"))


def expect_as_patched(stage: Stage, client: ControlClient, pid: int, applied: int) -> None:
    """Whatever became of the last patch: files, program and supervisor agree about it. The program was never
    restarted, and no patch that was committed is lost."""

    def agree() -> bool:
        (target,) = client.call("status", names=["patched"])["targets"]
        files = {(stage.root / name).read_text() for name in ("a.txt", "b.txt")}
        build = target["build"]
        content = str(build if build > 1 else 0)
        said = f"one build={build} a.txt={content} b.txt={content}"
        return target["busy"] is None and files == {content} and target["instances"][0]["status_text"] == said

    wait_for(agree, "the files, the program and the supervisor to agree", PATIENCE_SECONDS)
    (target,) = client.call("status", names=["patched"])["targets"]
    assert target["instances"][0]["pid"] == pid
    assert target["build"] in {applied + 1, applied + 2}


def check_lines(stage: Stage) -> tuple[int, int]:
    """Compare what is in the logs with the accounts; returns the number of lines and of lives."""
    assert not list(stage.accounts.glob("TWICE-*"))
    found: dict[bytes, int] = {}
    for name in stage.floods:
        for index in range(2):
            for text in lines_of(stage, name, index):
                match = LINE.match(text)
                assert match, f"{name}.{index}: {text!r}"
                life, number = match.groups()
                expected = found.get(life, 0)
                assert int(number) == expected, f"{life!r}: {int(number)} comes where {expected} should"
                found[life] = expected + 1
    accounts = {path.name.removeprefix("life-"): path.read_text() for path in stage.accounts.glob("life-*")}
    assert {life.decode(): f"{count:012d}" for life, count in found.items()} == {
        life: count for life, count in accounts.items() if count
    }
    return sum(found.values()), len(accounts)


def lines_of(stage: Stage, name: str, index: int) -> Iterator[bytes]:
    folder = stage.serve.folder / ".asyncsup/logs"
    current = folder / f"{name}.{index}.log"
    found: dict[int, Path] = {}
    for path in folder.glob(f"{current.name}.*"):
        if path.suffix == ".part":  # of what has begun to be compressed
            continue
        number = int(path.name.removeprefix(f"{current.name}.").removesuffix(".gz"))
        # Killed right after a file had been compressed, its original is still there.
        assert number not in found or content(path) == content(found[number])
        found[number] = path
    is_json = stage.floods[name][0] == "json"
    for path in [*(found[number] for number in sorted(found, reverse=True)), current]:
        data = content(path)
        assert not data or data.endswith(b"\n"), path
        for line in data.splitlines():
            yield str(json.loads(line)["line"]).encode() if is_json else line


def content(path: Path) -> bytes:
    if path.suffix == ".gz":
        return gzip.decompress(path.read_bytes())
    return path.read_bytes() if path.exists() else b""
