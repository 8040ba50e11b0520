"""The table of all verbs: what each is for, and where what it does is found.

The modules are named, not imported: an invocation pays only for the one it needs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from asyncsup.cli.session import Session


# Plain classes: a NamedTuple compiles its annotations, and `asyncsup status` would wait for it.


class Action:
    """What a verb does (returns the exit status), and how it declares its own arguments, if it has any."""

    __slots__ = ("configure", "run")

    def __init__(
        self,
        run: Callable[[Session], int],
        configure: Callable[[argparse.ArgumentParser], None] = lambda _: None,
    ) -> None:
        self.run = run
        self.configure = configure


class Verb:
    """One command.

    Args:
        summary: its line in the overview.
        where: its `Action`, as ``module.NAME`` in this package.
    """

    __slots__ = ("summary", "where")

    def __init__(self, summary: str, where: str) -> None:
        self.summary = summary
        self.where = where

    @property
    def action(self) -> Action:
        module, _, name = self.where.rpartition(".")
        action = getattr(import_module(f"asyncsup.cli.{module}"), name)
        assert isinstance(action, Action)
        return action

    def configure(self, parser: argparse.ArgumentParser) -> None:
        self.action.configure(parser)

    def run(self, session: Session) -> int:
        return self.action.run(session)


VERSION: Final = Verb("print the version", "version.VERSION")
VERBS: Final[Mapping[str, Verb | Mapping[str, Verb]]] = {
    "serve": Verb("run the supervisor in the foreground", "serve.SERVE"),
    "status": Verb("show what runs", "targets.STATUS"),
    "show": Verb("show everything about a target, or about the supervisor", "targets.SHOW"),
    "start": Verb("start targets", "targets.START"),
    "stop": Verb("stop targets and everything they started", "targets.STOP"),
    "restart": Verb("stop and start targets", "targets.RESTART"),
    "reload": Verb("have targets read their resources again", "targets.RELOAD"),
    "scale": Verb("have more or fewer instances of a target", "targets.SCALE"),
    "signal": Verb("send a signal to targets", "targets.SIGNAL"),
    "logs": Verb("print what targets write", "logs.LOGS"),
    "events": Verb("follow what happens", "events.EVENTS"),
    "wait": Verb("wait until targets are ready, running or stopped", "targets.WAIT"),
    "shutdown": Verb("stop all targets and the supervisor", "supervisor.SHUTDOWN"),
    "reexec": Verb("replace the supervisor's program and keep what runs", "supervisor.REEXEC"),
    "config": {
        "check": Verb("check the configuration", "configuration.CHECK"),
        "plan": Verb("say what `config apply` would change", "configuration.PLAN"),
        "apply": Verb("take up the configuration file; only what changed is touched", "configuration.APPLY"),
        "schema": Verb("print the JSON Schema of asyncsup.toml, for editors", "configuration.SCHEMA"),
    },
    "patch": {
        "build": Verb("make a package out of two folders", "build.BUILD"),
        "sign": Verb("sign a package with an SSH key", "packages.SIGN"),
        "verify": Verb("check a package, without a supervisor", "packages.VERIFY"),
        "plan": Verb("say what applying a package would do", "applying.PLAN"),
        "apply": Verb("apply a package, or all of the inbox", "applying.APPLY"),
        "list": Verb("list what lies in the inbox", "patches.LIST"),
        "history": Verb("list what was applied and rolled back", "patches.HISTORY"),
        "show": Verb("show one transaction, step by step", "patches.SHOW"),
        "drift": Verb("list files that are not as patches have left them", "patches.DRIFT"),
        "commit": Verb("commit a patch that waits for it", "applying.COMMIT"),
        "abort": Verb("end a patch that is under way", "applying.ABORT"),
        "rollback": Verb("go back to the build before", "applying.ROLLBACK"),
        "prune": Verb("remove old generations nobody reads", "patches.PRUNE"),
    },
    "target": {
        "release": Verb("give up patching a target", "patches.RELEASE"),
    },
    "doctor": Verb("check a state directory, and mend it", "doctor.DOCTOR"),
    "audit": {
        "verify": Verb("check that the audit is as it was written", "audit.VERIFY"),
        "list": Verb("list what was written down", "audit.LIST"),
        "export": Verb("print every record, as it is hashed", "audit.EXPORT"),
    },
    "keys": {
        "generate": Verb("make a key for the supervisor, or one of your own", "keys.GENERATE"),
        "list": Verb("list who may connect over TCP", "keys.LIST"),
        "allow": Verb("let somebody connect over TCP", "keys.ALLOW"),
        "revoke": Verb("let somebody connect no more", "keys.REVOKE"),
    },
    "console": Verb("open the Patch Overseer prompt", "console.CONSOLE"),
    "init": Verb("write a commented asyncsup.toml", "configuration.INIT"),
    "demo": Verb("play the four patch cases on a real target", "demo.DEMO"),
    "completion": Verb("print the script for completion in a shell", "completion.COMPLETION"),
    "complete": Verb("say what can come next, for that script", "completion.COMPLETE"),
    "openrpc": Verb("print the OpenRPC description of the control API", "openrpc.OPENRPC"),
    "version": VERSION,
}
