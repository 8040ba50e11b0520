"""Whoever has to wait is told for what, or for whom: in time-outs, in `status`, and on the command line."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import Asked, Serve, wait_for
from test_patching import Field
from test_shutdown import Scene
from test_supervisor import QUICK, SLEEPER, fails, reached, target

SLOW_DB = (
    "[target.db]\ncommand = 'sleep 3600'\nready.exec = ['test', '-e', 'up']\nready.interval = '20ms'\n"
    "start_timeout = '10m'\n"
)
"""It is ready when there is a file `up`."""
APP = f"[target.app]\n{SLEEPER}depends_on = ['db']\n"


class Said:
    """A command that runs, and what it has said so far."""

    def __init__(self, process: subprocess.Popen[bytes], out: Path, err: Path) -> None:
        self.process = process
        self._out, self._err = out, err

    @property
    def err(self) -> str:
        return self._err.read_text()

    @property
    def out(self) -> str:
        return self._out.read_text()

    def ends(self) -> int:
        return self.process.wait(100)


@contextmanager
def command(serve: Serve, *words: str) -> Iterator[Said]:
    out, err = serve.folder / "command.out", serve.folder / "command.err"
    line = [sys.executable, "-m", "asyncsup", "--endpoint", serve.endpoint, *words]
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)
    try:
        yield Said(process, out, err)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def test_a_time_out_says_what_was_waited_for(serve: Serve) -> None:
    with serve.start(QUICK + SLOW_DB + APP) as client:
        reached(client, "app", "waiting")
        error = fails(client, "start", names=["app"], timeout=0.1)
        assert error.error_code == "timeout"
        assert error.message == "not done after 0.1 s: app is waiting for db"
        error = fails(client, "wait", names=["all"], **{"for": "ready"}, timeout=0.1)
        assert error.error_code == "timeout"
        assert error.message.endswith(": db:0 is starting, app:0 is waiting for db")


def test_a_time_out_says_whom_one_has_waited_for(scene: Scene) -> None:
    scene.serve.begin(scene.program("web"))
    scene.ready()
    with scene.serve.connect() as client:
        first = Asked(scene.serve.endpoint, "restart", names=["web"])
        wait_for(lambda: scene.told("web"), "web to be busy")
        current = target(client, "web")["current"]
        assert current["operation"] == "restart"
        assert current["since"] >= 0
        error = fails(client, "restart", names=["web"], timeout=0.1)
        assert error.message.startswith(
            f"not done after 0.1 s: web is busy: restart for {current['asked_by']}, since "
        )
        scene.let_go("web")
        first.result()
        assert target(client, "web")["current"] is None


def test_a_command_that_has_to_wait_says_for_whom(scene: Scene) -> None:
    scene.serve.begin(scene.program("web"))
    scene.ready()
    first, second = (Asked(scene.serve.endpoint, "restart", names=["web"]) for _ in range(2))
    with scene.serve.connect() as client:
        wait_for(lambda: scene.told("web") and target(client, "web")["waiting"], "web to be busy")
    with command(scene.serve, "restart", "web") as said:
        wait_for(lambda: "\n" in said.err, "a word")
        assert said.err.startswith("asyncsup: waiting: web is busy: restart for ")
        assert said.err.endswith("; Ctrl-C gives up\n")
        scene.let_go("web")
        assert said.ends() == 0
        assert said.err.count("waiting: ") == 1
        assert said.out.startswith("ok      web")
    first.result()
    second.result()


def test_a_patch_that_has_to_wait_says_for_whom(field: Field) -> None:
    field.start("web", "other")
    first = Asked(field.serve.endpoint, "patch.apply", path=str(field.package("web", probation=3600)))
    field.said("web", "build=300")
    second = Asked(field.serve.endpoint, "patch.apply", path=str(field.package("web", "other", build=400)))
    wait_for(lambda: field.target("web")["waiting"], "the second to be queued")
    third = field.package("web", "other", build=500)
    with command(field.serve, "patch", "apply", str(third)) as said:
        wait_for(lambda: "\n" in said.err, "a word")
        assert said.err.startswith("asyncsup: waiting: web is busy: patch for ")
        said.process.send_signal(signal.SIGINT)
        assert said.ends() == 130
        assert said.err.count("waiting: ") == 1
    field.client.call("stop", names=["web"])
    first.error("patch.rolled_back")
    second.error("request.cancelled")


@pytest.mark.parametrize("words", [("start", "app"), ("wait", "app"), ("restart", "app")], ids=" ".join)
def test_a_command_that_has_to_wait_says_for_what(serve: Serve, words: tuple[str, ...]) -> None:
    with serve.start(QUICK + SLOW_DB + APP) as client:
        reached(client, "app", "waiting")
        with command(serve, *words) as said:
            wait_for(lambda: "\n" in said.err, "a word")
            assert said.err == "asyncsup: waiting: app is waiting for db; Ctrl-C gives up\n"
            (serve.folder / "up").touch()
            assert said.ends() == 0


@pytest.mark.parametrize("option", ["--json", "--quiet"])
def test_it_is_for_people_only(serve: Serve, option: str) -> None:
    with serve.start(QUICK + SLOW_DB + APP) as client:
        reached(client, "app", "waiting")
        # Until the supervisor gives up there is time enough to say it.
        with command(serve, "start", "app", option, "--timeout", "3s") as said:
            assert said.ends() == 124
            assert "waiting: " not in said.err


def test_shutdown_says_who_is_still_there_and_again_when_others_are(scene: Scene) -> None:
    scene.serve.begin(scene.program("db") + scene.program("web", "depends_on = ['db']"))
    scene.ready()
    with command(scene.serve, "shutdown") as said:
        begin = "asyncsup: still there: "
        wait_for(lambda: said.err.endswith(f"{begin}db:0 (running), web:0 (stopping)\n"), "a word")
        scene.let_go("web")
        wait_for(lambda: said.err.endswith(f"{begin}db:0 (stopping)\n"), "another one")
        scene.let_go("db")
        assert said.ends() == 0
        assert said.out.endswith("the supervisor has ended\n")
        assert all(line.startswith(begin) for line in said.err.splitlines())
        assert len(set(said.err.splitlines())) == said.err.count("\n")
