"""Completion for shells: a script that asks `asyncsup complete` at each Tab.

What can come next is known from the verbs themselves, and names of targets from the supervisor, if there is
one; so nothing here has to be kept up with them.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from typing import Final

from asyncsup.cli.arguments import TAKE_A_VALUE, new_parser
from asyncsup.cli.session import Session, output_for
from asyncsup.cli.verbs import VERBS, Action, Verb
from asyncsup.errors import AsyncsupError

_SCRIPTS: Final[Mapping[str, str]] = {
    "bash": """\
_asyncsup() {
    local IFS=$'\\n' words=("${COMP_WORDS[@]:1:COMP_CWORD}")
    COMPREPLY=($(asyncsup complete -- "${words[@]}" 2>/dev/null))
    [[ ${#COMPREPLY[@]} -eq 0 ]] && compopt -o default
    # bash takes a colon, as in web:0, for the end of a word.
    declare -F __ltrim_colon_completions >/dev/null && __ltrim_colon_completions "${words[-1]}"
}
complete -F _asyncsup asyncsup
""",
    "zsh": """\
#compdef asyncsup
_asyncsup() {
    local -a found
    found=("${(@f)$(asyncsup complete -- "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    if [[ -n "$found" ]]; then compadd -a found; else _files; fi
}
compdef _asyncsup asyncsup
""",
    "fish": """\
function __asyncsup
    set -l words (commandline -opc) (commandline -ct)
    asyncsup complete -- $words[2..-1] 2>/dev/null
end
complete -c asyncsup -a '(__asyncsup)'
""",
}


def _candidates(words: Sequence[str], session: Session) -> list[str]:
    """What the last word can become; none where that is a path, or something to make up."""
    *before, last = words or [""]
    table: Mapping[str, Verb | Mapping[str, Verb]] = VERBS
    verb: Verb | None = None
    name = "asyncsup"
    rest: list[str] = []
    skip = False
    for word, following in itertools.zip_longest(before, before[1:]):
        _take_up(word, following, session.args)
        if skip:
            skip = False
        elif verb is not None:
            rest.append(word)
        elif word in TAKE_A_VALUE:
            skip = True
        elif not word.startswith("-"):
            found = table.get(word)
            if found is None:
                return []
            name += f" {word}"
            if isinstance(found, Verb):
                verb = found
            else:
                table = found
    if skip:
        return []
    parser = new_parser(name)
    if verb is None:
        return _beginning(last, [*table, *_options(parser)] if last.startswith("-") else list(table))
    verb.configure(parser)
    return _beginning(last, _of_verb(parser, rest, last, session))


def _take_up(word: str, following: str | None, args: argparse.Namespace) -> None:
    """Which supervisor is meant is typed before the name of one of its targets."""
    option, equals, value = word.partition("=")
    if option in TAKE_A_VALUE:
        name = "endpoint" if option == "--endpoint" else "config"
        setattr(args, name, value if equals else following)


def _of_verb(parser: argparse.ArgumentParser, rest: Sequence[str], last: str, session: Session) -> list[str]:
    actions = {option: action for action in parser._actions for option in action.option_strings}
    if rest and (waiting := actions.get(rest[-1])) is not None and waiting.nargs != 0:
        return [str(choice) for choice in waiting.choices or ()]
    if last.startswith("-"):
        return _options(parser)
    wanted = [action for action in parser._actions if not action.option_strings]
    if not wanted:
        return []
    # Behind the first of several names there may be another one, or what comes after them.
    ends = [index for index, action in enumerate(wanted) if action.nargs in {"+", "*"}] or [len(wanted) - 1]
    action = wanted[min(sum(not word.startswith("-") for word in rest), ends[0])]
    if action.choices:
        return [str(choice) for choice in action.choices]
    return _names(session) if action.dest in {"names", "name", "target"} else []


def _names(session: Session) -> list[str]:
    try:
        targets = session.ask("status")["targets"]
        groups = session.ask("supervisor.info").get("groups", ())
    except AsyncsupError:
        return []
    several = [
        each["name"] for target in targets for each in target["instances"] if len(target["instances"]) > 1
    ]
    return ["all", *(target["name"] for target in targets), *groups, *several]


def _options(parser: argparse.ArgumentParser) -> list[str]:
    return sorted(
        option for action in parser._actions for option in action.option_strings if option.startswith("--")
    )


def _beginning(last: str, words: Sequence[str]) -> list[str]:
    return [word for word in words if word.startswith(last)]


def _complete(session: Session) -> int:
    """Print what the last word can become, one a line."""
    args = session.args
    typed = Session(argparse.Namespace(config=None, endpoint=None), output_for(args))
    try:
        for word in _candidates(args.words, typed):
            session.out.verbatim(f"{word}\n")
    finally:
        typed.close()
    return 0


def _complete_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="WORD", help="what was typed behind `asyncsup`, after --")


def _completion(session: Session) -> int:
    session.out.verbatim(_SCRIPTS[session.args.shell])
    return 0


def _completion_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="which one")


COMPLETION = Action(_completion, _completion_arguments)
COMPLETE = Action(_complete, _complete_arguments)
