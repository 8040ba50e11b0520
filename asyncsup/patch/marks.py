"""What is remembered of a target for good, so that no older patch is taken for a newer one. Pure."""

from __future__ import annotations

import msgspec


class Marks(msgspec.Struct, frozen=True, kw_only=True):
    """What no patch may go below.

    Attributes:
        highest: the highest build a confirmed patch has brought it to, or what a downgrade made of that.
        floor: the highest ``build_floor`` of a confirmed patch; not even a downgrade goes below it.
    """

    highest: int
    floor: int | None

    def __str__(self) -> str:
        return f"build {self.highest}" + ("" if self.floor is None else f" with the floor {self.floor}")


def raised(before: Marks | None, build: int, *, floor: int | None, downgrade: bool) -> Marks:
    """The marks once a patch to `build` is confirmed. Only a downgrade lowers the highest build, to its own;
    nothing lowers the floor, and a rollback changes neither."""
    if before is None:
        return Marks(highest=build, floor=floor)
    floors = [each for each in (before.floor, floor) if each is not None]
    return Marks(highest=build if downgrade else max(before.highest, build), floor=max(floors, default=None))
