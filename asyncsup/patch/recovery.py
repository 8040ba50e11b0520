"""After a crash, before any target is started: every transaction is made either done or undone.

The pointer is the truth. What had not switched is dropped, what had switched without being confirmed is
switched back. May itself be killed at any point and run again.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import TYPE_CHECKING, Literal

from asyncsup.errors import AsyncsupError
from asyncsup.failpoints import failpoint
from asyncsup.patch.access import Access
from asyncsup.patch.database import Phase, TransactionRow
from asyncsup.patch.facts import INTERRUPTED, UNDECIDED, Recovered
from asyncsup.patch.pruning import sweep_generations
from asyncsup.patch.statedir import StateDirectory, state_errors

if TYPE_CHECKING:
    from asyncsup.patch.store import Store

log = logging.getLogger("asyncsup.patch.store")


class Recovery:
    """One recovery; the store is told what is to become of each transaction."""

    def __init__(self, store: Store, state: StateDirectory, access: Access) -> None:
        self._store = store
        self._state = state
        self._database = state.database
        self._access = access

    def recover(self, keep: Collection[int]) -> list[Recovered]:
        """As `Store.recover`."""
        recovered = []
        kept: set[str] = set()
        for row in self._database.unfinished_transactions():
            if row.txn in keep and row.phase is Phase.SWITCHED:
                parts = [part.target for part in self._database.parts(row.txn)]
                kept.update(parts)
                self._store.go_on(row.txn)
                recovered.append(Recovered(txn=row.txn, action="kept", targets=tuple(parts), patch=row.patch))
                continue
            with state_errors():
                recovered.append(self._recover(row))
                failpoint("store.recover.one")
        for target in self._database.targets():
            if target.name in kept:
                continue
            try:
                if target.releasing:
                    self._store.release(target.name)
                    done = Recovered(txn=None, action="released", targets=(target.name,), patch=None)
                    recovered.append(done)
                else:
                    self._access.files(target.name).resume()
                    failpoint("store.recover.resumed")
                sweep_generations(self._state, target.name)
                failpoint("store.recover.swept")
            except (OSError, AsyncsupError) as error:
                # Its files are right all the same; it is no reason for the others not to start.
                log.error("%s: could not be tidied up: %s", target.name, error)  # noqa: TRY400 - foreseen
        self._database.write_notes(durable=False)
        return recovered

    def _recover(self, row: TransactionRow) -> Recovered:
        parts = self._database.parts(row.txn)
        targets = tuple(part.target for part in parts)
        before = {part.target: part.source for part in parts}
        after = {part.target: part.destination for part in parts}

        def does(action: Literal["dropped", "switched_back", "undecided", "completed", "lost"]) -> Recovered:
            """Say what is about to be done: it is written down together with that."""
            log.warning("transaction %d on %s: %s", row.txn, ", ".join(targets), action)
            self._store.record(row.txn, "recover", detail=action.replace("_", " "))
            return Recovered(txn=row.txn, action=action, targets=targets, patch=row.patch)

        try:
            if row.phase is Phase.COMMITTED and not self._state.shows(before):
                done = does("completed")
                self._store.tidy(row.txn)
                return done
            if row.phase is Phase.COMMITTED:
                # Only a disk that lied about a sync can bring this about.
                done = does("lost")
                self._database.advance(row.txn, Phase.SWITCHED_BACK, "txn.switched_back")
                why = "it was confirmed, but the disk had not kept the switch"
                self._store.finish(row.txn, verdict="rolled_back", error=why, code="state.lost")
                return done
            if row.by_hand and self._state.shows(after):
                done = does("undecided")
                if row.state != UNDECIDED:
                    why = "the supervisor ended before it was confirmed"
                    self._store.leave_undecided(row.txn, error=why, code=INTERRUPTED)
                return done
            switched = row.phase is not Phase.BEGUN or self._state.shows(after)
            why = "the supervisor ended " + ("before it was confirmed" if switched else "before the switch")
            done = does("switched_back" if switched else "dropped")
            self._store.finish(row.txn, verdict="rolled_back", error=why, code=INTERRUPTED)
            return done
        except (OSError, AsyncsupError) as error:
            if row.phase is not Phase.COMMITTED and self._state.shows(after):
                raise  # The files are those of a patch nobody has confirmed.
            # The files are right; what is left over keeps the targets from being patched, no more.
            log.error("transaction %d: could not be tidied up: %s", row.txn, error)  # noqa: TRY400 - foreseen
            self._store.record(row.txn, "recover", detail=f"could not be tidied up: {error}")
            return Recovered(
                txn=row.txn,
                action="completed" if row.phase is Phase.COMMITTED else "dropped",
                targets=targets,
                patch=row.patch,
            )
