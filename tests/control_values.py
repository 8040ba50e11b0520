"""Values of the control API as a supervisor answers them: what clients are tested with."""

from __future__ import annotations

from typing import Any

PATCH_ID = "3f9ac1d2e5b7" + "0" * 52


def instance(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "name": name, "state": "running", "pid": 4711, "ready": True, "uptime": 12.3, "in_state": 12.3,
        "restarts": 0, "status_text": None, "exit": None, "sdk": True, "build": 200, "region": "us-east-1",
        "detail": "", **changes,
    }  # fmt: skip


def target(name: str, *instances: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "name": name, "state": "running", "ready": True, "build": 200, "region": "us-east-1",
        "generation": 16, "patch": None, "wanted": "up", "busy": None, "current": None,
        "waiting": [],
        "instances": list(instances) or [instance(f"{name}:0")], **changes,
    }  # fmt: skip


def status(*targets: dict[str, Any]) -> dict[str, Any]:
    return {"seq": 7, "targets": list(targets)}


def gate(name: str, detail: str = "", code: str | None = None) -> dict[str, Any]:
    return {"name": name, "ok": code is None, "detail": detail, "code": code}


FILES = [
    {"path": "rest/res.json", "op": "new", "note": ""},
    {"path": "job.json", "op": "modified", "note": "adopted"},
    {"path": "libs/lib.txt", "op": "deleted", "note": "was not there"},
]


def report(verdict: str = "committed", **changes: Any) -> dict[str, Any]:
    """What a warm patch of one target with one instance came to."""
    committed = verdict == "committed"
    return {
        "txn": 12, "patch": PATCH_ID, "name": "pricing-rules", "version": "2.3.0", "build": 300,
        "kind": "warm", "action": "apply", "verdict": verdict, "code": None, "reason": None,
        "asked_by": "root (uid 0, pid 1)", "at": "2026-11-22T10:00:00.000Z", "took": 0.32, "trust": "digest",
        "targets": [{
            "target": "pricer", "state": "running", "layout": "overlay", "build_before": 200,
            "build_after": 300 if committed else 200, "generation": 17, "already": False,
            "gates": [gate("target", "named by the patch"), gate("region", "us-east-1")],
            "files": FILES, "pids_before": [4711], "pids_after": [4711],
            "instances": [{
                "name": "pricer:0", "told_by": "sdk", "prepare": "go_ahead", "prepare_took": 0.0012,
                "reload": "ok", "reload_took": 0.0034, "pid_before": 4711, "pid_after": 4711, "reason": None,
            }],
        }],
        "steps": [
            {"seq": 1, "at": "2026-11-22T10:00:00.100Z", "step": "stage", "target": "pricer",
             "instance": None, "detail": "3 files", "took": 0.02},
            {"seq": 2, "at": "2026-11-22T10:00:00.200Z", "step": "switch", "target": None, "instance": None,
             "detail": "", "took": 0.0003},
        ], **changes,
    }  # fmt: skip


def refused_report() -> dict[str, Any]:
    """Case 3 of the prototype: meant for another region."""
    value = report(
        "refused",
        txn=None,
        code="gate.region",
        reason="patch is for India, pricer runs in us-east-1",
        steps=[],
    )
    value["targets"][0] |= {
        "gates": [gate("region", "patch is for India, pricer runs in us-east-1", "gate.region")],
        "instances": [],
    }
    return value


PLAN: dict[str, Any] = {
    "id": PATCH_ID, "format": "asyncsup.patch/1", "name": "pricing-rules", "version": "2.3.0", "build": 300,
    "kind": "warm", "targets": [{
        "target": "pricer", "state": "running", "build": 200, "already": False, "refused": None,
        "waits_for": [], "uncommitted": None, "undecided": None,
        "gates": [gate("region", "us-east-1")], "files": FILES,
        "instances": [{"name": "pricer:0", "pid": 4711, "told_by": "sdk", "replaced": None}],
    }],
    "contents": {"name": "contents", "ok": True, "detail": "2 files with the content", "code": None},
    "steps": [
        {"step": "stage", "target": "pricer", "instance": None, "detail": "3 files for build 300"},
        {"step": "reload", "target": "pricer", "instance": "pricer:0", "detail": "by sdk"},
        {"step": "probation", "target": None, "instance": None, "detail": "2 s"},
        {"step": "commit", "target": None, "instance": None, "detail": ""},
    ],
    "probation": 2.0, "commit": "auto", "rollback": "auto",
    "verdict": "apply", "code": None, "reason": None, "exit_status": 0,
}  # fmt: skip

INBOX = {
    "inbox": [
        {"file": "b.zip", "size": 2000, "state": "complete", "id": PATCH_ID, "format": "prototype",
         "name": "prototype", "version": "300", "build": 300, "kind": "warm", "targets": [],
         "regions": ["us-east-1"]},
        {"file": "a.zip", "size": 5_000_000, "state": "incomplete"},
        {"file": "bad.zip", "size": 10, "state": "malformed", "detail": "no end record",
         "code": "zip.no_end"},
        {"file": "c.zip", "size": 812, "state": "complete", "id": "9" * 64, "format": "asyncsup.patch/1",
         "name": "rules", "version": "2", "build": 250, "kind": "cold", "targets": ["pricer", "web"],
         "regions": ["us-east-1", "India"]},
    ],
    "folder": "/srv/inbox", "trust": "digest",
}  # fmt: skip

HISTORY = {
    "transactions": [
        {"txn": 12, "action": "apply", "patch": PATCH_ID, "name": "pricing-rules", "version": "2.3.0",
         "build": 300, "kind": "warm", "targets": ["pricer"], "state": "committed", "verdict": "committed",
         "started": "2026-11-22T10:00:00.000Z", "took": 0.32, "asked_by": "root (uid 0, pid 1)",
         "error": None},
        {"txn": 11, "action": "apply", "patch": "9" * 64, "name": "rules", "version": "2", "build": 250,
         "kind": "cold", "targets": ["pricer"], "state": "rolled_back", "verdict": "rolled_back",
         "started": "2026-11-22T09:00:00.000Z", "took": 3.2, "asked_by": "inbox (auto)",
         "error": "pricer:0 did not become ready"},
    ]
}  # fmt: skip
