"""What must be known of instances and patches when the supervisor that had them is gone. Pure.

Times are those of CLOCK_MONOTONIC, which goes on counting whatever becomes of a process; they mean nothing
after a reboot, and neither does the record.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

import msgspec

from asyncsup.lifecycle import State

Role = Literal["current", "successor", "standby", "retiring"]
"""What a process is in its slot: the one that counts; about to replace that one; replaced, but ready to take
its place again; on its way out."""


class ProcessRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A process, and how to know it again.

    Attributes:
        token: the secret in its environment.
        pid: None when it was about to be spawned: there may be a process nobody has written down.
        start_ticks: when the kernel started it, in clock ticks since the boot. With ``pid`` None: it cannot
            be older than this.
        inode: that of its pidfd, which no other process has before the next boot; 0 on kernels before 6.9.
        hello: what it last said of itself over the SDK.
        ended: how it ended, when that was seen and has not been acted upon.
        hook: it is the `pre_start` hook, before the program.
        generation: of the resources it was started on, or has taken up since.
        output_from: inode of the log file and offset at which its output begins, where it is read for a line
            that says the program is ready.
        cgroup: the folder of its control group; None if it has none.
        oom_kills: how many processes the kernel had killed for memory in that group before.
        groups: its process groups, where it does not lead its only one: another process was spawned, and has
            named this one as the main one.
        watchdog_timeout: what it has said to replace the configured one; 0 for none.
    """

    token: str
    pid: int | None = None
    start_ticks: int = 0
    inode: int = 0
    spawned: float = 0.0
    ready_at: float | None = None
    hello: Mapping[str, Any] | None = None
    ended: Mapping[str, int | None] | None = None
    hook: bool = False
    output_from: tuple[int, int] | None = None
    cgroup: str | None = None
    oom_kills: int = 0
    groups: tuple[int, ...] = ()
    watchdog_timeout: float | None = None
    generation: int | None = None


class InstanceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A slot, and a process in it.

    Attributes:
        seat: tells it from others in the same slot; 0 while there are none.
        wanted: it is to be up, also if it is down at this moment for a patch or a restart.
        due: when its timer (start, stop or back-off) ends.
        doomed: why the supervisor itself was ending the process.
        leaving: it has said that it is stopping, and nobody had asked it to.
        said_error: the error it has said to end for.
        early_ends, recent_restarts: what the restart policy remembers.
    """

    state: State
    since: float
    wanted: bool
    detail: str = ""
    status_text: str = ""
    failure: str | None = None
    restarts: int = 0
    due: float | None = None
    doomed: str | None = None
    leaving: bool = False
    said_error: str = ""
    early_ends: int = 0
    recent_restarts: tuple[float, ...] = ()
    last_exit: Mapping[str, Any] | None = None
    process: ProcessRecord | None = None
    seat: int = 0
    role: Role = "current"

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read a record back, also one of a somewhat older or newer asyncsup: what is unknown is left out.

        Raises:
            ValueError, TypeError: it is none.
        """
        known = _known(cls, value)
        process = value.get("process")
        if process is not None:
            values = _known(ProcessRecord, process)
            if values.get("output_from") is not None:
                inode, offset = values["output_from"]
                values["output_from"] = (int(inode), int(offset))
            values["groups"] = tuple(map(int, values.get("groups", ())))
            known["process"] = ProcessRecord(**values)
        known["state"] = State(value["state"])
        known["recent_restarts"] = tuple(value.get("recent_restarts", ()))
        return cls(**known)


class PartRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One target's part in a patch; ``instances`` are those concerned."""

    target: str
    build_before: int
    build_after: int
    changed: tuple[str, ...]
    instances: tuple[str, ...]


class PatchRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A patch or rollback under way, as far as the store does not know of it.

    Attributes:
        by: who asked for it (`Actor`).
        file: the package's name in the inbox, where it is to be moved away in the end.
        inbox_file: what lay there under that name (`intake.identity_of`); None if that is not known.
        switched: the files may be those of the patch, and whoever has taken them up must be told if they are
            taken back.
        standing: instances and their pids that have taken it up and must not fall; None before that, and from
            the moment on in which it is undone.
        probation_until: as `InstanceRecord.due`.
    """

    txn: int
    action: str
    kind: str
    patch: str
    by: Mapping[str, Any]
    file: str | None
    inbox_file: tuple[int, ...] | None = None
    manual_commit: bool
    manual_rollback: bool
    parts: tuple[PartRecord, ...]
    switched: bool = False
    standing: tuple[tuple[str, int], ...] | None = None
    probation_until: float = 0.0

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """As `InstanceRecord.from_json`."""
        known = _known(cls, value)
        known["parts"] = tuple(
            PartRecord(
                **{
                    **_known(PartRecord, part),
                    "changed": tuple(part["changed"]),
                    "instances": tuple(part["instances"]),
                }
            )
            for part in value["parts"]
        )
        if value.get("inbox_file") is not None:
            known["inbox_file"] = tuple(map(int, value["inbox_file"]))
        if value.get("standing") is not None:
            known["standing"] = tuple((str(name), int(pid)) for name, pid in value["standing"])
        return cls(**known)


def _known(kind: type[msgspec.Struct], value: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"not an object: {value!r:.80}")
    return {name: value[name] for name in kind.__struct_fields__ if name in value}
