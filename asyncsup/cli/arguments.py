"""How arguments are declared: the parser, the types of values, and the options that several verbs take."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from typing import Final, NoReturn, TypeVar

from asyncsup.errors import UsageError

Value = TypeVar("Value")

TAKE_A_VALUE: Final = frozenset({"-c", "--config", "--endpoint"})
"""Those of the options of every verb that another word belongs to."""


# --- the parser ---------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Raises what argparse would print, so that a usage error looks like every other error."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (try `{self.prog} --help`)")


def new_parser(prog: str, description: str = "", epilog: str | None = None) -> Parser:
    """One with the options that every verb takes, before or after it."""
    parser = Parser(
        prog=prog,
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=_formatter,
    )
    add, keep = parser.add_argument, argparse.SUPPRESS
    add("-c", "--config", metavar="FILE", default=keep, help="the configuration file")
    add("--endpoint", metavar="URL", default=keep, help="the supervisor: ipc://PATH, or tcp://HOST:PORT")
    add("--json", action="store_true", default=keep, help="results and errors as JSON on stdout")
    add("--no-color", action="store_true", default=keep, help="no colour, as NO_COLOR=1")
    add("-q", "--quiet", action="store_true", default=keep, help="no text but errors")
    return parser


def _formatter(prog: str) -> argparse.HelpFormatter:
    # argparse makes one for every argument, and without a width imports shutil, and so bz2 and lzma, for it.
    columns = os.environ.get("COLUMNS", "")
    width = int(columns) if columns.isdecimal() and int(columns) > 40 else 100
    return argparse.RawDescriptionHelpFormatter(prog, width=width - 2)


# --- types --------------------------------------------------------------------------------------------------


def seconds(text: str) -> float:
    """``10``, ``1.5``, or what the configuration takes: ``500ms``, ``10s``, ``2m``, ``1h30m``."""
    units = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        text += "s"
    if re.fullmatch(r"(?! )( ?[0-9]+(\.[0-9]+)? ?(ms|s|m|h|d))+", text):
        value = sum(float(number) * units[unit] for number, unit in re.findall(r"([0-9.]+) ?([a-z]+)", text))
        if value <= 365 * units["d"]:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a duration such as 10s, 500ms or 2m, up to 365 days")


def matching(pattern: str, otherwise: str, convert: Callable[[str], Value]) -> Callable[[str], Value]:
    """A type whose values match `pattern` as a whole; of any other text it is said that it is `otherwise`."""

    def read(text: str) -> Value:
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"{text!r} is {otherwise}")
        return convert(text)

    return read


natural: Final = matching(r"[0-9]{1,4}", "no number from 0 to 9999", int)
serial: Final = matching(r"[0-9]{1,15}", "no number", int)
"""Of what is counted from 1 on: records, events, transactions."""


# --- options that several verbs take ------------------------------------------------------------------------


def names_argument(parser: argparse.ArgumentParser, nargs: str, *, more: str = "") -> None:
    """``NAME ...``, which stands for targets and their instances."""
    text = f"targets, groups, instances (web:0) or patterns (web*); all means every target{more}"
    parser.add_argument("names", nargs=nargs, metavar="NAME", help=text)


def wait_options(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--no-wait", dest="wait", action="store_false", help=f"do not wait for {what}")
    timeout_option(parser)


def timeout_option(
    parser: argparse.ArgumentParser,
    text: str = "give up after this long (10s, 2m)",
    *,
    default: float | None = None,
) -> None:
    parser.add_argument("--timeout", type=seconds, default=default, metavar="TIME", help=text)


def digest_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sha256", metavar="HEX", help="what the package's SHA-256 must be")
    parser.add_argument("--crc32", metavar="NUMBER", help="what a prototype package's CRC-32 must be")
