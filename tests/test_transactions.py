"""One patch over three targets, each with two processes: whichever of the six does not go along, and however,
none of them does; and patches, stops and restarts that want the same targets at the same time.

All of it happens to the same supervisor and the same six processes, so each test also finds that the one
before it has left everything as it was.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import zmq
from conftest import Asked, Serve, wait_for
from test_patching import Field

from asyncsup.errors import AsyncsupError
from asyncsup.patch.manifest import Kind

pytestmark = pytest.mark.timeout(300)

NAMES: Final = ("a", "b", "c")
Picture = dict[str, Any]


class Scene(Field):
    """Three targets with two processes each, and patches of ever higher builds for them.

    Args:
        light: with a program that costs little to start, but cannot be asked before a patch.
    """

    def __init__(self, serve: Serve, *, light: bool) -> None:
        super().__init__(serve)
        self._builds = itertools.count(300)
        self.old = "one a.txt=old-a b.txt=old-b" if light else "one build=200 a.txt=old-a b.txt=old-b"
        each = {
            "a": 'layout = "overlay"\n',
            "b": 'patch = { ack_timeout = "8s" }\n',
            "c": 'patch = { ack_timeout = "8s", wait_max = "300ms" }\nlayout = "overlay"\n',
        }
        if light:
            self.program = self.program.with_name("light.py")
            self.python = [sys.executable, "-S", "-E"]
            each = {
                name: f'{more}protocol = "notify"\nreload_signal = "HUP"\n' for name, more in each.items()
            }
            each["c"] += 'start_timeout = "8s"\n'
        self.start(*NAMES, each=each, start_timeout="60s", defaults="instances = 2", patch="keep = 20\n")

    last: Path
    """The package made last."""

    def make(self, *names: str, kind: Kind = Kind.WARM, **more: Any) -> Path:
        self.last = self.package(*(names or NAMES), build=next(self._builds), kind=kind, **more)
        return self.last

    def ask(self, method: str, **params: Any) -> Asked:
        return Asked(self.serve.endpoint, method, **params)

    def patch(self, package: Path, **params: Any) -> Asked:
        return self.ask("patch.apply", path=str(package), **params)

    # --- what is seen ---------------------------------------------------------------------------------------

    def now(self, *names: str) -> Picture:
        """Files and processes, by target."""
        chosen = names or NAMES
        return dict(zip(chosen, self.picture(*chosen), strict=True))

    def say(self, name: str) -> list[str]:
        """What the instances of a target say."""
        return [instance["status_text"] for instance in self.target(name)["instances"]]

    def all_say(self, text: str, *names: str) -> None:
        def do(name: str) -> bool:
            return all(text in said for said in self.say(name))

        for name in names or NAMES:
            wait_for(partial(do, name), f"{name} to say {text!r}, not {self.say(name)}")

    def events(self) -> list[Any]:
        return list(self.client.call("events.since", seq=self.began)["events"])

    def said_since(self, instance: str) -> list[str]:
        """What an instance has said since the test began."""
        return [
            e["text"] for e in self.events() if e["type"] == "instance.status" and e["instance"] == instance
        ]

    def step(self, name: str, instance: str | None = None) -> Any:
        """Wait until a step of the only patch has been taken."""

        def taken() -> Any:
            return next(
                (
                    event
                    for event in self.events()
                    if event.get("step") == name and instance in {None, event.get("instance")}
                ),
                None,
            )

        return wait_for(taken, f"the step {name!r}")

    def asked_to_wait(self, name: str) -> Any:
        return self.step("wait", f"{name}:0")

    def wait_busy(self, name: str, what: str = "patch") -> None:
        wait_for(lambda: self.target(name)["busy"] == what, f"{name} to be busy with {what}")

    def queued(self, name: str) -> list[str]:
        return [waiting["operation"] for waiting in self.target(name)["waiting"]]

    def wait_queued(self, name: str, *operations: str) -> None:
        wait_for(lambda: self.queued(name) == list(operations), f"{operations} to be queued on {name}")

    # --- between the tests ----------------------------------------------------------------------------------

    def settle(self) -> None:
        """Everything as at the start: nothing under way, all up, on the old files."""
        for name in NAMES:
            self.behave(name)
        wait_for(lambda: operations(self) == 0, "everything to end")
        while patched := [name for name in NAMES if self.target(name)["build"] != 200]:
            self.client.call("patch.rollback", target=patched[0], only=True)
        self.client.call("start", names=list(NAMES))
        self.all_say(self.old)
        self.client.call("wait", {"names": ["all"], "for": "ready", "timeout": 60})
        self.began = self.client.call("status")["seq"]


@contextlib.contextmanager
def playing(*, light: bool) -> Iterator[Scene]:
    serve = Serve(Path(tempfile.mkdtemp(prefix="as-")))
    try:
        scene = Scene(serve, light=light)
        yield scene
        scene.client.close()
    finally:
        if serve.process is not None:
            serve.stop()
        shutil.rmtree(serve.folder)
    assert "Traceback" not in serve.errors()


@pytest.fixture(scope="module")
def asked_scene() -> Iterator[Scene]:
    with playing(light=False) as scene:
        yield scene


@pytest.fixture(scope="module")
def light_scene() -> Iterator[Scene]:
    with playing(light=True) as scene:
        yield scene


@pytest.fixture
def scene(asked_scene: Scene) -> Scene:
    """Of programs with the SDK."""
    asked_scene.settle()
    return asked_scene


@pytest.fixture
def light(light_scene: Scene) -> Scene:
    """Of programs without it, which are started quickly."""
    light_scene.settle()
    return light_scene


# --- the last of six does not go along ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("behaviour", "code", "kind"),
    [
        ("refuse", "patch.not_allowed", Kind.WARM),
        ("refuse", "patch.not_allowed", Kind.COLD),
        ("wait", "patch.still_waiting", Kind.WARM),
        ("never", "patch.no_answer", Kind.WARM),
        ("die", "patch.target_died", Kind.COLD),
    ],
)
def test_one_refusal_among_six_and_nobody_has_noticed_but_those_that_were_asked(
    scene: Scene, behaviour: str, code: str, kind: Kind
) -> None:
    scene.behave("c", prepare=behaviour, instance="c:1")
    before = scene.now()
    error = scene.refused(scene.make(kind=kind))
    assert (error.error_code, error.remote_exit_status) == (code, 22), error.message
    assert error.details["instance"] == "c:1"
    report = error.details["report"]
    assert report["verdict"] == "target_refused"
    prepared = {i["name"]: i["prepare"] for target in report["targets"] for i in target["instances"]}
    # Who is asked at the same time may not have answered by then; who has answered, is told that it is off.
    went_ahead = [name for name, answer in prepared.items() if answer == "go_ahead"]
    told = f"aborted {report['patch']}"
    wait_for(lambda: all(told in logged(scene, name) for name in went_ahead), "them to be told")
    if behaviour == "never":
        scene.client.call("restart", names=["c:1"])  # Its handler is stuck for good.
    scene.all_say(scene.old)
    after = scene.now()
    if behaviour in {"never", "die"}:
        before, after = without_process(before, "c"), without_process(after, "c")
    assert after == before
    for name in ("a:0", "a:1", "b:0", "b:1", "c:0"):
        assert scene.said_since(name) == []


def logged(scene: Scene, instance: str) -> str:
    chunks = scene.client.call("logs", name=instance)["chunks"]
    return "".join(chunk["text"] for chunk in chunks)


def without_process(picture: Picture, name: str) -> Picture:
    """A target whose second process was replaced."""
    files, build, instances = picture[name]
    return {**picture, name: (files, build, instances[:1])}


@pytest.mark.parametrize("how", ["fail", "die", "regret", "killed in probation"])
def test_one_of_six_does_not_take_a_warm_patch_up_and_the_others_are_told_to_go_back(
    scene: Scene, how: str
) -> None:
    if how == "regret":
        scene.behave("c", reload=how)
    elif not how.startswith("killed"):
        scene.behave("c", reload=how, instance="c:1")
    before = scene.now()
    package = scene.make(probation=60.0)
    patch = scene.patch(package)
    if how.startswith("killed"):
        scene.all_say("a.txt=new-a")
        os.kill(scene.target("c")["instances"][1]["pid"], signal.SIGKILL)
    error = patch.error("patch.rolled_back")
    assert error.remote_exit_status == 23
    scene.all_say(scene.old)
    after = scene.now()
    if how in {"die", "killed in probation"}:
        assert after["c"][2][1] != before["c"][2][1]
        before, after = without_process(before, "c"), without_process(after, "c")
    assert after == before
    # Whoever had moved on was told; nobody was told of the old files only.
    for name in ("a:0", "a:1", "b:0", "b:1", "c:0"):
        said = [text.split()[1] for text in scene.said_since(name)]
        assert said in ([], ["build=200"], [f"build={error.details['report']['build']}", "build=200"]), said
        if how in {"regret", "killed in probation"}:
            assert len(said) == 2
    assert scene.refused(package).error_code == "gate.held"


@pytest.mark.parametrize("how", ["die", "mute", "late-die"])
def test_one_of_six_does_not_come_up_after_a_cold_patch_and_all_are_started_again_on_the_old_files(
    light: Scene, how: str
) -> None:
    light.behave("c", start=how, version="two", instance="c:1")
    before = light.now()
    error = light.refused(light.make(kind=Kind.COLD, probation=60.0 if how == "late-die" else 0.0))
    assert (error.error_code, error.remote_exit_status) == ("patch.rolled_back", 23), error.message
    assert "c:1" in error.message
    assert (how == "mute") == ("not ready within 8 s" in error.message)
    light.all_say(light.old)
    after = light.now()
    for name in NAMES:
        assert after[name][:2] == before[name][:2]
        pids = {pid for picture in (before, after) for pid, *_ in picture[name][2]}
        assert len(pids) == 4, "each was started again, once"
    assert {i["state"] for name in NAMES for i in light.target(name)["instances"]} == {"running"}


# --- waiting ------------------------------------------------------------------------------------------------


def test_a_wait_of_one_holds_all_and_changes_nothing_until_it_says_go(scene: Scene) -> None:
    scene.behave("a", prepare="wait", instance="a:0")
    before = scene.now()
    patch = scene.patch(scene.make())
    scene.asked_to_wait("a")
    wait_for(
        lambda: len([e for e in scene.events() if e.get("step") == "wait"]) > 2, "it to be asked repeatedly"
    )
    assert scene.now() == before
    assert {scene.target(name)["busy"] for name in NAMES} == {"patch"}
    scene.behave("a")
    assert patch.result()["verdict"] == "committed"
    scene.all_say("a.txt=new-a")
    asked = [e["instance"] for e in scene.events() if e.get("step") == "prepare"]
    assert sorted(asked) == ["a:0", "a:1", "b:0", "b:1", "c:0", "c:1"], "who has said go is not asked again"


# --- taking back --------------------------------------------------------------------------------------------


def in_preparation(scene: Scene) -> Asked:
    scene.behave("a", prepare="never", instance="a:1")
    patch = scene.patch(scene.make())
    scene.step("prepare", "c:1")
    return patch


def in_a_wait(scene: Scene) -> Asked:
    scene.behave("a", prepare="wait", instance="a:1")
    patch = scene.patch(scene.make())
    scene.step("wait", "a:1")
    return patch


def while_reloading(scene: Scene) -> Asked:
    scene.behave("b", reload="never", instance="b:1")
    patch = scene.patch(scene.make())
    scene.all_say("a.txt=new-a", "a", "c")
    return patch


def in_probation(scene: Scene) -> Asked:
    patch = scene.patch(scene.make(probation=60.0))
    scene.all_say("a.txt=new-a")
    return patch


@pytest.mark.parametrize(
    "begin", [in_preparation, in_a_wait, while_reloading, in_probation], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("how", ["abort", "stop"])
def test_a_patch_is_ended_at_whatever_step_it_is_and_everything_put_back(
    scene: Scene, begin: Callable[[Scene], Asked], how: str
) -> None:
    """By `patch abort`; or by a stop of one target, which pre-empts it on all."""
    before = scene.now()
    patch = begin(scene)
    txn = next(event["txn"] for event in scene.events() if event.get("txn"))
    ended = scene.ask("patch.abort", id=str(txn)) if how == "abort" else scene.ask("stop", names=["c"])
    if begin is while_reloading:
        # Its handler is stuck for good, so it cannot take the old files up; and that is said.
        error = patch.error("patch.rollback_failed")
        assert "`asyncsup restart b:1` would" in error.message
        scene.client.call("restart", names=["b:1"])
    else:
        changed = begin is in_probation
        error = patch.error("patch.rolled_back" if changed else "request.cancelled")
    assert ("aborted by" if how == "abort" else "asked to stop c") in error.message
    ended.result()
    if begin is in_preparation:
        scene.client.call("restart", names=["a:1"])
    up = NAMES if how == "abort" else ("a", "b")
    scene.all_say(scene.old, *up)
    if how == "stop":
        assert scene.target("c")["state"] == "stopped"
    after = scene.now()
    for name in NAMES:
        assert after[name][:2] == before[name][:2]
    if begin in {in_a_wait, in_probation}:
        assert {name: after[name] for name in up} == {name: before[name] for name in up}
    # Nobody was to blame, so it may be tried again.
    if begin is in_probation:
        plan = scene.client.call("patch.plan", path=str(scene.last))
        assert plan["verdict"] == "apply"


@pytest.mark.parametrize("how", ["abort", "stop"])
def test_a_cold_patch_is_ended_while_one_of_six_is_starting(light: Scene, how: str) -> None:
    light.behave("a", start="mute", version="two", instance="a:1")
    before = light.now()
    patch = light.patch(light.make(kind=Kind.COLD))
    light.all_say("two a.txt=new-a")
    txn = next(event["txn"] for event in light.events() if event.get("txn"))
    ended = light.ask("patch.abort", id=str(txn)) if how == "abort" else light.ask("stop", names=["a"])
    assert patch.error("patch.rolled_back")
    ended.result()
    light.all_say(light.old, *(NAMES if how == "abort" else ("b", "c")))
    if how == "stop":
        assert [i["state"] for i in light.target("a")["instances"]] == ["stopped"] * 2
    after = light.now()
    for name in NAMES:
        assert after[name][:2] == before[name][:2]


def test_a_queued_patch_is_taken_back_by_its_client_and_the_one_before_it_goes_on(scene: Scene) -> None:
    scene.behave("b", prepare="wait")
    first = scene.patch(scene.make("b"))
    scene.asked_to_wait("b")
    with zmq.Context() as context, context.socket(zmq.DEALER) as client:
        client.connect(scene.serve.endpoint)
        params = {"path": str(scene.make("a", "b"))}
        client.send_json({"jsonrpc": "2.0", "id": 1, "method": "patch.apply", "params": params})
        scene.wait_queued("b", "patch")
        assert scene.target("a")["busy"] is None, "it has none of them before it has all"
        scene.wait_queued("a", "patch")
        client.send_json({"jsonrpc": "2.0", "id": 2, "method": "cancel", "params": {"id": 1}})
        scene.wait_queued("b")
    scene.wait_queued("a")
    scene.behave("b")
    assert first.result()["verdict"] == "committed"
    scene.all_say("new-a", "b")
    scene.all_say(scene.old, "a", "c")


# --- queues -------------------------------------------------------------------------------------------------


def test_patches_queue_on_one_target_and_run_side_by_side_on_two(scene: Scene) -> None:
    scene.behave("a", prepare="wait")
    first = scene.patch(scene.make("a"))
    scene.asked_to_wait("a")
    # Another target is patched from begin to end meanwhile.
    assert scene.apply(scene.make("b"))["verdict"] == "committed"
    scene.all_say("new-a", "b")
    # The same one waits for its turn, or says that it is busy.
    second = scene.patch(scene.make("a", files={"a.txt": "second"}, before={"a.txt": "new-a"}))
    scene.wait_queued("a", "patch")
    third = scene.patch(scene.make("a", files={"a.txt": "third"}, before={"a.txt": "second"}))
    scene.wait_queued("a", "patch", "patch")
    busy = scene.refused(scene.make("a", "c"), wait_busy=False)
    assert (busy.error_code, busy.remote_exit_status) == ("target.busy", 8)
    assert "a is busy: patch for" in busy.message
    assert scene.target("c")["busy"] is None
    assert not first.is_answered
    scene.behave("a")
    assert [each.result()["verdict"] for each in (first, second, third)] == ["committed"] * 3
    scene.all_say("a.txt=third", "a")
    reports = [each.result() for each in (first, second, third)]
    assert sorted(reports, key=lambda report: report["txn"]) == reports, "in the order in which they came"


def test_a_stop_ends_what_runs_and_what_is_queued_and_leaves_other_targets_alone(scene: Scene) -> None:
    scene.behave("a", prepare="wait")
    running = scene.patch(scene.make("a", "b"))
    scene.asked_to_wait("a")
    queued = scene.patch(scene.make("a", "c"))
    scene.wait_queued("a", "patch")
    behind = scene.patch(scene.make("b"))
    scene.wait_queued("b", "patch")
    scene.client.call("stop", names=["a"])
    for patch in (running, queued):
        assert "asked to stop a" in patch.error("request.cancelled").message
    assert scene.target("a")["state"] == "stopped"
    # What had to wait for the first patch on b alone comes now.
    assert behind.result()["verdict"] == "committed"
    scene.all_say("new-a", "b")
    scene.all_say(scene.old, "c")


@pytest.mark.parametrize("restarted", ["a", "b"])
def test_a_patch_of_two_of_which_one_is_being_restarted_and_one_patched(scene: Scene, restarted: str) -> None:
    """And more of the like behind it: each gets its turn, whichever comes free first."""
    other = "b" if restarted == "a" else "a"
    scene.behave(restarted, start="mute")
    restart = scene.ask("restart", names=[restarted])
    scene.wait_busy(restarted, "restart")
    scene.behave(other, prepare="wait")
    alone = scene.patch(scene.make(other))
    scene.asked_to_wait(other)
    both = scene.patch(scene.make("a", "b", before={"a.txt": "x"}, files={"both.txt": "x"}))
    wait_for(lambda: "patch" in scene.queued("a"), "the patch of both to wait for a")
    again = scene.ask("restart", names=[other])
    wait_for(lambda: "restart" in scene.queued(other), "the restart to be queued")
    scene.behave(other)
    assert alone.result()["verdict"] == "committed"
    assert not both.is_answered
    scene.behave(restarted)
    restart.result()
    again.result()
    assert both.result()["verdict"] == "committed"
    scene.all_say("a.txt=new-a", other)
    for name in ("a", "b"):
        assert scene.content(name)["both.txt"] == "x"


def test_patches_that_want_each_others_targets_crosswise_all_get_their_turn(scene: Scene) -> None:
    pairs = (("a", "b"), ("b", "c"), ("c", "a"), ("b", "a"), ("c", "b"), ("a", "c"), ("c", "b", "a"))
    scene.behave("b", prepare="wait")
    first = scene.patch(scene.make("b"))
    scene.asked_to_wait("b")
    packages = [
        scene.make(*pair, before={"a.txt": "x"}, files={f"{'-'.join(pair)}.txt": "x"}) for pair in pairs
    ]
    # Builds rise with the order in which they are sent, and they are sent one after the other.
    asked: list[Asked] = []

    def are_all_there() -> bool:
        """As operations of their targets (and of that of the first), or done, as some soon are."""
        done = sum(len(pair) for pair, patch in zip(pairs, asked, strict=False) if patch.is_answered)
        sent = sum(len(pair) for pair, _ in zip(pairs, asked, strict=False))
        return operations(scene) + done >= 1 + sent

    for package in packages:
        asked.append(scene.patch(package))
        wait_for(are_all_there, "it to be under way")
    restarts = [scene.ask("restart", names=[name]) for name in NAMES]
    scene.behave("b")
    assert first.result()["verdict"] == "committed"
    verdicts = [patch.answer() for patch in asked]
    for answer in verdicts:
        # One that was overtaken on a target it shares is too old by then: that is an answer, too.
        assert not isinstance(answer, AsyncsupError) or answer.error_code == "gate.build", answer
    assert not isinstance(verdicts[-1], AsyncsupError)
    for restart in restarts:
        restart.result()
    wait_for(lambda: operations(scene) == 0, "all to be free")


def operations(scene: Scene) -> int:
    """How many run or are queued, over all targets."""
    targets = scene.client.call("status")["targets"]
    return sum((target["busy"] is not None) + len(target["waiting"]) for target in targets)
