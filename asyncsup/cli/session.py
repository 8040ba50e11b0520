"""One invocation of a verb: what was asked, where the answer goes, and the supervisor that gives it."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import asyncsup
from asyncsup.errors import AsyncsupError
from asyncsup.terminal import Output

if TYPE_CHECKING:
    from asyncsup.client import ControlClient

QUERY_SECONDS: Final = 10.0
"""How long a supervisor that is there may take to answer a question."""

SLOW_SECONDS: Final = 1.0
"""After this long without an answer people want to know why."""

GRACE_SECONDS: Final = 5.0
"""How much longer than ``--timeout`` we wait: the supervisor, which keeps to it, has more to say about it."""

EXIT_INTERRUPTED: Final = 130

_NOT_UNDERSTOOD: Final = re.compile(r"unknown (method|parameter) |\w+: missing; ")
"""How it begins what it says of a request that it does not know so."""


class Session:
    """One invocation: its arguments, where it writes to, and its connection, made when it is first used."""

    def __init__(self, args: argparse.Namespace, out: Output) -> None:
        self.args = args
        self.out = out
        self._client: ControlClient | None = None

    @property
    def client(self) -> ControlClient:
        """Raises ConfigError when no supervisor is named."""
        if self._client is None:
            from asyncsup.client import ControlClient  # noqa: PLC0415 - libzmq, which `ask` may do without

            self._client = ControlClient(self._find_endpoint())
        return self._client

    def _find_endpoint(self) -> str:
        from asyncsup.endpoint import find_endpoint  # noqa: PLC0415 - not every verb has a supervisor

        return str(self.args.endpoint or find_endpoint(self.args.config))

    def ask(self, method: str, params: Mapping[str, Any] | None = None, /, **more: Any) -> Any:
        """A question that is answered at once or not at all."""
        if self._client is None:
            endpoint = self._find_endpoint()
            if endpoint.startswith("ipc://"):
                from asyncsup.quick import ask  # noqa: PLC0415 - as above

                return ask(endpoint, method, {**(params or {}), **more}, timeout=QUERY_SECONDS)
        return self.client.call(method, params, timeout=QUERY_SECONDS, **more)

    def explain(self, error: AsyncsupError) -> AsyncsupError:
        """The same error, with the versions in it where a supervisor of another one did not understand us."""
        if error.error_code.startswith("request.") and _NOT_UNDERSTOOD.match(error.message):
            try:
                theirs = str(self.ask("supervisor.info")["version"])
            except AsyncsupError:
                return error  # what it is not known about is not to blame
            if theirs != asyncsup.__version__:
                error.message += f"; {_said_of(theirs, asyncsup.__version__)}"
        return error

    def call(
        self, method: str, params: Mapping[str, Any], names: Sequence[str], *, timeout: float | None
    ) -> Any:
        """Ask for what may take a while, and say so once it does: for what, or for whom, one waits.

        Args:
            names: of the targets that it is done to.
            timeout: see `ControlClient.call`.
        """
        return self.client.call(
            method,
            params,
            timeout=timeout,
            slow_after=SLOW_SECONDS,
            on_slow=(lambda: self._say_what_takes_so_long(method, names)) if self.out.is_live else None,
        )

    def _say_what_takes_so_long(self, method: str, names: Sequence[str]) -> bool:
        """Whether there was something to say."""
        from asyncsup.live import say_what_takes_so_long  # noqa: PLC0415 - most answers come at once

        # A number of instances is written down at once.
        ends = "ends only the waiting" if method == "scale" else "gives up"
        return say_what_takes_so_long(self.client, self.out, names=list(names), ends=ends)

    def sibling(self, args: argparse.Namespace, out: Output) -> Session:
        """Another invocation on the same connection; only this one closes it."""
        other = Session(args, out)
        other._client = self.client
        return other

    def close(self) -> None:
        if self._client is not None:
            self._client.close()


def _said_of(theirs: str, ours: str) -> str:
    """What is to be done about two versions: numbers, with dots between them."""

    def order(version: str) -> list[int]:
        return [int(number) for number in re.findall("[0-9]+", version)]

    said = f"the supervisor is version {theirs}, this is {ours}"
    return f"{said}: `asyncsup reexec` would bring it up to date" if order(theirs) < order(ours) else said


def output_for(args: argparse.Namespace) -> Output:
    return Output(json_wanted=args.json, color=False if args.no_color else None, quiet=args.quiet)


def file_error(error: OSError) -> AsyncsupError:
    """For a file that was named on the command line and could not be read or written."""
    name = f"{error.filename}: " if error.filename else ""
    return AsyncsupError(f"{name}{error.strerror or error}", code="file.failed")
