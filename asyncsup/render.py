"""Values of the control API as text for people. Pure: a value in, a list of lines out.

Nothing here knows whether it writes to a terminal: the caller says whether colour is wanted (`Ink`) and how
wide a line may be (``width``, None when piped: then nothing is cut). Every text that comes from a target, a
patch or the wire goes through `clean`, so that a status text cannot move the cursor, recolour the screen or
hide a line.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, tzinfo
from typing import Any, Final

from asyncsup.printable import printable

Value = Mapping[str, Any]
"""One object of the control API, as its JSON says it."""

Cell = tuple[str, str]
"""Text of one table cell and its colour ("" for none)."""

_CODES: Final = {"green": "32", "yellow": "33", "red": "31", "grey": "90", "bold": "1", "cyan": "36"}
_NAME_COLOURS: Final = ("36", "33", "32", "35", "34", "96", "93", "92", "95", "94")
NAME_COLOURS: Final = len(_NAME_COLOURS)
_MISSING: Final = "-"

_STATE_COLOURS: Final = {
    "running": "green", "starting": "yellow", "reloading": "yellow", "stopping": "yellow",
    "waiting": "yellow", "backoff": "yellow", "failed": "red", "lost": "red",
    "stopped": "grey", "exited": "grey",
}  # fmt: skip
_UNSETTLED: Final = frozenset({"waiting", "starting", "stopping", "backoff", "reloading"})
"""States that do not last."""
MOST_AWAITED: Final = 3
_OP_WORDS: Final = {"deleted": "deleted", "modified": "modified", "new": "inserted", "keep": "kept"}
_OP_ORDER: Final = ("deleted", "modified", "new", "keep")
_VERDICT_COLOURS: Final = {
    "committed": "green",
    "already": "green",
    "uncommitted": "yellow",
    "apply": "green",
}
# The prototype printed the number its target answered with; operators of it look for that number.
_TARGET_STATES: Final = {"go_ahead": "GO_AHEAD (0)", "not_allowed": "NOT_ALLOWED (1)", "wait": "WAIT (2)"}
_TOLD_BY: Final = {
    "sdk": "told by the SDK",
    "signal": "told by signal",
    "command": "told by command",
    "restart": "told by restart",
    "nobody": "told by nobody",
}

# Select Graphic Rendition: colours and weights. The only escape sequence of a target that reaches a terminal.
_LOG_TIME: Final = re.compile(r'(?:\{"at":")?([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8}\.[0-9]{3}Z)["\x20]')
_SGR: Final = re.compile(r"(\x1b\[[0-9;:]*m)")


class Ink:
    """Colours text, or leaves it alone. ``Ink(False)`` is what pipes and ``NO_COLOR`` get."""

    __slots__ = ("enabled",)

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled

    def __call__(self, colour: str, text: str) -> str:
        if not self.enabled or not colour or not text:
            return text
        return f"\x1b[{_CODES[colour]}m{text}\x1b[0m"

    def name(self, index: int, text: str) -> str:
        """``text`` in the ``index``-th of the colours that tell names apart."""
        if not self.enabled:
            return text
        return f"\x1b[{_NAME_COLOURS[index % NAME_COLOURS]}m{text}\x1b[0m"


PLAIN: Final = Ink(False)


# --- words and numbers --------------------------------------------------------------------------------------


def clean(text: object) -> str:
    r"""``text`` on one line, with every control and format character written as an escape (``\x1b``)."""
    return printable(str(text))


def clean_log(text: str, ink: Ink) -> str:
    """One line of a target's output, safe for a terminal.

    Tabs stay. Colours stay where ``ink`` has colour and are dropped where it has not; every other escape
    sequence is written out.
    """
    if text.isprintable():
        return text
    parts = _SGR.split(text.removesuffix("\r"))
    coloured = ink.enabled and len(parts) > 1
    for index, part in enumerate(parts):
        if index % 2:
            parts[index] = part if coloured else ""
        elif not part.isprintable():
            parts[index] = "\t".join(clean(piece) for piece in part.split("\t"))
    return "".join(parts) + ("\x1b[0m" if coloured else "")


def time_of_log(line: str) -> str | None:
    """The time at the beginning of a line in format ``timestamp`` or ``json``; these sort as times do."""
    found = _LOG_TIME.match(line)
    return found[1] if found else None


def duration(seconds: float | None) -> str:
    """``0.0123`` as ``12 ms``, ``3.21`` as ``3.2 s``, ``11520`` as ``3h 12m``."""
    if seconds is None:
        return _MISSING
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 1:
        return f"{seconds * 1e3:.{1 if seconds < 0.01 else 0}f} ms"
    if seconds < 60:
        return f"{seconds:.{1 if seconds < 10 else 0}f} s"
    whole = int(seconds)
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02}m"
    return f"{whole // 86400}d {whole % 86400 // 3600}h"


def size(count: int | None) -> str:
    """Bytes as ``812 B``, ``1.4 KiB``, ``20.0 MiB``."""
    if count is None:
        return _MISSING
    if count < 1024:
        return f"{count} B"
    value = float(count)
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if value < 1024:
            return f"{value:.1f} {unit}"
    return f"{value / 1024:.1f} TiB"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def moment(at: object, *, date: bool = False, tz: tzinfo | None = None) -> str:
    """An RFC 3339 time in ``tz`` (None: the local zone); whatever else it is, cleaned."""
    try:
        when = datetime.fromisoformat(str(at)).astimezone(tz)
    except ValueError:
        return clean(at) if at else _MISSING
    if date:
        return when.strftime("%Y-%m-%d %H:%M:%S")
    return f"{when:%H:%M:%S}.{when.microsecond // 1000:03}"


def short(identifier: object) -> str:
    """The first 12 characters of a patch id: enough to tell patches apart, and accepted by ``patch show``."""
    return clean(identifier)[:12] if identifier else _MISSING


def width_of(text: str) -> int:
    """Terminal columns of ``text`` (which must be clean)."""
    if text.isascii():
        return len(text)
    columns = 0
    for ch in text:
        if not unicodedata.combining(ch):
            columns += 2 if unicodedata.east_asian_width(ch) in "WF" else 1
    return columns


def cut(text: str, columns: int) -> str:
    """``text`` in at most ``columns`` columns; what is cut off is replaced by ``...``."""
    if width_of(text) <= columns:
        return text
    kept, used = [], 0
    dots = "..."[: max(columns, 0)]
    for ch in text:
        used += width_of(ch)
        if used > columns - len(dots):
            break
        kept.append(ch)
    return "".join(kept).rstrip() + dots


def progress(done: int, total: int, width: int) -> str:
    """One line of a progress bar, at most ``width`` columns, without a line end."""
    share = 1.0 if total <= 0 else min(max(done / total, 0.0), 1.0)
    text = f" {share:4.0%}  {size(done)} of {size(total)}"
    room = min(width - len(text) - 2, 40)
    if room < 5:
        return cut(text.strip(), width)
    filled = int(room * share)
    return f"[{'#' * filled}{'.' * (room - filled)}]{text}"


# --- tables -------------------------------------------------------------------------------------------------


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[Cell]],
    *,
    width: int | None = None,
    ink: Ink = PLAIN,
    right: Sequence[str] = (),
    drop: Sequence[str] = (),
) -> list[str]:
    """Aligned columns, two spaces apart; the last one takes what is left and is cut to it.

    Args:
        right: names of columns aligned to the right.
        drop: names of columns to leave out, in this order, while ``width`` leaves the last one too little.
    """
    body = [list(row) for row in rows]
    columns = list(range(len(header)))
    widths = [max([width_of(header[i]), *(width_of(row[i][0]) for row in body)]) for i in columns]
    last = columns[-1]
    if width is not None:
        for name in drop:
            fixed = sum(widths[i] + 2 for i in columns if i != last)
            if fixed + min(widths[last], 24) <= width:
                break
            columns.remove(header.index(name))
        fixed = sum(widths[i] + 2 for i in columns if i != last)
        widths[last] = min(widths[last], max(width - fixed, 8))
    lines = []
    for row in [[(name, "bold") for name in header], *body]:
        cells = []
        for i in columns:
            text, colour = row[i]
            shown = cut(text, widths[i])
            padding = " " * (widths[i] - width_of(shown))
            painted = ink(colour, shown)
            cells.append(padding + painted if header[i] in right else painted + padding)
        lines.append("  ".join(cells).rstrip())
    return lines


def _pairs(pairs: Iterable[tuple[str, str]], indent: str = "") -> list[str]:
    known = [(name, text) for name, text in pairs if text]
    if not known:
        return []
    column = max(len(name) for name, _ in known)
    return [f"{indent}{name:<{column}}  {text}" for name, text in known]


# --- status -------------------------------------------------------------------------------------------------


def is_down(target: Value) -> bool:
    """Something that should run is not running or not ready. What has ended as it was meant to is neither."""
    return target.get("wanted") == "up" and not all(
        instance.get("ready") or instance.get("state") == "exited"
        for instance in target.get("instances") or [target]
    )


def status_lines(value: Value, *, width: int | None = None, ink: Ink = PLAIN) -> list[str]:
    """The table of ``asyncsup status``; instances are indented where a target has more than one."""
    targets: Sequence[Value] = value.get("targets") or ()
    if not targets:
        return ["no targets"]
    rows: list[list[Cell]] = []
    for target in targets:
        instances: Sequence[Value] = target.get("instances") or ()
        rows.append(_target_row(target, instances))
        rows.extend(_instance_row(instance) for instance in _shown_alone(target))
    header = ("NAME", "STATE", "READY", "PID", "UPTIME", "RESTARTS", "BUILD", "DETAIL")
    right, drop = ("PID", "RESTARTS", "BUILD"), ("RESTARTS", "UPTIME", "BUILD", "READY")
    if "isolation" not in value:
        return table(header, rows, width=width, ink=ink, right=right, drop=drop)
    taken = _usage_columns(targets)
    wider = [[*row[:-1], *cells, row[-1]] for row, cells in zip(rows, taken, strict=True)]
    columns = ("MEMORY", "CPU", "PROCESSES")
    return [
        *table(
            (*header[:-1], *columns, header[-1]),
            wider,
            width=width,
            ink=ink,
            right=(*right, *columns),
            drop=("RESTARTS", "BUILD", "UPTIME", "READY"),
        ),
        f"isolation: {_isolation_text(value['isolation'])}",
    ]


def _shown_alone(target: Value) -> list[Value]:
    """The instances with a row of their own, each before whoever is beside it in its slot."""
    instances: Sequence[Value] = target.get("instances") or ()
    others: Sequence[Value] = target.get("others") or ()
    shown = list(instances) if len(instances) > 1 else []
    return sorted([*shown, *others], key=lambda each: _slot_of(each, instances))


def _slot_of(instance: Value, instances: Sequence[Value]) -> int:
    names = [each.get("name") for each in instances]
    return names.index(instance.get("name")) if instance.get("name") in names else len(names)


def _usage_columns(targets: Sequence[Value]) -> list[list[Cell]]:
    """What each row's instance takes; in the row of a target with several, all of them together."""
    cells: list[list[Cell]] = []
    for target in targets:
        instances: Sequence[Value] = target.get("instances") or ()
        taken = [instance.get("usage") or {} for instance in instances]
        cells.append(_usage_cells(taken))
        cells.extend(_usage_cells([each.get("usage") or {}]) for each in _shown_alone(target))
    return cells


def _usage_cells(taken: Sequence[Value]) -> list[Cell]:
    def total(key: str) -> float | None:
        known = [float(each[key]) for each in taken if each.get(key) is not None]
        return sum(known) if known else None

    memory, cpu, processes = total("memory"), total("cpu"), total("processes")
    return [
        (_MISSING if memory is None else size(int(memory)), ""),
        (_MISSING if cpu is None else duration(cpu), ""),
        (_MISSING if processes is None else str(int(processes)), ""),
    ]


def _usage_text(usage: Value | None) -> str:
    if not usage:
        return ""
    parts = [
        f"memory {size(usage['memory'])}" if usage.get("memory") is not None else "",
        f"CPU {duration(usage['cpu'])}" if usage.get("cpu") is not None else "",
        f"{clean(usage.get('processes'))} processes",
        f"{clean(usage['oom_kills'])} killed for memory" if usage.get("oom_kills") else "",
    ]
    return ", ".join(part for part in parts if part)


def _isolation_text(isolation: Value | None) -> str:
    if not isolation:
        return ""
    why = isolation.get("why")
    if isolation.get("by") != "cgroup":
        return f"process groups{f'; no control groups: {clean(why)}' if why else ''}"
    controllers = " ".join(clean(each) for each in isolation.get("controllers") or ()) or "none"
    where = clean(isolation.get("cgroup"))
    return f"control groups in {where}, controllers: {controllers}{f'; {clean(why)}' if why else ''}"


def _target_row(target: Value, instances: Sequence[Value]) -> list[Cell]:
    state = clean(target.get("state", "unknown"))
    one = instances[0] if len(instances) == 1 else None
    details = []
    if target.get("busy"):
        details.append(f"busy: {_busy(target)}")
    if target.get("waiting"):
        details.append(f"queued: {_queue(target['waiting'])}")
    details.append(_patch_waits(target))
    if one is not None:
        details.append(_instance_detail(one))
        pid, uptime, ready = _number(one.get("pid")), duration(one.get("uptime")), _yes(target, "ready")
    else:
        pid, uptime = _MISSING, _MISSING
        ready = f"{sum(1 for i in instances if i.get('ready'))}/{len(instances)}"
    restarts = sum(int(i.get("restarts") or 0) for i in instances)
    return [
        (clean(target.get("name", "")), ""),
        (state, _state_colour(target)),
        (ready, ""),
        (pid, ""),
        (uptime, ""),
        (str(restarts), "yellow" if restarts else ""),
        (_number(target.get("build")), ""),
        ("; ".join(text for text in details if text), ""),
    ]


def _patch_waits(target: Value) -> str:
    """What an operator has to say a word about."""
    if target.get("undecided") is not None:
        return f"patch {clean(target['undecided'])} has failed: abort or commit it"
    if target.get("uncommitted") is not None:
        return f"patch {clean(target['uncommitted'])} waits for its commit"
    return ""


def _busy(target: Value) -> str:
    """The operation under way: ``patch for root (uid 0, pid 4711), since 3.2 s``."""
    current = target.get("current")
    if not isinstance(current, Mapping):
        return clean(target.get("busy") or "")
    return f"{_queue([current])}, since {_since(current)}"


def _since(operation: Value) -> str:
    since = operation.get("since")
    return duration(since) if isinstance(since, int | float) else _MISSING


def waiting_line(value: Value, *, queued: str | None = None) -> str:
    """Of an answer of `status`: what those who want something of these targets wait for; empty if nothing.

    Args:
        queued: look only at targets in whose queue there is such an operation.
    """
    targets = [
        target
        for target in value.get("targets") or ()
        if queued is None or any(each.get("operation") == queued for each in target.get("waiting") or ())
    ]
    awaited = [text for target in targets if (text := _awaited(target))]
    more = [f"{len(awaited) - MOST_AWAITED} more"] if len(awaited) > MOST_AWAITED else []
    return ", ".join([*awaited[:MOST_AWAITED], *more])


def _awaited(target: Value) -> str:
    name = clean(target.get("name", ""))
    if target.get("busy") and target.get("waiting"):
        return f"{name} is busy: {_busy(target)}"
    state = target.get("state")
    if state not in _UNSETTLED:
        return ""
    worst: Value = next((i for i in target.get("instances") or () if i.get("state") == state), {})
    detail = clean(worst.get("detail") or "")
    if state == "waiting":
        return f"{name} is {detail or state}"
    return f"{name} is {clean(state)}{f' ({detail})' if detail else ''}"


def left_line(value: Value) -> str:
    """Of an answer of `status`: the instances that still have a process; empty if none has."""
    return ", ".join(
        f"{clean(instance.get('name', ''))} ({clean(instance.get('state', 'unknown'))})"
        for target in value.get("targets") or ()
        for instance in (*(target.get("instances") or ()), *(target.get("others") or ()))
        if instance.get("pid") is not None
    )


def _queue(waiting: Sequence[Any]) -> str:
    """The operations that wait their turn: ``restart for root (uid 0, pid 4711)``."""
    return ", ".join(
        f"{clean(entry.get('operation', '?'))} for {clean(entry.get('asked_by', '?'))}"
        if isinstance(entry, Mapping)
        else clean(entry)
        for entry in waiting
    )


def _instance_row(instance: Value) -> list[Cell]:
    restarts = int(instance.get("restarts") or 0)
    return [
        (f"  {clean(instance.get('name', ''))}", ""),
        (_state_in_slot(instance), _state_colour(instance)),
        (_yes(instance, "ready"), ""),
        (_number(instance.get("pid")), ""),
        (duration(instance.get("uptime")), ""),
        (str(restarts), "yellow" if restarts else ""),
        ("", ""),
        (_instance_detail(instance), ""),
    ]


def _state_in_slot(instance: Value) -> str:
    """The state; of whoever does not count in its slot what it is there for."""
    state, role = clean(instance.get("state", "unknown")), clean(instance.get("role") or "current")
    if role == "current":
        return state
    return role if state == "running" else f"{role}, {state}"


def _instance_detail(instance: Value) -> str:
    parts = []
    detail, text = instance.get("detail"), instance.get("status_text")
    if detail and not (instance.get("ready") and instance.get("state") == "running"):
        parts.append(clean(detail))  # how one that is well became so is of no interest
    if text and text != detail:
        parts.append(clean(text))
    if instance.get("failure"):
        parts.insert(0, f"says that it has failed: {clean(instance['failure'])}")
    ended = instance.get("exit")
    if not parts and ended and instance.get("pid") is None:
        parts.append(_exit_text(ended))
    if lost := _lost_text(instance):
        parts.append(lost)
    return "; ".join(parts)


def _lost_text(instance: Value) -> str:
    lost = int(instance.get("lost_bytes") or 0)
    return f"{size(lost)} of its output lost" if lost else ""


def _exit_text(ended: Value) -> str:
    status, number, reason = ended.get("status"), ended.get("signal"), ended.get("reason")
    if status is None and number is None:
        return clean(reason or "ended unseen")  # there was no process, or nobody saw it end
    text = f"exit status {clean(status)}" if number is None else f"killed by {_signal_name(number)}"
    if not reason:
        return text
    return clean(reason) if text in str(reason) else f"{text}: {clean(reason)}"


def _signal_name(number: Any) -> str:
    import signal  # noqa: PLC0415 - most output has no use for it

    try:
        return signal.Signals(number).name
    except ValueError:
        return clean(number)


def _state_colour(value: Value) -> str:
    colour = _STATE_COLOURS.get(str(value.get("state")), "yellow")
    if colour == "green" and not value.get("ready"):
        return "yellow"
    return colour


def _yes(value: Value, key: str) -> str:
    if value.get("state") in {"stopped", "exited", "failed"}:
        return _MISSING
    return "yes" if value.get(key) else "no"


def _number(value: object) -> str:
    return _MISSING if value is None else clean(value)


def info_lines(info: Value, *, ink: Ink = PLAIN) -> list[str]:
    """``supervisor.info`` as names and values."""
    counters: Value = info.get("counters") or {}
    sockets: Value = info.get("sockets") or {}
    return _pairs(
        [
            ("supervisor", f"asyncsup {clean(info.get('version', '?'))}, pid {_number(info.get('pid'))}"),
            ("keeper", "none" if info.get("keeper") is None else f"pid {_number(info['keeper'])}"),
            ("region", clean(info.get("region", ""))),
            ("up for", duration(info.get("uptime"))),
            ("config", clean(info.get("config") or "")),
            ("state", clean(info.get("state_dir") or "")),
            ("runtime", clean(info.get("runtime_dir") or "")),
            ("inbox", clean(info.get("inbox") or "")),
            ("trust", trust_text(info.get("trust"), ink=ink)),
            ("targets", _listed(info.get("targets"))),
            *(
                (
                    f"socket {clean(name)}",
                    clean(socket["listen"]) + ("" if socket["bound"] else " (not bound)"),
                )
                for name, socket in sockets.items()
            ),
            ("isolation", _isolation_text(info.get("isolation"))),
            ("counters", ", ".join(f"{clean(k)} {clean(v)}" for k, v in counters.items() if v)),
        ]
    )


def trust_text(trust: object, *, ink: Ink = PLAIN) -> str:
    if trust == "none":
        return ink("red", "NONE: patches are applied UNVERIFIED (development only)")
    return clean(trust or "")


def _listed(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(clean(item) for item in value)
    return "" if value is None else clean(value)


def show_lines(
    value: Value, *, width: int | None = None, ink: Ink = PLAIN, tz: tzinfo | None = None
) -> list[str]:
    """One target: its state, its instances, its settings, its last transactions."""
    lines = _pairs(
        [
            ("target", ink("bold", clean(value.get("name", "")))),
            ("state", ink(_state_colour(value), clean(value.get("state", "unknown")))),
            ("ready", "yes" if value.get("ready") else "no"),
            ("wanted", clean(value.get("wanted") or "")),
            ("busy", _busy(value)),
            ("queued", _queue(value.get("waiting") or ())),
            ("region", clean(value.get("region") or "")),
            ("build", _number(value.get("build")) + _marks_text(value.get("marks"))),
            ("generation", _number(value.get("generation"))),
            ("patch", clean(value.get("patch") or "")),
            ("waits", _patch_waits(value)),
        ]
    )
    for instance in value.get("instances") or ():
        lines += ["", f"instance {ink('bold', clean(instance.get('name', '')))}"]
        ended = instance.get("exit")
        lines += _pairs(
            [
                ("state", ink(_state_colour(instance), clean(instance.get("state", "unknown")))),
                ("ready", "yes" if instance.get("ready") else "no"),
                ("pid", _number(instance.get("pid"))),
                ("uptime", duration(instance.get("uptime"))),
                ("restarts", _number(instance.get("restarts"))),
                ("status", clean(instance.get("status_text") or "")),
                ("detail", clean(instance.get("detail") or "")),
                ("failure", clean(instance.get("failure") or "")),
                ("output", ink("red", _lost_text(instance))),
                ("last exit", f"{_exit_text(ended)} at {moment(ended.get('at'), date=True, tz=tz)}")
                if ended
                else ("last exit", ""),
                ("sdk", "connected" if instance.get("sdk") else "no"),
                ("takes", _usage_text(instance.get("usage"))),
                ("cgroup", clean(instance.get("cgroup") or "")),
            ],
            "  ",
        )
    config: Value = value.get("config") or {}
    if config:
        lines += ["", "configuration", *_pairs([(clean(k), _setting(v)) for k, v in config.items()], "  ")]
    logs: Value = value.get("log") or {}
    paths = [
        (f"{clean(i)} {clean(s)}", clean(path)) for i, files in logs.items() for s, path in files.items()
    ]
    if paths:
        lines += ["", "output", *_pairs(paths, "  ")]
    drift: Sequence[Value] = value.get("drift") or ()
    if drift:
        lines += ["", ink("yellow", "drifted files"), *_drifted(drift)]
    history: Sequence[Value] = value.get("history") or ()
    if history:
        lines += ["", "last transactions"]
        lines += [f"  {line}" for line in _history_table(history, width and width - 2, ink, tz)]
    return lines


def _marks_text(marks: Value | None) -> str:
    if not marks:
        return ""
    floor = "" if marks.get("floor") is None else f", floor {clean(marks['floor'])}"
    return f" (highest so far {clean(marks.get('highest', '?'))}{floor})"


def _setting(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{clean(k)}={_setting(v)}" for k, v in value.items() if v is not None)
    if isinstance(value, list | tuple):
        return " ".join(_word(item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return "" if value is None else clean(value)


def _word(value: object) -> str:
    """One item of a list, quoted where its own spaces would make it look like several."""
    text = clean(value)
    return f"'{text}'" if " " in text or not text else text


def results_lines(value: Value, verb: str, *, ink: Ink = PLAIN) -> list[str]:
    """What ``start``, ``stop``, ``restart`` or ``reload`` did, one line for each target."""
    results: Sequence[Value] = value.get("results") or ()
    column = max((width_of(clean(r.get("target", ""))) for r in results), default=0)
    lines = []
    for result in results:
        name = clean(result.get("target", ""))
        ok = bool(result.get("ok"))
        mark = ink("green", "ok    ") if ok else ink("red", "failed")
        text = clean(result.get("detail") or result.get("state") or f"{verb} {'done' if ok else 'failed'}")
        took = result.get("took")
        after = f" ({duration(took)})" if took is not None else ""
        lines.append(f"{mark}  {name}{' ' * (column - width_of(name))}  {text}{after}")
    return lines or [f"no targets to {verb}"]


def scaled_line(result: Value) -> str:
    """How many instances one target has after ``scale``."""
    failed = "" if result.get("ok", True) else f"; failed: {clean(result.get('detail', ''))}"
    return (
        f"{clean(result.get('target', ''))} has {plural(int(result.get('instances', 0)), 'instance')}{failed}"
    )


def config_lines(value: Value, *, ink: Ink = PLAIN) -> list[str]:
    """What `config plan` would change, or `config apply` has changed, one line for each target."""
    failed: Value = value.get("failed") or {}
    rows = [(ink("green", "+"), name, "new") for name in value["added"]]
    rows += [(ink("red", "-"), name, "stopped, configured no more") for name in value["removed"]]
    rows += [
        (ink("yellow", "~"), name, f"restarted: {', '.join(keys)}")
        for name, keys in value["restarted"].items()
    ]
    rows += [("=", name, f"in place: {', '.join(keys)}") for name, keys in value["in_place"].items()]
    column = max((width_of(clean(name)) for _, name, _ in rows), default=0)
    lines = []
    for mark, name, text in rows:
        padded = clean(name) + " " * (column - width_of(clean(name)))
        lines.append(f"{mark} {padded}  {clean(text)}")
        if name in failed:
            lines.append(f"  {ink('red', 'failed')}: {clean(failed[name]['message'])}")
    lines += [f"= {clean(key)}" for key in value["immediate"]]
    shown = {name for _, name, _ in rows}
    lines += [
        f"  {ink('red', 'failed')}: {clean(error['message'])}"
        for name, error in failed.items()
        if name not in shown
    ]
    if value["postponed"]:
        keys = ", ".join(clean(key) for key in value["postponed"])
        lines.append(f"! only a new `asyncsup serve` takes up {keys}")
    lines += [f"{ink('yellow', 'warning')}: {clean(warning)}" for warning in value.get("warnings") or ()]
    return lines or ["nothing has changed"]


# --- events -------------------------------------------------------------------------------------------------


def event_line(event: Value, *, ink: Ink = PLAIN, tz: tzinfo | None = None) -> str:
    """One event of the stream."""
    kind = clean(event.get("type", "?"))
    subject, text = _event_text(event, kind, ink)
    seq = f"#{clean(event.get('seq', '?'))}"
    parts = [ink("grey", f"{moment(event.get('at'), tz=tz)}  {seq:<6}"), f"{kind:<18}", subject, text]
    return "  ".join(part for part in parts if part).rstrip()


def _event_text(event: Value, kind: str, ink: Ink) -> tuple[str, str]:
    subject = ink("bold", clean(event.get("instance") or event.get("target") or ""))
    if kind == "instance.state":
        to = clean(event.get("to", "?"))
        text = f"{clean(event.get('from', '?'))} -> {ink(_STATE_COLOURS.get(to, ''), to)}"
        if event.get("pid") is not None:
            text += f"  pid {clean(event['pid'])}"
        if event.get("reason"):
            text += f"  ({clean(event['reason'])})"
        return subject, text
    if kind == "patch.step":
        return f"txn {clean(event.get('txn', '?'))}", step_line(event, ink=ink)
    if kind == "patch.progress":
        return (
            f"txn {clean(event.get('txn', '?'))}",
            f"{size(event.get('done'))} of {size(event.get('total'))}",
        )
    if kind == "patch.ended":
        verdict = clean(event.get("verdict", "?"))
        return f"txn {clean(event.get('txn', '?'))}", ink(_VERDICT_COLOURS.get(verdict, "red"), verdict)
    known = {"seq", "at", "type", "target", "instance"}
    rest = ", ".join(
        clean(v) if k == "text" else f"{clean(k)}={_setting(v)}"
        for k, v in event.items()
        if k not in known and v is not None
    )
    return subject, rest


def step_line(step: Value, *, ink: Ink = PLAIN) -> str:
    """One step of a transaction, from ``patch.show``, a report or the event stream."""
    where = clean(step.get("instance") or step.get("target") or "")
    detail = clean(step.get("detail") or "")
    took = step.get("took")
    name = clean(step.get("step", "?"))
    text = f"{where}: {detail}" if where and detail else where or detail
    after = ink("grey", f"({duration(took)})") if took is not None else ""
    return " ".join(part for part in (ink("cyan", f"{name:<9}"), text, after) if part).rstrip()


# --- patches ------------------------------------------------------------------------------------------------


def patch_title(value: Value, *, ink: Ink = PLAIN) -> str:
    """``pricing-rules 2.3.0, build 300, warm, 3f9ac1d2e5b7``"""
    name = " ".join(clean(value[key]) for key in ("name", "version") if value.get(key))
    parts = [ink("bold", name or "unnamed patch")]
    if value.get("build") is not None:
        parts.append(f"build {clean(value['build'])}")
    if value.get("kind"):
        parts.append(clean(value["kind"]))
    identifier = value.get("patch") or value.get("id")
    if identifier:
        parts.append(ink("grey", short(identifier)))
    return ", ".join(parts)


def report_lines(report: Value, *, ink: Ink = PLAIN, steps: bool = False, reason: bool = True) -> list[str]:
    """The whole transcript of an apply or a rollback, verdict last.

    Args:
        steps: also each step with its time (leave out when they were printed as they happened).
        reason: also why it failed (leave out when the error itself follows).
    """
    if report.get("action") == "rollback":
        build = report.get("build")
        lines = ["rollback" if build is None else f"rollback to build {clean(build)}"]
    elif report.get("build") is None:
        lines = ["the package was not opened"]
    else:
        lines = [f"patch {patch_title(report, ink=ink)}"]
    if steps:
        lines += [f"  {step_line(step, ink=ink)}" for step in report.get("steps") or ()]
    for target in report.get("targets") or ():
        lines += _target_transcript(target, report, ink)
    verdict = verdict_lines(report, ink=ink)
    return [*lines, *(verdict if reason else verdict[:1])]


def _target_transcript(target: Value, report: Value, ink: Ink) -> list[str]:
    before, after = target.get("build_before"), target.get("build_after")
    facts = []
    if before is not None:
        moved = after is not None and after != before
        facts.append(
            f"build {clean(before)} -> {clean(after)}" if moved else f"build {clean(before)}, unchanged"
        )
    if target.get("generation") is not None:
        facts.append(f"generation {clean(target['generation'])}")
    if target.get("layout"):
        facts.append(clean(target["layout"]))
    lines = [f"target {ink('bold', clean(target.get('target', '')))}: {', '.join(facts)}".rstrip(": ")]
    instances: Sequence[Value] = target.get("instances") or ()
    states = [
        f"{clean(i.get('name', ''))} {_TARGET_STATES.get(str(i['prepare']), clean(i['prepare']))}"
        f" in {duration(i.get('prepare_took'))}"
        for i in instances
        if i.get("prepare")
    ]
    if states:
        lines += ["  target state", *(f"    {state}" for state in states)]
    lines += _gate_lines(target.get("gates") or (), ink)
    untouched = report.get("verdict") in {"refused", "already", "target_refused"}
    lines += _file_lines(target.get("files") or (), ink, "files, not touched" if untouched else "files")
    if instances:
        lines.append("  told")
        lines += [f"    {_told_line(instance, report, ink)}" for instance in instances]
    pids = (target.get("pids_before"), target.get("pids_after"))
    if not instances and pids[0]:
        lines.append(f"  pids {_pid_change(pids[0], pids[1], ink)}")
    return lines


def _gate_lines(gates: Sequence[Value], ink: Ink) -> list[str]:
    if not gates:
        return []
    column = max(width_of(clean(gate.get("name", ""))) for gate in gates)
    lines = ["  checks"]
    for gate in gates:
        mark = ink("green", "ok     ") if gate.get("ok") else ink("red", "refused")
        code = f" [{clean(gate['code'])}]" if gate.get("code") and not gate.get("ok") else ""
        name = clean(gate.get("name", ""))
        padded = name + " " * (column - width_of(name))
        lines.append(f"    {mark}  {padded}  {clean(gate.get('detail') or '')}{code}".rstrip())
    return lines


def _file_lines(files: Sequence[Value], ink: Ink, heading: str = "files") -> list[str]:
    """Deleted, modified, inserted: the order in which the prototype listed (and did) them; then the rest."""
    colours = {"deleted": "red", "modified": "yellow", "new": "green"}
    lines = [f"  {heading}"] if files else []
    for op in (*_OP_ORDER, None):
        for file in files:
            kind = str(file.get("op"))
            if (kind if kind in _OP_WORDS else None) != op:
                continue
            note = f"  ({clean(file['note'])})" if file.get("note") else ""
            word = ink(colours.get(kind, ""), f"{_OP_WORDS.get(kind, clean(kind)):<8}")
            lines.append(f"    {word}  {clean(file.get('path', '?'))}{note}")
    return lines


def _told_line(instance: Value, report: Value, ink: Ink) -> str:
    told = str(instance.get("told_by") or "nobody")
    parts = [_TOLD_BY.get(told, f"told by {clean(told)}")]
    answer, took = instance.get("reload"), instance.get("reload_took")
    if answer == "ok":
        word = "ready" if told == "restart" else "acknowledged"
        parts.append(
            ink("green", word if took is None else f"{word} {'after' if told == 'restart' else 'in'} ")
            + ink("green", duration(took) if took is not None else "")
        )
    elif answer:
        parts.append(ink("red", "failed" if took is None else f"failed after {duration(took)}"))
    elif report.get("verdict") in {"refused", "target_refused", "already"}:
        parts = ["not told"]
    elif told not in {"restart", "nobody"}:
        parts.append(ink("red", "no acknowledgement"))
    before, after = instance.get("pid_before"), instance.get("pid_after")
    if before is not None or after is not None:
        parts.append(_pid_change(before, after, ink))
    if instance.get("reason"):
        parts.append(clean(instance["reason"]))
    return f"{clean(instance.get('name', '?'))}  {', '.join(parts)}"


def _pid_change(before: object, after: object, ink: Ink) -> str:
    if before == after:
        return f"pid {_setting(before)} (the same)"
    return ink("yellow", f"pid {_setting(before) or 'none'} -> {_setting(after) or 'none'}")


def verdict_lines(report: Value, *, ink: Ink = PLAIN) -> list[str]:
    """How a transaction ended, in one line, and why in a second one where there is a reason."""
    verdict = str(report.get("verdict"))
    rollback = report.get("action") == "rollback"
    text = {
        "committed": "back at the build before" if rollback else "every instance has it",
        "already": "the target has this very content; nothing to do",
        "refused": "nothing was touched",
        "target_refused": "no go-ahead from the target; nothing was changed",
        "rolled_back": "applied and undone; everything is as it was before",
        "undecided": "it has failed, and stays as it is until somebody decides",
        "rollback_failed": "the files are wholly one build, but a process is not well",
        "uncommitted": "every instance has it; it waits for `asyncsup patch commit "
        f"{clean(report.get('txn', 'ID'))}` (or abort)",
    }.get(verdict, "unknown to this version")
    facts = []
    if report.get("took") is not None:
        facts.append(duration(report["took"]))
    if report.get("txn") is not None:
        facts.append(f"transaction {clean(report['txn'])}")
    after = f" ({', '.join(facts)})" if facts else ""
    colour = _VERDICT_COLOURS.get(verdict, "red")
    lines = [f"verdict: {ink(colour, f'{clean(verdict).upper()}: {text}')}{after}"]
    if report.get("reason"):
        code = f" [{clean(report['code'])}]" if report.get("code") else ""
        lines.append(f"reason: {clean(report['reason'])}{code}")
    return lines


def drift_lines(value: Value, *, ink: Ink = PLAIN) -> list[str]:
    """Files that are not as patches have left them, target by target."""
    lines = []
    for target in value.get("targets") or ():
        files: Sequence[Value] = target.get("files") or ()
        found = ink("yellow", plural(len(files), "file")) if files else ink("green", "nothing")
        lines.append(f"target {ink('bold', clean(target.get('target', '')))}: {found} drifted")
        lines += _drifted(files)
    return lines or ["no target has a root"]


def _drifted(files: Sequence[Value]) -> list[str]:
    column = max((width_of(clean(file.get("path", "?"))) for file in files), default=0)
    lines = []
    for file in files:
        path = clean(file.get("path", "?"))
        lines.append(f"  {path}{' ' * (column - width_of(path))}  {clean(file.get('note') or '')}".rstrip())
    return lines


def pruned_lines(value: Value) -> list[str]:
    """Generations that were removed, by target."""
    lines = [
        f"{clean(name)}: removed generation {', '.join(map(str, numbers))}"
        for name, numbers in value["pruned"].items()
        if numbers
    ]
    return lines or ["nothing to remove"]


def released_lines(value: Value) -> list[str]:
    """Paths that are ordinary files again."""
    return [f"ordinary again: {clean(path)}" for path in value["released"]] or ["nothing was managed"]


def plan_lines(plan: Value, *, ink: Ink = PLAIN) -> list[str]:
    """What an apply would do, target by target."""
    summary: Value = plan.get("manifest") or plan
    title = patch_title({**summary, "id": plan.get("id") or summary.get("id")}, ink=ink)
    lines = [f"plan for {title}"]
    for target in plan.get("targets") or ():
        name = ink("bold", clean(target.get("target", "")))
        if target.get("refused"):
            state = ink("red", "would be refused")
        elif target.get("already"):
            state = ink("green", "has it already")
        else:
            state = ink("green", "would be patched")
        lines.append(f"target {name}: {state}")
        lines += _gate_lines(target.get("gates") or (), ink)
        lines += _file_lines(target.get("files") or (), ink)
        lines += _busy_lines(target, ink)
    lines += _order_lines(plan, ink)
    verdict = str(plan.get("verdict"))
    waits = any(target.get("waits_for") for target in plan.get("targets") or ())
    turn = ", when its turn comes, if all is still so" if waits else ""
    text = {
        "apply": f"APPLY: it would be applied{turn}",
        "already": "ALREADY: nothing would be done",
        "refused": "REFUSED: nothing would be touched",
    }.get(verdict, clean(verdict))
    lines.append(f"verdict: {ink(_VERDICT_COLOURS.get(verdict, 'red'), text)}")
    if plan.get("reason"):
        lines.append(f"reason: {clean(plan['reason'])} [{clean(plan.get('code') or '?')}]")
    return lines


def _busy_lines(target: Value, ink: Ink) -> list[str]:
    """What an apply would have to wait for before it begins with a target."""
    operations: Sequence[Value] = target.get("waits_for") or ()
    if not operations:
        return []
    lines = ["  would wait for"]
    for operation in operations:
        what = f"{clean(operation.get('operation', '?'))} by {clean(operation.get('asked_by', '?'))}"
        lines.append(f"    {ink('yellow', what)}, for {duration(operation.get('since'))}")
    if target.get("uncommitted") is not None:
        lines[1] += f" (transaction {clean(target['uncommitted'])}, which waits for `asyncsup patch commit`)"
    return lines


def _order_lines(plan: Value, ink: Ink) -> list[str]:
    """What would be done, step by step, and what becomes of it if a step fails."""
    steps: Sequence[Value] = plan.get("steps") or ()
    if not steps:
        return []
    decided = " before the switch; after it, that is for you to decide (`asyncsup patch abort`)"
    contents: Value = plan.get("contents") or {}
    return [
        f"contents: {clean(contents.get('detail') or '')}",
        "in this order",
        *(f"  {step_line(step, ink=ink)}" for step in steps),
        f"if something fails, everything is put back{decided if plan.get('rollback') == 'manual' else ''}",
    ]


def inbox_lines(value: Value, *, width: int | None = None, ink: Ink = PLAIN) -> list[str]:
    """What lies in the inbox."""
    entries: Sequence[Value] = value.get("inbox") or ()
    if not entries:
        return ["the inbox is empty"]
    colours = {"complete": "green", "incomplete": "yellow", "malformed": "red"}
    rows: list[list[Cell]] = []
    for entry in entries:
        state = clean(entry.get("state", "?"))
        name = " ".join(clean(entry[key]) for key in ("name", "version") if entry.get(key))
        rows.append(
            [
                (clean(entry.get("file", "?")), ""),
                (state, colours.get(state, "")),
                (size(entry.get("size")), ""),
                (name or _MISSING, ""),
                (_number(entry.get("build")), ""),
                (clean(entry.get("kind") or _MISSING), ""),
                (_listed(entry.get("targets")) or _MISSING, ""),
                (_listed(entry.get("regions")) or _MISSING, ""),
                (short(entry.get("id")), "grey"),
                (clean(entry.get("detail") or ""), ""),
            ]
        )
    header = ("FILE", "STATE", "SIZE", "PATCH", "BUILD", "KIND", "TARGETS", "REGIONS", "ID", "DETAIL")
    return table(
        header, rows, width=width, ink=ink, right=("SIZE", "BUILD"), drop=("SIZE", "ID", "REGIONS", "KIND")
    )


def history_lines(
    value: Value, *, width: int | None = None, ink: Ink = PLAIN, tz: tzinfo | None = None
) -> list[str]:
    """Transactions, in the order the supervisor gave them."""
    transactions: Sequence[Value] = value.get("transactions") or ()
    return _history_table(transactions, width, ink, tz) if transactions else ["no transactions"]


def _history_table(
    transactions: Sequence[Value], width: int | None, ink: Ink, tz: tzinfo | None
) -> list[str]:
    rows: list[list[Cell]] = []
    for txn in transactions:
        verdict = clean(txn.get("verdict") or txn.get("state") or "?")
        name = " ".join(clean(txn[key]) for key in ("name", "version") if txn.get(key))
        rows.append(
            [
                (_number(txn.get("txn")), ""),
                (moment(txn.get("started"), date=True, tz=tz), ""),
                (clean(txn.get("action") or "?"), ""),
                (verdict, _VERDICT_COLOURS.get(verdict, "red")),
                (name or _MISSING, ""),
                (_number(txn.get("build")), ""),
                (clean(txn.get("kind") or _MISSING), ""),
                (_listed(txn.get("targets")) or _MISSING, ""),
                (duration(txn.get("took")), ""),
                (_listed(txn.get("asked_by")) or _MISSING, ""),
                (clean(_error_text(txn.get("error"))), ""),
            ]
        )
    return table(
        ("TXN", "STARTED", "ACTION", "VERDICT", "PATCH", "BUILD", "KIND", "TARGETS", "TOOK", "BY", "ERROR"),
        rows,
        width=width,
        ink=ink,
        right=("TXN", "BUILD", "TOOK"),
        drop=("BY", "TOOK", "KIND", "STARTED"),
    )


def _error_text(error: object) -> str:
    if isinstance(error, Mapping):
        return str(error.get("message") or error.get("code") or "")
    return str(error or "")


def transaction_lines(value: Value, *, ink: Ink = PLAIN, tz: tzinfo | None = None) -> list[str]:
    """``patch.show``: one transaction with its steps and files."""
    verdict = clean(value.get("verdict") or value.get("state") or "?")
    lines = _pairs(
        [
            ("transaction", f"{_number(value.get('txn'))} ({clean(value.get('action') or 'apply')})"),
            ("patch", patch_title({**value, "patch": None, "id": None}, ink=ink)),
            ("id", clean(value.get("patch") or value.get("id") or "")),
            ("targets", _listed(value.get("targets"))),
            ("state", "" if value.get("state") == value.get("verdict") else clean(value.get("state") or "")),
            ("verdict", ink(_VERDICT_COLOURS.get(verdict, "red"), verdict)),
            ("started", moment(value.get("started"), date=True, tz=tz)),
            ("took", duration(value.get("took"))),
            ("asked by", _listed(value.get("asked_by"))),
            *_request_pairs(value.get("request") or {}),
            ("error", clean(_error_text(value.get("error")))),
            ("audit", _records_text(value.get("audit") or {})),
        ]
    )
    for decided in (value.get("request") or {}).get("gates") or ():
        lines.append(f"target {ink('bold', clean(decided.get('target', '')))}")
        lines += _gate_lines(decided.get("gates") or (), ink)
    steps: Sequence[Value] = value.get("steps") or ()
    if steps:
        lines.append("steps")
        lines += [
            f"  {ink('grey', moment(step.get('at'), tz=tz))}  {step_line(step, ink=ink)}" for step in steps
        ]
    files: Sequence[Value] = value.get("files") or ()
    lines += [line.removeprefix("  ") for line in _file_lines(files, ink)]
    return lines


def _request_pairs(request: Value) -> list[tuple[str, str]]:
    """What was asked for, and what vouched for it."""
    package: Value = request.get("package") or {}
    trust: Value = request.get("trust") or {}
    wish: Value = request.get("wish") or {}
    owner: Value = package.get("owner") or {}
    file = clean(package.get("file") or "")
    if owner:
        file += f", owned by {clean(owner.get('user') or 'uid')} ({clean(owner.get('uid', '?'))})"
    asked = [name.replace("_", "-") for name in ("retry_held", "trust_clock") if wish.get(name)]
    return [
        ("file", file),
        ("verified by", clean(trust.get("checked_against") or "")),
        ("signed by", _listed([_signer_text(signer) for signer in trust.get("signers") or ()])),
        ("not counted", _listed([each.get("reason", "?") for each in trust.get("uncounted") or ()])),
        ("trust", trust_text(trust.get("mode")) if trust.get("mode") else ""),
        ("asked for", _listed(asked)),
    ]


def _signer_text(signer: Value) -> str:
    return f"{signer.get('principals', '?')} {signer.get('fingerprint', '?')}"


def _records_text(audit: Value) -> str:
    if not audit:
        return ""
    first, last = clean(audit.get("first", "?")), clean(audit.get("last", "?"))
    which = f"record {first}" if first == last else f"records {first} to {last}"
    return f"{which}, {clean(audit.get('hash', ''))}"


def verified_lines(value: Value, *, ink: Ink = PLAIN) -> list[str]:
    """``patch.verify``, or what `patch verify` found without a supervisor."""
    manifest: Value = value.get("manifest") or value
    requires: Value = manifest.get("requires") or {}
    lines = [ink("green", "the package is well formed and every file matches its digest")]
    lines += _pairs(
        [
            ("patch", patch_title({**manifest, "id": None}, ink=ink)),
            ("id", clean(value.get("id") or "")),
            ("size", size(value.get("size"))),
            ("format", clean(value.get("format") or "")),
            ("targets", _listed(manifest.get("targets")) or "named by whoever applies it"),
            ("regions", _listed(manifest.get("regions"))),
            ("created", clean(manifest.get("created") or "")),
            ("expires", clean(manifest.get("expires") or "")),
            ("requires", ", ".join(f"{clean(k)} {clean(v)}" for k, v in requires.items() if v is not None)),
            ("probation", duration(manifest["probation"]) if manifest.get("probation") is not None else ""),
            ("signatures", _listed(value.get("signatures"))),
            ("signed", _signed_text(value.get("signed"), ink)),
            ("trust", trust_text(value.get("trust"), ink=ink)),
            ("notes", clean(manifest.get("notes") or "")),
        ]
    )
    files: Sequence[Value] = value.get("files") or manifest.get("files") or ()
    lines += [line.removeprefix("  ") for line in _file_lines([_with_size(file) for file in files], ink)]
    lines += [f"{ink('yellow', 'warning')}: {clean(warning)}" for warning in value.get("warnings") or ()]
    return lines


def _signed_text(signed: Value | None, ink: Ink) -> str:
    if not signed:
        return ""
    return (
        clean(signed.get("detail", "")) if signed.get("ok") else ink("red", clean(signed.get("detail", "")))
    )


def signed_lines(value: Value, *, ink: Ink = PLAIN) -> list[str]:
    """What `patch sign` did."""
    key = f"{clean(value.get('fingerprint', ''))} ({clean(value.get('key_type', ''))})"
    return [
        f"signed {ink('bold', clean(value.get('path', '')))}",
        *_pairs(
            [("signature", clean(value.get("signature", ""))), ("key", key), ("sha256", clean(value["id"]))]
        ),
    ]


def _with_size(file: Value) -> Value:
    if file.get("note") or file.get("size") is None:
        return file
    digest = file.get("sha256")
    note = size(file["size"]) + (f", sha256 {short(digest)}" if digest else "")
    return {**file, "note": note}


def built_lines(value: Value, *, ink: Ink = PLAIN) -> list[str]:
    """What `patch build` wrote."""
    lines = [f"wrote {ink('bold', clean(value.get('path', '')))}"]
    lines += _pairs(
        [
            ("patch", patch_title({**(value.get("manifest") or {}), "id": None}, ink=ink)),
            ("size", size(value.get("size"))),
            ("sha256", clean(value.get("id") or "")),
            ("crc32", clean(value.get("crc32") or "")),
            ("signatures", _listed(value.get("signatures"))),
        ]
    )
    files: Sequence[Value] = (value.get("manifest") or {}).get("files") or ()
    lines += [line.removeprefix("  ") for line in _file_lines([_with_size(file) for file in files], ink)]
    return lines
