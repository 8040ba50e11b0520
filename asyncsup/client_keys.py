"""What a client needs to connect over TCP: its own key pair, and the key of the supervisor it means.

Light: on the way of every command.
"""

# ruff: noqa: PTH113, PTH118
# pathlib would be a good part of the run time of a short command.

from __future__ import annotations

import os
from typing import Final, NamedTuple

from asyncsup.errors import KeysError, NotAllowedError

ENV_KEY: Final = "ASYNCSUP_KEY"
"""The path of the client's own ``NAME.key_secret``."""
ENV_SUPERVISOR_KEY: Final = "ASYNCSUP_SUPERVISOR_KEY"
"""The supervisor's public key in Z85, or the path of its ``supervisor.key``."""


class ClientKeys(NamedTuple):
    """CURVE keys (https://rfc.zeromq.org/spec/26/), in Z85."""

    public: bytes
    secret: bytes
    supervisor: bytes


def load_keys(own: str, supervisor: str) -> ClientKeys:
    """Read the keys for one supervisor.

    Args:
        own: the path of ``NAME.key_secret``.
        supervisor: the supervisor's public key, or the path of a file that holds it.

    Raises:
        KeysError: a file cannot be read, or what it holds is no key.
    """
    from pathlib import Path  # noqa: PLC0415

    from asyncsup.keys import load_pair, public_key  # noqa: PLC0415 - not for local supervisors

    pair = load_pair(Path(own))
    return ClientKeys(pair.public, pair.secret, public_key(supervisor).encode())


def keys_for(endpoint: str) -> ClientKeys | None:
    """The keys to use at ``endpoint`` as the environment says, or as they lie in the usual places; None where
    none are needed.

    Raises:
        KeysError: there are none, or they are wrong.
    """
    if not endpoint.startswith("tcp://"):
        return None
    folder = keys_folder()
    own = os.environ.get(ENV_KEY) or os.path.join(folder, "client.key_secret")
    supervisor = os.environ.get(ENV_SUPERVISOR_KEY) or os.path.join(folder, "supervisor.key")
    for path, variable, what in (
        (own, ENV_KEY, "the path of your own key; `asyncsup keys generate client` makes one"),
        (
            supervisor,
            ENV_SUPERVISOR_KEY,
            "the supervisor's public key, which `asyncsup keys list` shows there",
        ),
    ):
        if not os.environ.get(variable) and not os.path.isfile(path):
            raise KeysError(f"{endpoint} needs keys: set {variable} to {what}", code="keys.missing")
    return load_keys(own, supervisor)


def keys_folder() -> str:
    """Where a user's own keys are: ``~/.config/asyncsup/keys``, or as XDG_CONFIG_HOME says."""
    home = os.environ.get("XDG_CONFIG_HOME", "")
    if not home.startswith("/"):
        home = os.path.expanduser("~/.config")  # noqa: PTH111
    return os.path.join(home, "asyncsup", "keys")


def not_taken(endpoint: str, *, unknown: bool) -> NotAllowedError:
    """The handshake has failed."""
    if unknown:
        text = f"the supervisor at {endpoint} does not allow this key; `asyncsup keys allow` there does"
    else:
        text = (
            f"what listens at {endpoint} did not prove to have the key that {ENV_SUPERVISOR_KEY} names: "
            "it is another supervisor, or none"
        )
    return NotAllowedError(text, code="keys.not_allowed", endpoint=endpoint)
