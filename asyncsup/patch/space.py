"""Is there room? What a patch needs of each file system, and what is free there. Pure; `fs.rooms` looks."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

BLOCK_BYTES: Final = 4096
"""What a folder, a link or the last piece of a file takes at least."""

MARGIN_BYTES: Final = 1 << 20
MARGIN_INODES: Final = 64
"""For the database, the pointer's sets, and whatever else is written at the same time."""


class Need(msgspec.Struct, frozen=True, kw_only=True):
    """What is going to be written below `place`, a folder that exists; ``size`` in bytes."""

    place: Path
    size: int
    inodes: int


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """One file system: what is needed of it, margin included, and what is free for anybody.

    Attributes:
        place: a folder on it, for people.
        free_inodes: None where their number is not fixed.
    """

    place: Path
    needed: int
    free: int
    needed_inodes: int
    free_inodes: int | None

    @property
    def short(self) -> str | None:
        """What there is not enough of; None when there is."""
        if self.needed > self.free:
            return self.sizes
        if self.free_inodes is not None and self.needed_inodes > self.free_inodes:
            return f"{self.needed_inodes} inodes are needed, {self.free_inodes} are free"
        return None

    @property
    def sizes(self) -> str:
        return f"{amount(self.needed)} are needed, {amount(self.free)} are free"


def amount(size: int) -> str:
    """Bytes for people: ``812 B``, ``8.4 MB``."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.{0 if unit == 'B' else 1}f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
