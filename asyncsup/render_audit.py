"""The audit as text for people. Pure; see `asyncsup.render`."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import tzinfo
from typing import Final

from asyncsup.render import PLAIN, Ink, Value, clean, moment, patch_title, plural, size, step_line

_SAID_ELSEWHERE: Final = frozenset({"seq", "at", "event", "hash", "prev", "txn", "by", "asked_by"})


def record_lines(record: Value, *, ink: Ink = PLAIN, tz: tzinfo | None = None) -> list[str]:
    """One record, in one line; ``--json`` has all of it."""
    txn = f"txn {clean(record['txn'])}" if record.get("txn") is not None else ""
    seq = f"{clean(record.get('seq', '?')):>6}"
    when = ink("grey", moment(record.get("at"), date=True, tz=tz))
    event = ink("cyan", f"{clean(record.get('event', '?')):<18}")
    parts = (seq, when, event, txn, _who(record), _what(record, ink))
    return ["  ".join(part for part in parts if part).rstrip()]


def _who(record: Value) -> str:
    by = record.get("by")
    if record.get("asked_by"):
        return clean(record["asked_by"])
    if isinstance(by, Mapping):
        return clean(by.get("user") or by.get("via") or "")
    return ""


def _what(record: Value, ink: Ink) -> str:
    event = record.get("event")
    if event in {"txn.begun", "txn.attempted"}:
        verdict = clean(record.get("verdict") or "")
        why = f": {clean(record['error'])} [{clean(record.get('code'))}]" if record.get("error") else ""
        title = patch_title({**record, "id": None}, ink=ink)
        return ", ".join(part for part in (clean(record.get("action") or ""), title, verdict + why) if part)
    if event == "txn.step":
        took = record.get("took_us")
        return step_line({**record, "took": took / 1e6 if isinstance(took, int) else None}, ink=ink)
    if event == "txn.ended":
        why = f": {clean(record['error'])} [{clean(record.get('code'))}]" if record.get("error") else ""
        return clean(record.get("verdict") or "") + why
    return ", ".join(
        f"{clean(key)} {_fact(value)}"
        for key, value in record.items()
        if key not in _SAID_ELSEWHERE and not _is_empty(value)
    )


def _fact(value: object) -> str:
    if isinstance(value, Mapping):
        facts = (f"{clean(key)} {_fact(item)}" for key, item in value.items() if not _is_empty(item))
        return f"({', '.join(facts)})"
    if isinstance(value, list):
        return f"[{', '.join(_fact(item) for item in value)}]"
    return clean(value)


def _is_empty(value: object) -> bool:
    return value is None or value is False or value in ("", [], {})


def judgement_lines(value: Value, *, ink: Ink = PLAIN) -> list[str]:
    """What became of an examination of the audit."""
    records = plural(int(value.get("records") or 0), "record")
    if value.get("ok"):
        lines = [ink("green", f"the chain holds: {records}")]
    else:
        lines = [ink("red", f"the audit is not as it was written ({records})")]
    faults = value.get("faults") or ()
    lines += [f"  {clean(fault.get('message', '?'))} [{clean(fault.get('code', '?'))}]" for fault in faults]
    unsaid = int(value.get("fault_count") or 0) - len(faults)
    if unsaid > 0:
        lines.append(f"  and {unsaid} more")
    head: Value = value.get("head") or {}
    if head:
        when = moment(value.get("at"), date=True)
        lines.append(f"head: record {clean(head.get('seq', '?'))}, {when}, {clean(head.get('hash', ''))}")
    return lines


def doctor_lines(value: Value, *, ink: Ink = PLAIN) -> list[str]:
    """What an examination of a state directory has found, and what was mended."""
    checked: Value = value.get("checked") or {}
    counts = [
        plural(int(checked.get(name) or 0), name.removesuffix("s"))
        for name in ("targets", "generations", "files", "records")
    ]
    lines = [f"{clean(value.get('state_dir', ''))}: {', '.join(counts)}, {size(checked.get('size'))}"]
    if value.get("running") is not None:
        lines.append(f"a supervisor is running, process {clean(value['running'])}")
    lines += [
        f"{ink('green', 'mended')}   {_finding(each)}: {clean(each.get('done', ''))}"
        for each in value.get("mended") or ()
    ]
    for kind, colour in (("problem", "red"), ("warning", "yellow")):
        for each in value.get(f"{kind}s") or ():
            lines.append(f"{ink(colour, kind)}  {_finding(each)}")
            if each.get("left_because"):
                lines.append(f"         left, because {clean(each['left_because'])}")
    head: Value = value.get("head") or {}
    if head:
        lines.append(f"audit: head {clean(head.get('seq', '?'))} {clean(head.get('hash', ''))}")
    problems = len(value.get("problems") or ())
    if problems:
        lines.append(f"verdict: {ink('red', plural(problems, 'problem') + ' left')}")
    else:
        lines.append(f"verdict: {ink('green', 'in order')}")
    return lines


def _finding(value: Value) -> str:
    where = [clean(value[key]) for key in ("target", "path") if value.get(key)]
    if value.get("generation") is not None and value.get("path"):
        where.append(f"(generation {clean(value['generation'])})")
    place = f"{' '.join(where)} " if where else ""
    return f"{place}{clean(value.get('message', '?'))} [{clean(value.get('code', '?'))}]"
