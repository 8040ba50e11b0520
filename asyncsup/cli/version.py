"""`asyncsup version`, which is also `asyncsup --version`."""

from __future__ import annotations

from asyncsup import __version__
from asyncsup.cli.session import Session
from asyncsup.cli.verbs import Action


def _version(session: Session) -> int:
    session.out.result({"version": __version__}, lambda: [f"asyncsup {__version__}"])
    return 0


VERSION = Action(_version)
