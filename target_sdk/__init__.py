"""The small package that a program managed by asyncsup imports. See docs/sdk.md."""

from target_sdk.listening import ListenError, Sockets, sockets
from target_sdk.patching import Patch, not_allowed, wait
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
    "__version__",
]
