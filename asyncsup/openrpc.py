"""The control API in the words of OpenRPC (https://spec.open-rpc.org/, 1.3.2), for whoever makes clients.

`rpc.discover` answers with it, as OpenRPC has it; `asyncsup openrpc` prints it. A test holds every parameter
against what `control.py` really reads, and every result against what it really answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from asyncsup import __version__

Schema = Mapping[str, Any]

STRING: Final[Schema] = {"type": "string"}
STRINGS: Final[Schema] = {"type": "array", "items": STRING}
BOOLEAN: Final[Schema] = {"type": "boolean"}
NATURAL: Final[Schema] = {"type": "integer", "minimum": 0}
INTEGER: Final[Schema] = {"type": "integer"}
SECONDS: Final[Schema] = {"type": "number", "minimum": 0}
ARRAY: Final[Schema] = {"type": "array"}
OBJECT: Final[Schema] = {"type": "object"}


def _any_of(*values: str) -> Schema:
    return {"type": "string", "enum": list(values)}


def _object(**properties: Schema) -> Schema:
    """An object with these properties, and perhaps more."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def _array(**properties: Schema) -> Schema:
    return {"type": "array", "items": _object(**properties)}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _method(
    name: str, summary: str, result: Schema, /, *, optional: Sequence[str] = (), **params: Schema
) -> Schema:
    return {
        "name": name,
        "summary": summary,
        "paramStructure": "by-name",
        "params": [
            {"name": key, "required": key not in optional, "schema": schema} for key, schema in params.items()
        ],
        "result": {"name": "result", "schema": result},
    }


_INSTANCE: Final = _object(
    name=STRING, state=STRING, pid=_or_null(NATURAL), ready=BOOLEAN, uptime=_or_null(SECONDS),
    restarts=NATURAL, status_text=_or_null(STRING), sdk=BOOLEAN, build=_or_null(NATURAL),
    region=_or_null(STRING), cgroup=_or_null(STRING), lost_bytes=NATURAL,
)  # fmt: skip
_QUEUED: Final = _object(operation=STRING, asked_by=STRING, since=SECONDS)
_TARGET: Final = _object(
    name=STRING, state=STRING, ready=BOOLEAN, wanted=_any_of("up", "down"), build=_or_null(NATURAL),
    region=STRING, generation=_or_null(NATURAL), patch=_or_null(STRING), busy=_or_null(STRING),
    current=_or_null(_QUEUED), waiting={"type": "array", "items": _QUEUED},
    uncommitted=_or_null(NATURAL), undecided=_or_null(NATURAL),
    instances={"type": "array", "items": _INSTANCE}, others={"type": "array", "items": _INSTANCE},
)  # fmt: skip
_RESULTS: Final = _object(
    results=_array(
        target=STRING, ok=BOOLEAN, detail=STRING, state=STRING, took=SECONDS, instances=_or_null(ARRAY)
    )
)
_CHANGES: Final = _object(
    added=STRINGS, removed=STRINGS, restarted=OBJECT, in_place=OBJECT, immediate=STRINGS, postponed=STRINGS,
    warnings=STRINGS,
)  # fmt: skip
_CHUNKS: Final = _object(
    chunks=_array(
        instance=STRING, stream=STRING, text=STRING, prefix=STRING, cursor=OBJECT, left=NATURAL, size=NATURAL,
        gap=BOOLEAN,
    )
)  # fmt: skip
_REPORT: Final = _object(
    verdict=STRING, reason=_or_null(STRING), code=_or_null(STRING), txn=_or_null(NATURAL),
    patch=_or_null(STRING), gates=_array(name=STRING, ok=BOOLEAN), targets=ARRAY, steps=ARRAY,
)  # fmt: skip
_GATE: Final = _object(name=STRING, ok=BOOLEAN, detail=STRING, code=_or_null(STRING))
_PLAN: Final = _object(
    id=STRING, verdict=_any_of("apply", "already", "refused"), code=_or_null(STRING), reason=_or_null(STRING),
    exit_status=NATURAL, signed=_or_null(_GATE), contents=_or_null(_GATE), probation=SECONDS,
    commit=_any_of("auto", "manual"), rollback=_any_of("auto", "manual"),
    targets=_array(
        target=STRING, state=STRING, build=NATURAL, already=BOOLEAN, refused=_or_null(_GATE),
        waits_for=_array(operation=STRING, asked_by=STRING, since=SECONDS), uncommitted=_or_null(NATURAL),
        undecided=_or_null(NATURAL), gates={"type": "array", "items": _GATE}, files=ARRAY,
        instances=_array(name=STRING, pid=NATURAL, told_by=STRING, replaced=_or_null(STRING)),
    ),
    steps=_array(step=STRING, target=_or_null(STRING), instance=_or_null(STRING), detail=STRING),
)  # fmt: skip
_DRIFT: Final = _any_of("refuse", "keep", "overwrite")
_SHA256: Final[Schema] = {"type": "string", "pattern": "^[0-9a-fA-F]{64}$"}
_SOURCE: Final[Mapping[str, Schema]] = {
    "path": STRING, "upload": STRING, "name": STRING, "sha256": _SHA256, "crc32": STRING,
}  # fmt: skip
_WISH: Final[Mapping[str, Schema]] = {
    "target": STRING, "wait_busy": BOOLEAN, "retry_held": BOOLEAN, "trust_clock": BOOLEAN, "drift": _DRIFT,
}  # fmt: skip
_OPERATION: Final[Mapping[str, Schema]] = {"names": STRINGS, "wait": BOOLEAN, "timeout": SECONDS}

METHODS: Final[Sequence[Schema]] = (
    _method("rpc.discover", "This description.", OBJECT),
    _method(
        "supervisor.info",
        "What the supervisor is and how long it has been there.",
        _object(
            version=STRING,
            protocol=NATURAL,
            pid=NATURAL,
            keeper={"type": ["integer", "null"]},
            adopted=NATURAL,
            region=STRING,
            config=STRING,
            state_dir=STRING,
            runtime_dir=STRING,
            started=STRING,
            uptime=SECONDS,
            seq=NATURAL,
            trust=STRING,
            inbox=STRING,
            groups=OBJECT,
            stopping=BOOLEAN,
            tasks=NATURAL,
            isolation=_object(
                by=_any_of("cgroup", "process group"),
                cgroup=_or_null(STRING),
                controllers=STRINGS,
                why=_or_null(STRING),
            ),
            counters=OBJECT,
            events=STRING,
            caller=STRING,
        ),
    ),
    _method(
        "status",
        "Every target, or those named, as it is at event number `seq`.",
        _object(seq=NATURAL, targets={"type": "array", "items": _TARGET}),
        optional=["names", "usage"],
        names=STRINGS,
        usage=BOOLEAN,
    ),
    _method(
        "show",
        "Everything about one target.",
        {**_TARGET, "required": [*_TARGET["required"], "config", "log", "marks", "drift", "history"]},
        name=STRING,
    ),
    _method(
        "events.since",
        "Events after number `seq`, at most 2,000.",
        _object(events=_array(seq=NATURAL, at=STRING, type=STRING), oldest=NATURAL, seq=NATURAL),
        optional=["seq"],
        seq=NATURAL,
    ),
    *(
        _method(verb, summary, _RESULTS, optional=["wait", "timeout"], **_OPERATION)
        for verb, summary in (
            ("start", "Start targets."),
            ("stop", "Stop targets and everything they have started."),
            ("reload", "Have targets read their resources again."),
        )
    ),
    _method(
        "restart",
        "Stop and start targets; `rolling`: some at a time, each new one before the old one if need be.",
        _RESULTS,
        optional=["wait", "timeout", "rolling"],
        rolling=BOOLEAN,
        **_OPERATION,
    ),
    _method("config.plan", "What applying the configuration file as it is now would change.", _CHANGES),
    _method("config.apply", "Apply it.", _CHANGES, optional=["wait"], wait=BOOLEAN),
    _method(
        "scale",
        "Have so many instances of targets, or `by` so many more or fewer.",
        {
            "anyOf": [
                _object(target=STRING, instances=NATURAL),
                _object(results=_array(target=STRING, instances=NATURAL, ok=BOOLEAN, detail=STRING)),
            ]
        },
        optional=["name", "names", "instances", "by", "wait"],
        name=STRING,
        names=STRINGS,
        instances=NATURAL,
        by=INTEGER,
        wait=BOOLEAN,
    ),
    _method(
        "signal",
        "Send a signal to targets.",
        _object(sent=_array(instance=STRING, pid=NATURAL)),
        names=STRINGS,
        signal=STRING,
    ),
    _method(
        "wait",
        "Wait until targets are as asked.",
        _object(took=SECONDS),
        optional=["timeout"],
        names=STRINGS,
        **{"for": _any_of("ready", "running", "stopped")},
        timeout=SECONDS,
    ),
    _method(
        "logs",
        "The last lines of what targets have written, or those since a time.",
        _CHUNKS,
        optional=["stream", "lines", "since"],
        name=STRING,
        stream=_any_of("stdout", "stderr"),
        lines=NATURAL,
        since=SECONDS,
    ),
    _method(
        "logs.follow",
        "What was written behind the cursors; waits for it.",
        _CHUNKS,
        optional=["cursors", "timeout"],
        cursors=ARRAY,
        timeout=SECONDS,
    ),
    _method(
        "logs.reopen",
        "Open the log files anew, after somebody else has moved them away.",
        _object(paths=STRINGS),
        optional=["names"],
        names=STRINGS,
    ),
    _method("shutdown", "Stop all targets and the supervisor.", _object(stopping=NATURAL)),
    _method(
        "supervisor.reexec",
        "Replace the supervisor's program; everything that runs runs on.",
        _object(version=STRING, command=STRINGS),
        optional=["program"],
        program=STRING,
    ),
    _method(
        "cancel", "Give up a request of the same connection.", OBJECT, id={"type": ["integer", "string"]}
    ),
    _method(
        "patch.upload",
        "Send a package in pieces.",
        _object(upload=STRING, size=NATURAL, complete=BOOLEAN),
        optional=["upload", "offset", "last"],
        upload=STRING,
        offset=NATURAL,
        data=STRING,
        last=BOOLEAN,
    ),
    _method("patch.verify", "What a package holds.", OBJECT, optional=list(_SOURCE), **_SOURCE),
    _method(
        "patch.plan",
        "What applying a package would do.",
        _PLAN,
        optional=[*_SOURCE, *_WISH],
        **_SOURCE,
        **_WISH,
    ),
    _method("patch.apply", "Apply a package.", _REPORT, optional=[*_SOURCE, *_WISH], **_SOURCE, **_WISH),
    _method(
        "patch.rollback",
        "Go back to an earlier build.",
        _REPORT,
        optional=["to_build", "to_generation", "only", "together", "drift", "wait_busy"],
        target=STRING,
        to_build=NATURAL,
        to_generation=NATURAL,
        only=BOOLEAN,
        together=BOOLEAN,
        drift=_DRIFT,
        wait_busy=BOOLEAN,
    ),
    _method("patch.commit", "Commit a patch that waits for it.", _REPORT, id=STRING),
    _method("patch.abort", "End a patch that is under way.", _REPORT, id=STRING),
    _method(
        "patch.prune",
        "Remove old generations that nobody reads.",
        _object(pruned=OBJECT),
        optional=["target", "keep"],
        target=STRING,
        keep=NATURAL,
    ),
    _method(
        "target.release",
        "Make all files of a target ordinary ones.",
        _object(released=STRINGS),
        target=STRING,
    ),
    _method(
        "patch.drift",
        "Files that are not as patches have left them.",
        _object(targets=_array(target=STRING, policy=_DRIFT, files=ARRAY)),
        optional=["target", "names"],
        target=STRING,
        names=STRINGS,
    ),
    _method("patch.list", "What lies in the inbox.", _object(inbox=ARRAY)),
    _method(
        "patch.history",
        "The newest transactions, newest first.",
        _object(transactions=ARRAY),
        optional=["target", "limit"],
        target=STRING,
        limit=NATURAL,
    ),
    _method("patch.show", "One transaction, step by step.", _object(steps=ARRAY, files=ARRAY), id=STRING),
    _method(
        "audit.list",
        "Records of the audit.",
        _object(records=_array(seq=NATURAL, hash=STRING, line=STRING), head=_or_null(OBJECT)),
        optional=["after", "txn", "limit"],
        after=NATURAL,
        txn=NATURAL,
        limit=NATURAL,
    ),
    _method(
        "audit.verify",
        "Whether the audit is as it was written.",
        _object(ok=BOOLEAN, records=NATURAL, faults=ARRAY),
        optional=["heads"],
        heads={"type": "array", "items": _SHA256},
    ),
)


def openrpc() -> dict[str, Any]:
    """The whole document."""
    return {
        "openrpc": "1.3.2",
        "info": {
            "title": "asyncsup control API",
            "version": __version__,
            "description": "JSON-RPC 2.0 over ZeroMQ, one message in one frame; see docs/protocol.md.",
        },
        "methods": [dict(method) for method in METHODS],
    }
