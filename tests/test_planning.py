"""A plan says what an apply would answer at this moment, and in which order it would go about it."""

from __future__ import annotations

import threading
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.to_thread
import pytest
from test_patching import Field

from asyncsup.errors import RemoteError
from asyncsup.patch.examination import Examination
from asyncsup.patch.manifest import Kind

HOOKS = 'hooks = { pre_patch = "true", post_patch = "true", timeout = "40s" }'


def phases(steps: list[dict[str, Any]]) -> list[list[tuple[str, str, str]]]:
    """Steps in their order; those that are taken at once have none among themselves, and the canary of one
    target is replaced while others start."""

    def phase(step: dict[str, Any]) -> str:
        return str(step["step"]).replace("canary", "start")

    return [
        sorted((step["step"], step["target"] or "", step["instance"] or "") for step in group)
        for _, group in groupby(steps, key=phase)
    ]


def detail(plan: dict[str, Any], name: str, target: str | None = None) -> str:
    (found,) = {s["detail"] for s in plan["steps"] if s["step"] == name and s["target"] in {target, None}}
    return str(found)


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize(
    "settings",
    [
        "",
        "patch = { max_parallel = 1 }",
        "overlap = true\npatch = { canary = 1, max_parallel = 1 }",
    ],
    ids=["stopped first", "in turn", "beside, a canary first"],
)
def test_the_steps_are_those_that_are_taken(field: Field, settings: str, kind: Kind) -> None:
    field.start("a", "b", defaults="instances = 2", each={"a": settings, "b": HOOKS})
    package = field.package("a", "b", kind=kind, probation=0.25)
    plan = field.client.call("patch.plan", path=str(package))
    report = field.apply(package)
    assert phases(plan["steps"]) == phases(report["steps"])
    assert (plan["probation"], plan["commit"], plan["rollback"]) == (0.25, "auto", "auto")
    assert detail(plan, "probation") == detail(report, "probation") == "0.25 s"
    assert detail(plan, "stage", "a") == detail(report, "stage", "a")
    assert detail(plan, "pre_patch", "b") == "true, within 40 s; if it fails, nothing is changed"
    replaced = {each["name"]: each["replaced"] for target in plan["targets"] for each in target["instances"]}
    if kind is Kind.WARM:
        assert set(replaced.values()) == {None}
        return
    how = "stopped_first" if not settings else "beside" if "overlap" in settings else "in_turn"
    assert replaced == {"a:0": how, "a:1": how, "b:0": "stopped_first", "b:1": "stopped_first"}
    assert detail(plan, "stop", "b") == "b:0, b:1; started again after the switch"
    assert (
        detail(plan, "start", "a")
        == {
            "stopped_first": "a:0, a:1",
            "in_turn": "a:0, a:1, each stopped and started again, 1 at a time",
            "beside": "a:0, a:1, each beside the process it replaces, which stays until the commit, "
            "1 at a time",
        }[how]
    )
    if how == "beside":
        assert detail(plan, "canary", "a") == "a:0 for 0.25 s, before the others follow"


def test_it_says_what_it_would_wait_for(field: Field) -> None:
    field.start("web", patch='commit = "manual"\nrollback = "manual"')
    first = field.package("web")
    plan = field.client.call("patch.plan", path=str(first))
    assert (plan["commit"], plan["rollback"]) == ("manual", "manual")
    assert [step["step"] for step in plan["steps"]][-2:] == ["await commit", "commit"]
    report = field.apply(first)
    assert report["verdict"] == "uncommitted"

    package = field.package("web", build=400, before={"a.txt": "new-a", "b.txt": "new-b"})
    plan = field.client.call("patch.plan", path=str(package), drift="overwrite")
    (target,) = plan["targets"]
    assert (target["uncommitted"], target["undecided"]) == (report["txn"], None)
    (waits,) = target["waits_for"]
    assert (waits["operation"], waits["asked_by"]) == ("patch", report["asked_by"])
    assert plan["verdict"] == "apply"
    # Whoever does not want to wait is told what it would be told.
    plan = field.client.call("patch.plan", path=str(package), wait_busy=False)
    with pytest.raises(RemoteError) as caught:
        field.apply(package, wait_busy=False)
    assert (plan["verdict"], plan["code"], plan["exit_status"]) == ("refused", "target.busy", 8)
    assert (caught.value.error_code, caught.value.remote_exit_status) == ("target.busy", 8)
    field.client.call("patch.commit", id=str(report["txn"]))


def test_it_says_that_somebody_has_to_decide_first(field: Field) -> None:
    field.start("web", "other", patch='rollback = "manual"')
    field.behave("web", reload="fail")
    failed = field.refused(field.package("web"))
    assert failed.error_code == "patch.undecided"
    txn = failed.details["report"]["txn"]
    package = field.package("other", "web", build=400)
    plan = field.client.call("patch.plan", path=str(package), drift="overwrite")
    with pytest.raises(RemoteError) as caught:
        field.apply(package, drift="overwrite")
    assert (plan["verdict"], plan["code"], plan["exit_status"]) == ("refused", "target.busy", 8)
    assert (plan["code"], plan["reason"]) == (caught.value.error_code, caught.value.message)
    undecided = {target["target"]: target["undecided"] for target in plan["targets"]}
    assert undecided == {"web": txn, "other": None}
    field.client.call("patch.abort", id=str(txn))
    assert field.client.call("patch.plan", path=str(package), drift="overwrite")["verdict"] == "apply"


@pytest.mark.anyio
async def test_whoever_gives_up_a_plan_does_not_wait_until_all_has_been_unpacked() -> None:
    unpacking, ended = threading.Event(), threading.Event()

    def rehearse(target: str, package: Any, policy: Any, done: set[str], progress: Any) -> None:
        unpacking.set()
        try:
            # Without end, were it not for `progress`.
            while not ended.wait(0.001):
                progress(1)
        finally:
            ended.set()

    store: Any = SimpleNamespace(preview=SimpleNamespace(rehearse=rehearse))
    wish: Any = SimpleNamespace(policy_for=lambda target: "refuse")
    part: Any = SimpleNamespace(target=SimpleNamespace(name="web"), package=object())
    clock: Any = None
    try:
        with anyio.fail_after(60):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(Examination(store, clock).rehearse, [part], wish)
                await anyio.to_thread.run_sync(unpacking.wait)
                tasks.cancel_scope.cancel()
    finally:
        ended.set()
