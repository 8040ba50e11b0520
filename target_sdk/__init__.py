"""The small package that a program managed by asyncsup imports. See docs/sdk.md."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from target_sdk.handover import State, Successor
    from target_sdk.listening import ListenError, Sockets, sockets
    from target_sdk.patching import HandoverError, Patch, not_allowed, wait
    from target_sdk.protocol import PrepareAnswer
    from target_sdk.snapshot import Snapshot
    from target_sdk.target import Target, __version__

__all__ = [
    "Target",
    "Patch",
    "wait",
    "not_allowed",
    "PrepareAnswer",
    "Snapshot",
    "sockets",
    "Sockets",
    "ListenError",
    "Successor",
    "State",
    "HandoverError",
    "__version__",
]


_HOME = {
    "Target": "target",
    "__version__": "target",
    "Patch": "patching",
    "wait": "patching",
    "not_allowed": "patching",
    "HandoverError": "patching",
    "PrepareAnswer": "protocol",
    "Snapshot": "snapshot",
    "sockets": "listening",
    "Sockets": "listening",
    "ListenError": "listening",
    "Successor": "handover",
    "State": "handover",
}


def __getattr__(name: str) -> object:
    """A name is imported when it is asked for: a program starts with this package, and a supervisor with the
    protocol alone."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
