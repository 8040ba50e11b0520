"""What all instances share, and what each of them is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from asyncsup.cgroups import Cgroups
from asyncsup.channel import TargetChannel
from asyncsup.events import EventStream
from asyncsup.journal import Journal
from asyncsup.keeper_link import KeeperLink
from asyncsup.slot_output import LogFiles
from asyncsup.sockets import ManagedSockets

if TYPE_CHECKING:
    from asyncsup.instance import Instance


class RootFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What an instance is told about the resources it is started on."""

    build: int
    generation: int | None
    patch: str | None
    """The one that has made this generation, if one has."""
    current: Path | None
    """The path that always leads to the generation in force; None for a target without a root."""


class Runtime(msgspec.Struct, kw_only=True):
    """What all instances share."""

    events: EventStream
    channel: TargetChannel
    keeper: KeeperLink
    cgroups: Cgroups
    journal: Journal
    sockets: ManagedSockets
    target_endpoint: str
    notify_path: Path
    runtime_dir: Path
    state_dir: Path
    logs: Path
    """The folder of the log files that are configured to be nowhere else."""
    fifos: Path
    """The folder of the FIFOs that output comes by."""
    environ: Mapping[str, str]
    inheritable: Mapping[str, str]
    root_facts: Callable[[str], RootFacts]
    essential_ended: Callable[[Instance], None]
    hear_last_words: Callable[[], None]
    """Act upon what programs have said to the notify socket so far."""
    groups: dict[int, Instance] = msgspec.field(default_factory=dict)
    """The process groups that may speak to the notify socket, and for whom."""
    log_files: LogFiles = msgspec.field(default_factory=LogFiles)
