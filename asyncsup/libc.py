"""Calls of the C library that Python does not have."""

from __future__ import annotations

import ctypes
import os
from typing import Final

libc: Final = ctypes.CDLL(None, use_errno=True)


def checked(result: int) -> int:
    """What a call has returned, which is negative when it has failed. Raises OSError, by its errno."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
