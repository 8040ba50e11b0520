"""What is asked of the overseer: that a patch be applied, or that something be taken back."""

from __future__ import annotations

from typing import Any

import msgspec

from asyncsup.actor import Actor
from asyncsup.patch.plan import Policy
from asyncsup.patch.way_back import Extent
from asyncsup.target import Target


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """What the sender of a patch wants besides having it applied.

    Attributes:
        target: the only target to patch, or the one that a prototype package is for.
        wait_busy: wait for targets that something else is being done to, instead of refusing.
        retry_held: apply it although it was rolled back before.
        trust_clock: the clock is right, whatever the time has been before.
        drift: what becomes of files that are not what the patch was made for; None: as configured.
    """

    actor: Actor
    target: str | None = None
    wait_busy: bool = True
    retry_held: bool = False
    trust_clock: bool = False
    drift: Policy | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "retry_held": self.retry_held,
            "trust_clock": self.trust_clock,
            "drift": self.drift,
        }

    def policy_for(self, target: Target) -> Policy:
        return target.config.patch.drift if self.drift is None else self.drift


class WayBack(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be taken back.

    Attributes:
        reference: a target; or a patch, by a transaction's number or the beginning of its id.
        extent: how far, for a target.
        only: on no other target, though what is taken back covers others.
        together: on every other target as well.
    """

    reference: str
    extent: Extent
    only: bool = False
    together: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "reference": self.reference,
            "build": self.extent.build,
            "generation": self.extent.generation,
            "only": self.only,
            "together": self.together,
        }
