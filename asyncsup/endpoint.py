"""Where the supervisor is: the endpoint that is meant, and whether anybody listens there.

Light: on the way of `asyncsup status`.
"""

# ruff: noqa: PTH100, PTH113, PTH118, PTH120, PTH123
# pathlib would be a good part of the run time of `asyncsup status`.

from __future__ import annotations

import errno
import os
import socket
import time
from typing import Final

from asyncsup.errors import NotAllowedError, SupervisorUnreachableError, UsageError

MAX_SOCKET_PATH_BYTES: Final = 107
"""What the address of a UNIX socket holds."""

TCP_CONNECT_SECONDS: Final = 5.0
"""How long another machine may take to answer at all."""

CONNECT_TRIES: Final = 100
CONNECT_PAUSE_SECONDS: Final = 0.02


def find_endpoint(config: str | os.PathLike[str] | None = None) -> str:
    """The control endpoint of the supervisor that is meant.

    That of the configuration file ``config`` if one is given, else ``$ASYNCSUP_ENDPOINT``, else that of the
    configuration file `asyncsup serve` would take. Only its ``[supervisor]`` table is looked at.

    Raises:
        ConfigError: there is no configuration file, or what it says of the endpoint is wrong.
    """
    if config is None and os.environ.get("ASYNCSUP_ENDPOINT"):
        return os.environ["ASYNCSUP_ENDPOINT"]
    path = _find_config() if config is None else os.fspath(config)
    if path is not None and (endpoint := _plain_endpoint(path)) is not None:
        return endpoint
    # Anything out of the ordinary is the configuration reader's business, which has the words for it.
    from pathlib import Path  # noqa: PLC0415

    from asyncsup.config import find_config, load_supervisor  # noqa: PLC0415

    settings = load_supervisor(find_config(None if config is None else Path(config), os.environ))
    return str(settings.endpoint)


def events_port(endpoint: str) -> str:
    """Where the events of the supervisor at ``tcp://HOST:PORT`` are: one port further."""
    host, _, port = endpoint.rpartition(":")
    return f"{host}:{int(port) + 1}"


def _find_config() -> str | None:
    """The order of `asyncsup.config.find_config` without its import; a test holds the two together."""
    environ = os.environ
    if environ.get("ASYNCSUP_CONFIG"):
        return environ["ASYNCSUP_CONFIG"]
    places = ["asyncsup.toml"]
    if environ.get("XDG_CONFIG_HOME", "").startswith("/"):
        places.append(f"{environ['XDG_CONFIG_HOME']}/asyncsup/asyncsup.toml")
    elif environ.get("HOME"):
        places.append(f"{environ['HOME']}/.config/asyncsup/asyncsup.toml")
    places.append("/etc/asyncsup/asyncsup.toml")
    return next((path for path in places if os.path.isfile(path)), None)


def _plain_endpoint(path: str) -> str | None:
    """What `asyncsup.config.load_supervisor` would say, at half the run time of `asyncsup status`.

    None when the file has anything but plain paths to say about it, or is wrong.
    """
    import tomllib  # noqa: PLC0415 - not needed when the endpoint is given

    try:
        with open(path, "rb") as file:
            settings = tomllib.load(file).get("supervisor", {})
        values = {name: settings.get(name) for name in ("state_dir", "runtime_dir", "endpoint")}
    except (OSError, ValueError, AttributeError):
        return None
    for value in values.values():
        if value is not None and (not isinstance(value, str) or not value or "$" in value or value[0] == "~"):
            return None
    endpoint = values["endpoint"]
    address = "" if endpoint is None else endpoint.removeprefix("ipc://")
    if endpoint is not None and (address == endpoint or address[:1] in {"", "@", "~"}):
        return None
    runtime_dir = values["runtime_dir"] or f"{values['state_dir'] or '.asyncsup'}/run"
    # The folder is checked even where it is not used: the supervisor has its other sockets there.
    sockets = [_absolute(path, f"{runtime_dir}/control.sock"), _absolute(path, address or ".")]
    if any(len(os.fsencode(name)) > MAX_SOCKET_PATH_BYTES for name in sockets):
        return None
    return f"ipc://{sockets[1] if address else sockets[0]}"


def _absolute(config: str, path: str) -> str:
    folder = os.path.dirname(os.path.abspath(config))
    return "/" + os.path.normpath(os.path.join(folder, path)).lstrip("/")


def check_reachable(endpoint: str) -> None:
    """Return at once if somebody listens at ``endpoint``; ZeroMQ itself would wait for that without a word.

    Raises:
        as `connect` does.
    """
    if not endpoint.startswith("tcp://"):
        connect(endpoint).close()
        return
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    if not host or not port.isdecimal():
        raise UsageError(f"{endpoint!r} is no endpoint; expected something like tcp://192.0.2.1:7600")
    try:
        socket.create_connection((host.strip("[]"), int(port)), TCP_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise unreachable(endpoint, getattr(error, "strerror", None) or str(error)) from None


def connect(endpoint: str) -> socket.socket:
    """A plain connection to an ``ipc://`` endpoint; it does not block.

    Raises:
        SupervisorUnreachableError: nobody listens there.
        NotAllowedError: the socket is not ours to use.
        UsageError: it is no endpoint.
    """
    scheme, _, address = endpoint.partition("://")
    if scheme != "ipc" or not address:
        raise UsageError(
            f"{endpoint!r} is no endpoint; expected something like ipc:///run/asyncsup/control.sock"
        )
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        _connect(connection, f"\0{address[1:]}" if address.startswith("@") else address)
        return connection
    except BlockingIOError:
        error: Exception = unreachable(endpoint, "it accepts no connections")
    except PermissionError:
        error = NotAllowedError(f"no permission for the supervisor's socket at {endpoint}", endpoint=endpoint)
    except OSError as failure:
        if failure.errno is None:  # "AF_UNIX path too long" comes without a number
            error = UsageError(f"{endpoint}: {failure}", endpoint=endpoint)
        else:
            error = unreachable(endpoint, None if failure.errno == errno.ENOENT else failure.strerror)
    connection.close()
    raise error


def _connect(connection: socket.socket, address: str) -> None:
    """Try again for a while when too many others are at the door: a UNIX socket cannot be waited for."""
    for left in reversed(range(CONNECT_TRIES)):
        try:
            connection.connect(address)
        except BlockingIOError:
            if not left:
                raise
            time.sleep(CONNECT_PAUSE_SECONDS)
        else:
            return


def unreachable(endpoint: str, why: str | None) -> SupervisorUnreachableError:
    reason = f" ({why})" if why else ""
    return SupervisorUnreachableError(
        f"no supervisor at {endpoint}{reason}; start one with `asyncsup serve`", endpoint=endpoint
    )
