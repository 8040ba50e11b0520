"""From a command line to a verb and its arguments. Only the verb that was asked for declares its own."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from asyncsup.cli.arguments import TAKE_A_VALUE, new_parser
from asyncsup.cli.verbs import VERBS, VERSION, Verb
from asyncsup.errors import UsageError

EXIT_CODES: Final = """\
exit status:
  0 ok, 1 failed, 2 usage, 3 not running or not ready, 4 no such target, 5 invalid configuration,
  6 not allowed, 7 supervisor not reachable, 8 busy, 124 time-out, 130 interrupted;
  patches: 20 refused by a gate, 21 malformed, checksum or signature wrong,
  22 target refused (nothing changed), 23 applied and rolled back, 24 rollback failed,
  25 failed and left as it is until somebody decides"""


def parse(argv: Sequence[str]) -> tuple[Verb, argparse.Namespace]:
    """Read a command line.

    Raises:
        UsageError: it makes no sense.
        SystemExit: ``--help`` or ``--version`` was asked for, and printed.
    """
    args = argparse.Namespace(config=None, endpoint=None, json=False, no_color=False, quiet=False)
    at = _first_word(argv)
    top = new_parser(
        "asyncsup",
        "Keeps processes running, and patches them while they run.",
        f"{_overview(VERBS)}\n\n{EXIT_CODES}",
    )
    top.usage = "asyncsup [OPTIONS] VERB ..."
    top.add_argument("--version", action="store_true", help="print the version")
    top.parse_args(argv[:at], args)
    if args.version:
        return VERSION, args
    name, verb, rest = "asyncsup", None, list(argv[at:])
    table: Mapping[str, Verb | Mapping[str, Verb]] = VERBS
    while verb is None:
        if rest and rest[0] in {"-h", "--help"} and table is not VERBS:
            new_parser(name, f"The verbs of `{name}`.", _overview(table)).parse_args(rest)
        if not rest or rest[0].startswith("-"):
            raise UsageError(f"a verb is missing; there are {', '.join(table)} (try `{name} --help`)")
        word = rest.pop(0)
        found = table.get(word)
        if found is None:
            raise UsageError(f"{word!r} is not a verb of {name}{_nearest(word, table)} (try `{name} --help`)")
        name += f" {word}"
        if isinstance(found, Verb):
            verb = found
        else:
            table = found
    parser = new_parser(name, verb.summary[0].upper() + verb.summary[1:] + ".", EXIT_CODES)
    verb.configure(parser)
    return verb, parser.parse_args(rest, args)


def _first_word(argv: Sequence[str]) -> int:
    """The position of the verb: the first argument that is no option, nor the value of one."""
    at = 0
    while at < len(argv) and argv[at].startswith("-") and argv[at] != "-":
        at += 2 if argv[at] in TAKE_A_VALUE else 1
    return min(at, len(argv))


def _overview(table: Mapping[str, Verb | Mapping[str, Verb]]) -> str:
    rows = []
    for name, verb in table.items():
        if isinstance(verb, Verb):
            rows.append((name, verb.summary))
        else:
            rows += [(f"{name} {sub}", each.summary) for sub, each in verb.items()]
    column = max(len(name) for name, _ in rows)
    return "\n".join(["verbs:", *(f"  {name:<{column}}  {summary}" for name, summary in rows)])


def _nearest(word: str, known: Iterable[str]) -> str:
    import difflib  # noqa: PLC0415 - only on the way to an error

    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
