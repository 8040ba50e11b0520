"""`asyncsup keys`: the keys of those who connect over TCP."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asyncsup.client_keys import ENV_SUPERVISOR_KEY, keys_folder
from asyncsup.errors import UsageError
from asyncsup.keys import AllowedKey, KeyStore, generate, load_pair, public_key

if TYPE_CHECKING:
    from asyncsup.cli import Session


def run_keys(session: Session, settings: Callable[[], Any]) -> int:
    """Carry out `asyncsup keys VERB`.

    Args:
        settings: reads the configuration's `[supervisor]`; not needed for a key of one's own.
    """
    args, out = session.args, session.out
    verb: str = args.keys_verb
    if verb == "generate" and args.name is not None:
        secret = generate(Path(args.folder or keys_folder()), args.name)
        value = {"name": args.name, "path": str(secret), "public_key": load_pair(secret).public.decode()}
        out.result(value, lambda: _generated_lines(value))
        return 0
    read = settings()
    store = KeyStore(read.state_dir / "keys")
    if verb == "generate":
        if args.folder is not None:
            raise UsageError("--folder is for a key of your own: give it a name")
        secret = generate(store.folder, KeyStore.SUPERVISOR)
        value = {"path": str(secret), "public_key": load_pair(secret).public.decode()}
        out.result(value, lambda: _supervisor_lines(value))
    elif verb == "allow":
        key = store.allow(args.name, args.role, public_key(args.key))
        out.result(_described(key), lambda: [f"{key.name} may {key.role}"])
    elif verb == "revoke":
        key = store.revoke(args.name)
        out.result(_described(key), lambda: [f"{key.name} may not connect any more"])
    else:
        value = _listed(store, read.listen)
        out.result(value, lambda: _list_lines(value))
        return 1 if value["problems"] else 0
    return 0


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
