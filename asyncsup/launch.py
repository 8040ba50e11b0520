"""How a command is run as an instance: its environment, folder, user, limits, sockets and output."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from asyncsup import listen_fds, owners
from asyncsup.cgroups import Cgroup
from asyncsup.child import Child, SpawnSpec, spawn
from asyncsup.config import TargetConfig
from asyncsup.config.settings import SOCKET
from asyncsup.config.values import INSTANCE
from asyncsup.environment import build_environment
from asyncsup.patch import bytecode
from asyncsup.runtime import RootFacts, Runtime
from target_sdk import protocol

WATCHDOG_PID: Final = "WATCHDOG_PID"
"""Whose watchdog it is, as sd_watchdog_enabled(3) reads it: not that of the program's children."""


def expand(text: str, config: TargetConfig, index: int) -> str:
    """Put in what is known at the start only: the index, and the numbers of sockets."""

    def number(match: re.Match[str]) -> str:
        names = config.sockets
        return str(listen_fds.FIRST + names.index(match[1])) if match[1] in names else match[0]

    return SOCKET.sub(number, text.replace(INSTANCE, str(index)))


def managed_sockets(config: TargetConfig, runtime: Runtime) -> dict[int, int]:
    """The managed sockets of a target: number in the program to number here.

    Raises:
        SpawnError: one cannot be bound.
    """
    return {
        number: runtime.sockets.get(name).fileno()
        for number, name in enumerate(config.sockets, listen_fds.FIRST)
    }


def run_as(
    config: TargetConfig,
    index: int,
    runtime: Runtime,
    command: Sequence[str],
    *,
    facts: RootFacts,
    token: str,
    output: Mapping[str, int],
    extra: Mapping[str, str],
    descriptors: Mapping[int, int],
    pid_variables: Sequence[str] = (),
    cgroup: Cgroup | None = None,
) -> Child:
    """Start a command as an instance of a target.

    Args:
        facts: what it finds in its root.
        token: by which asyncsup knows the program again.
        output: descriptors by the name of the stream.
        extra: variables of this command.
        descriptors: number in the program to number here.
        pid_variables: variables that are to hold its pid.

    Raises:
        SpawnError: it cannot be started.
    """
    environment = build_environment(
        environ=runtime.environ,
        inheritable=runtime.inheritable,
        inherit=config.inherit_env,
        user=config.user,
        env_files=config.env_files,
        env={name: expand(value, config, index) for name, value in config.env.items()},
        own={**_own_environment(config, index, runtime, facts, token), **extra},
    )
    return spawn(
        SpawnSpec(
            command=[expand(part, config, index) for part in command],
            directory=config.directory,
            env=environment,
            stdout=output["stdout"],
            stderr=output.get("stderr", output["stdout"]),
            descriptors=descriptors,
            pid_variables=pid_variables,
            umask=config.umask,
            user=config.user,
            group=config.group,
            limits=config.rlimits,
            cgroup=None if cgroup is None else cgroup.path,
        )
    )


def _own_environment(
    config: TargetConfig, index: int, runtime: Runtime, facts: RootFacts, token: str
) -> dict[str, str]:
    own = {
        protocol.ENV_ENDPOINT: runtime.target_endpoint,
        protocol.ENV_TOKEN: token,
        protocol.ENV_NAME: config.name,
        protocol.ENV_INSTANCE: f"{config.name}:{index}",
        protocol.ENV_REGION: config.region,
        protocol.ENV_BUILD: str(facts.build),
    }
    if config.root is not None and facts.current is not None:
        own[protocol.ENV_ROOT] = str(config.root)
        own[protocol.ENV_CURRENT] = str(facts.current)
        home, generation = runtime.state_dir, facts.generation or 0
        if config.user is None:
            bytecode.lay_out(home, config.name, generation, config.root)
        own["PYTHONPYCACHEPREFIX"] = str(bytecode.prefix(home, config.name, generation))
    if config.protocol == "sdk":
        own[protocol.ENV_HANDOVER] = str(_rendezvous(config, index, runtime))
    if config.speaks_notify:
        own["NOTIFY_SOCKET"] = str(runtime.notify_path)
        if config.watchdog_timeout is not None:
            own["WATCHDOG_USEC"] = str(int(config.watchdog_timeout * 1e6))
        if config.fd_store_max:
            own["FDSTORE"] = str(config.fd_store_max)
    return own


def _rendezvous(config: TargetConfig, index: int, runtime: Runtime) -> Path:
    """Where those that follow one another in a slot find each other. The program makes the socket, so the
    folder is its user's. Named by a digest: the path of a socket must be short."""
    digest = hashlib.blake2b(config.name.encode(), digest_size=8).hexdigest()
    folder = runtime.runtime_dir / "handover" / digest
    with contextlib.suppress(OSError):  # without it there is no hand-over, and nothing else is missing
        folder.parent.mkdir(mode=0o711, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        owners.give(folder, user=config.user)
    return folder / str(index)
