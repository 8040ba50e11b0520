"""What another configuration changes: who is added, removed, restarted, or told nothing at all. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from asyncsup.config.settings import Config, options


class TargetChange(msgspec.Struct, frozen=True, kw_only=True):
    """What is different about a target that is in both.

    Attributes:
        keys: all of them, with dots: ``log.max_size``.
        at_start: those among them that a running process keeps from its start; with any, it is restarted.
    """

    keys: tuple[str, ...]
    at_start: tuple[str, ...]


class Changes(msgspec.Struct, frozen=True, kw_only=True):
    """What lies between two configurations.

    Attributes:
        changed: by target; those that are not in here are the same, whatever else is.
        immediate: keys of `[supervisor]`, `[patch]`, sockets and groups that take effect at once.
        postponed: keys that only another supervisor process takes up.
    """

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: Mapping[str, TargetChange]
    immediate: tuple[str, ...]
    postponed: tuple[str, ...]

    @property
    def is_empty(self) -> bool:
        return not any((self.added, self.removed, self.changed, self.immediate, self.postponed))


def compare(before: Config, after: Config, *, lost: Collection[str] = ()) -> Changes:
    """What has to be done to get from one to the other.

    Args:
        lost: sockets that are to be bound anew, wherever they are to listen.
    """
    sockets = {
        name: (
            dict(_differences(before.sockets[name], socket)) if name in before.sockets else {"listen": True}
        )
        | ({"listen": True} if name in lost else {})
        for name, socket in after.sockets.items()
    }
    changed = {}
    for name, target in after.targets.items():
        if name not in before.targets:
            continue
        differences = dict(_differences(before.targets[name], target))
        # A process has the socket it was started with, wherever the configuration says it is by now.
        differences |= {
            f"socket.{socket}.listen": True for socket in target.sockets if "listen" in sockets[socket]
        }
        if differences:
            at_start = tuple(key for key, at_start in differences.items() if at_start)
            changed[name] = TargetChange(keys=tuple(differences), at_start=at_start)
    own = {
        f"{table}.{key}": at_start
        for table in ("supervisor", "patch")
        for key, at_start in _differences(getattr(before, table), getattr(after, table))
    }
    groups = [
        f"group.{name}"
        for name in {**before.groups, **after.groups}
        if before.groups.get(name) != after.groups.get(name)
    ]
    bound = [f"socket.{name}.{key}" for name, differences in sockets.items() for key in differences]
    bound += [f"socket.{name}" for name in before.sockets if name not in after.sockets]
    return Changes(
        added=tuple(name for name in after.targets if name not in before.targets),
        removed=tuple(name for name in before.targets if name not in after.targets),
        changed=MappingProxyType(changed),
        immediate=(*(key for key, at_start in own.items() if not at_start), *groups, *bound),
        postponed=tuple(key for key, at_start in own.items() if at_start),
    )


def _differences(before: Any, after: Any, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """The keys that differ, and whether each takes effect only at a start."""
    settings: type = type(after)
    known = options(settings)
    for name in after.__struct_fields__:
        old, new = getattr(before, name), getattr(after, name)
        if isinstance(new, msgspec.Struct):
            yield from _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            yield f"{prefix}{name}", known[name].at_start
