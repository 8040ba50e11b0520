"""`asyncsup keys`: the keys of those who connect over TCP."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asyncsup.cli.session import Session
from asyncsup.cli.settings import read_config
from asyncsup.cli.verbs import Action
from asyncsup.client_keys import ENV_SUPERVISOR_KEY, keys_folder
from asyncsup.config import SupervisorConfig
from asyncsup.errors import UsageError
from asyncsup.keys import AllowedKey, KeyStore, generate, load_pair, public_key


def _generate(session: Session) -> int:
    args, out = session.args, session.out
    if args.name is not None:
        return _generate_own(session)
    store = _store(read_config(session).supervisor)
    if args.folder is not None:
        raise UsageError("--folder is for a key of your own: give it a name")
    secret = generate(store.folder, KeyStore.SUPERVISOR)
    value = {"path": str(secret), "public_key": load_pair(secret).public.decode()}
    out.result(value, lambda: _supervisor_lines(value))
    return 0


def _generate_own(session: Session) -> int:
    """Needs no configuration: it is made where no supervisor is."""
    args = session.args
    secret = generate(Path(args.folder or keys_folder()), args.name)
    value = {"name": args.name, "path": str(secret), "public_key": load_pair(secret).public.decode()}
    session.out.result(value, lambda: _generated_lines(value))
    return 0


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="a key of your own by this name")
    parser.add_argument("--folder", metavar="DIR", help="where (default: ~/.config/asyncsup/keys)")


def _list(session: Session) -> int:
    settings = read_config(session).supervisor
    value = _listed(_store(settings), settings.listen)
    session.out.result(value, lambda: _list_lines(value))
    return 1 if value["problems"] else 0


def _allow(session: Session) -> int:
    args = session.args
    key = _store(read_config(session).supervisor).allow(args.name, args.role, public_key(args.key))
    session.out.result(_described(key), lambda: [f"{key.name} may {key.role}"])
    return 0


def _allow_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="whose key it is")
    parser.add_argument("key", metavar="PUBLIC_KEY", help="40 characters, or a file with them")
    parser.add_argument(
        "--role",
        choices=("view", "operate", "patch"),
        default="view",
        help="what they may do: look (default), also start and stop, or also patch",
    )


def _revoke(session: Session) -> int:
    key = _store(read_config(session).supervisor).revoke(session.args.name)
    session.out.result(_described(key), lambda: [f"{key.name} may not connect any more"])
    return 0


def _revoke_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="whose key it was")


def _store(settings: SupervisorConfig) -> KeyStore:
    return KeyStore(settings.state_dir / "keys")


def _described(key: AllowedKey) -> dict[str, Any]:
    return {"name": key.name, "role": key.role, "public_key": key.public}


def _listed(store: KeyStore, listen: str | None) -> dict[str, Any]:
    allowed = store.allowed()
    own = store.own_pair().public.decode() if store.secret_file.exists() else None
    return {
        "listen": listen,
        "supervisor": own,
        "keys": [_described(key) for key in allowed.keys.values()],
        "problems": list(allowed.problems),
    }


def _generated_lines(value: Mapping[str, Any]) -> list[str]:
    return [
        f"wrote {value['path']}",
        "on the supervisor's machine:",
        f"  asyncsup keys allow {value['name']} --role operate '{value['public_key']}'",
    ]


def _supervisor_lines(value: Mapping[str, Any]) -> list[str]:
    return [
        f"wrote {value['path']}",
        "for clients:",
        f"  export {ENV_SUPERVISOR_KEY}='{value['public_key']}'",
    ]


def _list_lines(value: Mapping[str, Any]) -> list[str]:
    own = value["supervisor"] or "none; `asyncsup keys generate` makes one"
    lines = [
        f"listens at   {value['listen'] or 'nothing: supervisor.listen is not set'}",
        f"its own key  {own}",
    ]
    if value["keys"]:
        width = max(len("NAME"), *(len(key["name"]) for key in value["keys"]))
        lines += ["", f"{'NAME':<{width}}  ROLE     PUBLIC KEY"]
        lines += [f"{k['name']:<{width}}  {k['role']:<7}  {k['public_key']}" for k in value["keys"]]
    else:
        lines.append("nobody is allowed yet; `asyncsup keys allow NAME PUBLIC_KEY` does")
    return lines + [f"ignored: {problem}" for problem in value["problems"]]


GENERATE = Action(_generate, _generate_arguments)
LIST = Action(_list)
ALLOW = Action(_allow, _allow_arguments)
REVOKE = Action(_revoke, _revoke_arguments)
