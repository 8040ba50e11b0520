"""Getting at the files of targets: as their layouts have them, one thread at a time, errors with a code."""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from collections.abc import Iterator

from asyncsup.errors import PatchError, PatchRefusedError, StateError
from asyncsup.patch import fs
from asyncsup.patch.facts import Layout
from asyncsup.patch.overlay_files import OverlayFiles
from asyncsup.patch.space import Need
from asyncsup.patch.statedir import StateDirectory
from asyncsup.patch.target_files import TargetFiles
from asyncsup.patch.tree_files import TreeFiles


class Access:
    """To the targets of one state directory."""

    def __init__(self, state: StateDirectory) -> None:
        self._state = state
        self._locks: defaultdict[str, threading.RLock] = defaultdict(threading.RLock)

    def alone(self, target: str) -> contextlib.AbstractContextManager[object]:
        """Nobody else changes the files of the target meanwhile; may be nested."""
        return self._locks[target]

    def files(self, target: str) -> TargetFiles:
        """The files of a target, in its layout.

        Raises:
            TargetNotFoundError: it has no root, or does not exist.
        """
        row = self._state.database.target(target)
        return (OverlayFiles if row.layout == Layout.OVERLAY.value else TreeFiles)(self._state, row)

    @contextlib.contextmanager
    def reporting(self, target: str, size: int = 0) -> Iterator[None]:
        """Turn what the system says into errors with a code."""
        try:
            yield
        except fs.BlockedPathError as error:
            raise PatchRefusedError(
                f"{target}: {error}, and only real folders are followed", code="gate.path", target=target
            ) from error
        except fs.CannotExchangeError as error:
            root = self.files(target.partition(",")[0]).row.root
            raise PatchRefusedError(
                f"{target}: the file system of {root} cannot swap two names in one step (RENAME_EXCHANGE), "
                "without which a file that is in use cannot be taken over; have the root on another one",
                code="gate.filesystem",
                target=target,
            ) from error
        except OSError as error:
            if error.errno in fs.NO_SPACE:
                raise self._no_room(target, size) from error
            where = f" ({error.filename})" if error.filename else ""
            raise PatchError(
                f"{target}: {error.strerror or error}{where}", code="patch.io_failed", target=target
            ) from error
        except StateError as error:
            if error.error_code == "state.full":
                raise self._no_room(target, size) from error
            raise

    def _no_room(self, target: str, size: int) -> PatchRefusedError:
        files = self.files(target.partition(",")[0])
        places = [place for place in (self._state.path, files.row.root) if place.is_dir()]
        # Whichever of them it was, the system does not say.
        tightest = min(
            fs.rooms(Need(place=place, size=size, inodes=0) for place in places), key=lambda room: room.free
        )
        return files.no_room(tightest)
