"""The end of `serve`: whatever else was going on, nothing is started any more, and nothing is left behind."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from conftest import Asked, Serve, targets_in, wait_for
from test_supervisor import instance, reached


class Scene:
    """Programs that take their time to end: until they are let go."""

    def __init__(self, serve: Serve) -> None:
        self.serve = serve

    def file(self, name: str, what: str) -> Path:
        return self.serve.folder / f"{name}.{what}"

    def program(self, name: str, more: str = "") -> str:
        """Its part of the configuration."""
        waits = f"while [ ! -e {self.file(name, 'let-go')} ]; do sleep 0.05; done"
        told = f"echo >> {self.file(name, 'told')}; {waits}; exit"
        began = f"echo >> {self.file(name, 'started')}; echo up"
        script = f"trap '{told}' TERM; {began}; while :; do sleep 0.05; done"
        return (
            f"[target.{name}]\ncommand = ['sh', '-c', {json.dumps(script)}]\nready.log = '^up$'\n"
            f"stop_timeout = '2m'\n{more}\n"
        )

    def started(self, name: str) -> int:
        return self._lines(name, "started")

    def told(self, name: str) -> int:
        """How often it was told to end."""
        return self._lines(name, "told")

    def _lines(self, name: str, what: str) -> int:
        path = self.file(name, what)
        return path.read_text().count("\n") if path.exists() else 0

    def let_go(self, *names: str) -> None:
        for name in names:
            self.file(name, "let-go").touch()

    def ready(self) -> None:
        with self.serve.connect() as client:
            client.call("wait", {"names": ["all"], "for": "ready", "timeout": 60})

    def signal(self, number: int) -> None:
        assert self.serve.process is not None
        self.serve.process.send_signal(number)

    def term(self) -> None:
        self.signal(signal.SIGTERM)
        wait_for(lambda: "stopping (SIGTERM)" in self.serve.errors(), "the supervisor to hear of it")

    def end(self) -> None:
        """Wait for the end of `serve`. There must be nobody left."""
        assert self.serve.process is not None
        assert self.serve.process.wait(100) == 0
        # A moment passes between SIGKILL and the end of the last of a group.
        wait_for(lambda: not targets_in(self.serve.folder), "the end of everybody", timeout=30)


def test_a_target_that_a_new_configuration_adds_meanwhile_is_not_started(scene: Scene) -> None:
    other = scene.program("other")
    scene.serve.begin(scene.program("old") + other)
    scene.ready()
    scene.serve.write(scene.program("new") + other)
    scene.signal(signal.SIGHUP)
    wait_for(lambda: scene.told("old"), "the removal of old")
    scene.term()
    wait_for(lambda: scene.told("other"), "the stop of other")
    scene.let_go("old")
    ends = ("SIGHUP: ", "taken up for SIGHUP")
    wait_for(lambda: any(word in scene.serve.errors() for word in ends), "the end of the change")
    scene.let_go("new", "other")
    scene.end()
    assert scene.started("new") == 0
    assert "Traceback" not in scene.serve.errors()


def test_a_target_that_a_new_configuration_removes_meanwhile_keeps_nobody_waiting(scene: Scene) -> None:
    scene.serve.begin(scene.program("db") + scene.program("web", "depends_on = ['db']"))
    scene.ready()
    scene.serve.write(scene.program("web"))
    scene.signal(signal.SIGHUP)
    wait_for(lambda: scene.told("db"), "the removal of db")
    scene.term()
    wait_for(lambda: scene.told("web"), "the stop of web")
    scene.let_go("db")
    ends = ("SIGHUP: ", "taken up for SIGHUP")
    wait_for(lambda: any(word in scene.serve.errors() for word in ends), "the end of the change")
    scene.let_go("web")
    scene.end()
    assert "Traceback" not in scene.serve.errors()


def test_a_target_that_the_supervisor_before_was_restarting_is_not_started(scene: Scene) -> None:
    scene.serve.begin(scene.program("slow") + scene.program("other"))
    scene.ready()
    with scene.serve.connect() as client:
        started = client.call("supervisor.info")["started"]
    Asked(scene.serve.endpoint, "restart", names=["slow"])
    wait_for(lambda: scene.told("slow"), "the restart to begin")
    scene.serve.kill_supervisor()
    with scene.serve.connect_to_next(started) as client:
        assert instance(client, "slow")["state"] == "stopping"
        scene.term()
        wait_for(lambda: scene.told("other"), "the stop of other")
        scene.let_go("slow")
        reached(client, "slow", "stopped")
        scene.let_go("other")
        scene.end()
    assert scene.started("slow") == 1


def test_what_is_configured_no_more_since_a_crash_does_not_outlive_the_end(scene: Scene) -> None:
    other = scene.program("other")
    scene.serve.begin(scene.program("old") + other)
    scene.ready()
    scene.serve.kill()
    scene.serve.begin(other)
    scene.ready()
    wait_for(lambda: scene.told("old"), "old to be ended")
    scene.term()
    scene.let_go("other")
    scene.end()


@pytest.mark.parametrize("rolling", [False, True])
def test_a_target_that_is_being_restarted_is_stopped_once(scene: Scene, rolling: bool) -> None:
    scene.serve.begin(scene.program("slow"))
    scene.ready()
    restarting = Asked(scene.serve.endpoint, "restart", names=["slow"], rolling=rolling)
    wait_for(lambda: scene.told("slow"), "the restart to begin")
    scene.term()
    restarting.error("request.cancelled")
    scene.let_go("slow")
    scene.end()
    assert (scene.started("slow"), scene.told("slow")) == (1, 1)


def test_what_asks_for_a_target_that_is_stopped_already_is_refused(scene: Scene) -> None:
    web = scene.program("web", "depends_on = ['db']")
    scene.serve.begin(scene.program("db") + web)
    scene.ready()
    with scene.serve.connect() as client:
        scene.term()
        wait_for(lambda: scene.told("web"), "the stop of web")
        asked = [
            Asked(scene.serve.endpoint, "reload", names=["web"]),
            Asked(scene.serve.endpoint, "restart", names=["web"]),
            Asked(scene.serve.endpoint, "start", names=["web"]),
            Asked(scene.serve.endpoint, "scale", name="web", instances=2),
        ]
        for each in asked:
            each.error("supervisor.shutting_down")
        scene.let_go("web")
        reached(client, "web", "stopped")
        wait_for(lambda: scene.told("db"), "the stop of db")
        Asked(scene.serve.endpoint, "reload", names=["web"]).error("supervisor.shutting_down")
        scene.let_go("db")
        scene.end()
    assert (scene.started("web"), scene.started("db")) == (1, 1)
