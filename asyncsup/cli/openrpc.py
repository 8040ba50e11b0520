"""`asyncsup openrpc`: the methods of the control socket, for programs that make clients of it."""

from __future__ import annotations

import json

from asyncsup.cli.session import Session
from asyncsup.cli.verbs import Action
from asyncsup.openrpc import openrpc


def _openrpc(session: Session) -> int:
    document = openrpc()
    session.out.result(document, json.dumps(document, indent=2).splitlines)
    return 0


OPENRPC = Action(_openrpc)
