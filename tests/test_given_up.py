"""What is cancelled between the stop of an instance and its start leaves it running, not stopped."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import Asked, Serve, free_port, wait_for
from test_supervisor import target

from asyncsup.client import ControlClient
from asyncsup.patch.build import build_patch
from asyncsup.patch.manifest import Kind

STUBBORN = (
    "trap 'while [ ! -e go ]; do sleep 0.05; done; exit 0' TERM; echo up; while true; do sleep 0.05; done"
)
"""Ends, once it was told to, when there is a file ``go``."""


def settings(more: str = "", instances: int = 2) -> str:
    return (
        f'[target.web]\ncommand = ["sh", "-c", "{STUBBORN}"]\nready.log = "^up"\ninstances = {instances}\n'
        f'restart_delay = "50ms"\nstop_timeout = "5m"\n{more}'
    )


class Held:
    """A target whose instances are being stopped, and do not end before they are let go."""

    def __init__(self, serve: Serve) -> None:
        self._serve = serve
        self.client: ControlClient

    def start(self, text: str) -> dict[str, Any]:
        """Returns the pids, by name."""
        self.client = self._serve.start(text)
        self.client.call("wait", {"names": ["all"], "for": "ready", "timeout": 60})
        return {name: each["pid"] for name, each in self.instances().items()}

    def instances(self) -> dict[str, Any]:
        return {each["name"]: each for each in target(self.client, "web")["instances"]}

    def stopping(self) -> list[str]:
        return [name for name, each in self.instances().items() if each["state"] == "stopping"]

    def ask(self, method: str, **params: Any) -> Asked:
        return Asked(self._serve.endpoint, method, **params)

    def preempt(self, name: str) -> None:
        """Stop one of the instances while something else is under way, and let all go once that is heard."""
        stop = self.ask("stop", names=[name])

        def is_heard() -> bool:
            found = target(self.client, "web")
            return "stop" in {found["busy"], *(each["operation"] for each in found["waiting"])}

        wait_for(is_heard, "the stop to come in between")
        (self._serve.folder / "go").touch()
        stop.result()
        assert self.instances()[name]["state"] == "stopped"

    def runs_anew(self, name: str, pid: int) -> None:
        wait_for(lambda: self.instances()[name]["pid"] not in {pid, None}, f"another process for {name}")


@pytest.fixture
def held(serve: Serve) -> Iterator[Held]:
    made = Held(serve)
    yield made
    (serve.folder / "go").touch()
    made.client.close()


def test_a_restart_for_its_age_that_a_stop_of_another_instance_preempts(held: Held, serve: Serve) -> None:
    before = held.start(settings())
    serve.write(settings('max_age = "100ms"\n'))
    held.client.call("config.apply")
    old = wait_for(held.stopping, "an instance to be old enough")[0]
    other = next(name for name in before if name != old)
    held.preempt(other)
    held.runs_anew(old, before[old])


def test_a_number_that_is_written_down_counts_whatever_comes_in_between(held: Held) -> None:
    before = held.start(settings())
    scaling = held.ask("scale", name="web", instances=1)
    wait_for(lambda: held.stopping() == ["web:1"], "the last one to be stopped")
    held.preempt("web:0")
    assert scaling.result()["instances"] == 1
    assert list(held.instances()) == ["web:0"]
    held.client.call("start", names=["web"])
    assert held.instances()["web:0"]["pid"] not in {before["web:0"], None}
    assert target(held.client, "web")["state"] == "running"


def test_a_client_that_gives_up_scaling_leaves_no_slot_behind(held: Held, serve: Serve) -> None:
    held.start(settings())
    command = [sys.executable, "-m", "asyncsup", "-c", str(serve.config), "scale", "web", "1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as scaling:
        wait_for(lambda: held.stopping() == ["web:1"], "the last one to be stopped")
        scaling.send_signal(signal.SIGINT)
    held.client.call("supervisor.info")  # it has heard what came before
    (serve.folder / "go").touch()
    wait_for(lambda: list(held.instances()) == ["web:0"], "the slot to be gone")
    assert target(held.client, "web")["state"] == "running"


def test_settings_that_a_stop_preempts_leave_the_others_running_as_before(held: Held, serve: Serve) -> None:
    before = held.start(settings())
    serve.write(settings("umask = '077'\n"))
    applying = held.ask("config.apply")
    wait_for(lambda: held.stopping() == ["web:0", "web:1"], "both to be stopped")
    held.preempt("web:0")
    assert applying.result()["failed"]["web"]["code"] == "request.cancelled"
    held.runs_anew("web:1", before["web:1"])
    assert held.client.call("config.plan")["restarted"] == {"web": ["umask"]}


def test_processes_that_are_to_be_replaced_after_a_crash(held: Held, serve: Serve) -> None:
    text = settings('[supervisor]\norphans = "kill"\n')
    before = held.start(text)
    held.client.close()
    serve.kill()
    held.client = serve.start(text)
    wait_for(lambda: held.stopping() == ["web:0", "web:1"], "both to be stopped")
    held.preempt("web:0")
    held.runs_anew("web:1", before["web:1"])


def test_a_rolling_restart_that_fails_while_one_is_being_stopped(held: Held, serve: Serve) -> None:
    port = free_port()
    script = (
        f"{STUBBORN.partition('echo')[0]}[ -e broken ] && touch fallen && exit 1; "
        "touch $ASYNCSUP_INSTANCE; [ $ASYNCSUP_INSTANCE = web:1 ] || echo up; while true; do sleep 0.05; done"
    )
    held.client = serve.start(
        f'[socket.web]\nlisten = "tcp://127.0.0.1:{port}"\n[target.web]\nsockets = ["web"]\ninstances = 2\n'
        f'command = ["sh", "-c", "{script}"]\nready.log = "^up"\nstart_timeout = "1h"\nstop_timeout = "5m"\n'
    )
    held.client.call("wait", {"names": ["web:0"], "for": "ready", "timeout": 60})
    wait_for((serve.folder / "web:1").exists, "the other one to be there, which never becomes ready")
    before = {name: each["pid"] for name, each in held.instances().items()}
    (serve.folder / "broken").touch()
    restarting = held.ask("restart", names=["web"], rolling=True)
    wait_for((serve.folder / "fallen").exists, "the successor of the one that is ready to fall")
    wait_for(lambda: not target(held.client, "web")["others"], "it to be given up")
    assert held.stopping() == ["web:1"]
    (serve.folder / "broken").unlink()
    (serve.folder / "go").touch()
    restarting.error("target.start_failed")
    held.runs_anew("web:1", before["web:1"])
    assert held.instances()["web:0"]["pid"] == before["web:0"]


def test_processes_that_start_anew_after_a_patch_was_cut_short(held: Held, serve: Serve) -> None:
    old = "echo up; while true; do sleep 0.05; done\n"
    new = (
        f"cd {serve.folder}; {STUBBORN.partition('echo')[0]} touch $ASYNCSUP_INSTANCE; "
        f"[ $ASYNCSUP_INSTANCE = web:1 ] || {old}sleep 3600\n"
    )
    for folder, text in (("app", old), ("old", old), ("new", new)):
        (serve.folder / folder).mkdir()
        (serve.folder / folder / "run.sh").write_text(text)
    package = serve.folder / "patch.zip"
    build_patch(
        old=serve.folder / "old", new=serve.folder / "new", output=package, name="web", version="2", build=1,
        kind=Kind.COLD, targets=["web"], regions=["local"],
    )  # fmt: skip
    held.start(
        '[patch]\ntrust = "none"\n[target.web]\nroot = "app"\ninstances = 2\nready.log = "^up"\n'
        f'command = ["sh", "{serve.folder}/app/run.sh"]\nstart_timeout = "1h"\nstop_timeout = "5m"\n'
    )
    started = held.client.call("supervisor.info")["started"]
    held.ask("patch.apply", path=str(package))
    for name in ("web:0", "web:1"):
        wait_for((serve.folder / name).exists, f"{name} on the new files")
    on_new_files = {name: each["pid"] for name, each in held.instances().items()}
    serve.kill_supervisor()
    held.client.close()
    held.client = serve.connect_to_next(started)
    wait_for(lambda: held.stopping() == ["web:0", "web:1"], "both to be stopped")
    held.preempt("web:0")
    held.runs_anew("web:1", on_new_files["web:1"])
    held.client.call("wait", {"names": ["web:1"], "for": "ready", "timeout": 60})
