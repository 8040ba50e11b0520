"""The small package that a program managed by asyncsup imports. See docs/sdk.md."""

from typing import TYPE_CHECKING

from target_sdk.patching import HandoverError, Patch, not_allowed, wait
from target_sdk.protocol import PrepareAnswer
from target_sdk.snapshot import Snapshot
from target_sdk.target import Target, __version__

if TYPE_CHECKING:
    from target_sdk.handover import State, Successor
    from target_sdk.listening import ListenError, Sockets, sockets

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


def __getattr__(name: str) -> object:
    """What needs `socket` is imported when it is asked for: programs start with this package."""
    if name in {"sockets", "Sockets", "ListenError"}:
        from target_sdk import listening  # noqa: PLC0415

        return getattr(listening, name)
    if name in {"Successor", "State"}:
        from target_sdk import handover  # noqa: PLC0415

        return getattr(handover, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
