"""Managed sockets: bound once, kept across restarts, patches and supervisors, given to targets by descriptor.

A socket outlives our own end in one of two ways: the keeper holds a descriptor of it, or, when that has ended
as well, an instance that runs on has one, which pidfd_getfd(2) copies from it (for root, and for whoever may
trace the instance). Connections wait in it meanwhile; nobody is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import stat
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Final

from asyncsup import owners
from asyncsup.child import out_of_the_way
from asyncsup.config.address import EVERY, Address
from asyncsup.config.settings import SocketConfig
from asyncsup.errors import SocketError, SpawnError
from asyncsup.keeper_link import KeeperLink
from asyncsup.pidfds import copy_descriptor, opened
from asyncsup.steering import steer_away

log = logging.getLogger("asyncsup.sockets")

_KINDS: Final = {
    "tcp": socket.SOCK_STREAM,
    "udp": socket.SOCK_DGRAM,
    "unix": socket.SOCK_STREAM,
    "unixgram": socket.SOCK_DGRAM,
}


class ManagedSockets:
    """The sockets of one supervisor, by name."""

    def __init__(self, keeper: KeeperLink) -> None:
        self._keeper = keeper
        self._configs: Mapping[str, SocketConfig] = {}
        self._bound: dict[str, socket.socket] = {}
        self._steering = asyncio.Lock()
        self._cannot_steer = False
        """The host does not let us, which has been said."""

    def open(self, configs: Mapping[str, SocketConfig], processes: Iterable[int]) -> None:
        """Take back what an earlier supervisor has left, and bind the rest.

        An address that cannot be had is said, and tried again whenever somebody needs it.

        Args:
            processes: instances that may still have the sockets.
        """
        self._configs = configs
        pids = list(processes)
        for name, config in configs.items():
            held = self._keeper.take(_held_name(name))
            found = None if held is None else _if_it_is(config.listen, socket.socket(fileno=held))
            if found is None:
                found = next(filter(None, (_copy_from(pid, config.listen) for pid in pids)), None)
            if found is not None:
                self._keep(name, found)
                continue
            try:
                self._bind(name)
            except SpawnError as error:
                log.error("%s", error.message)  # noqa: TRY400 - foreseen

    def get(self, name: str) -> socket.socket:
        """One of them, bound by now.

        Raises:
            SpawnError: it cannot be bound; the message says why.
        """
        if name not in self._bound:
            self._bind(name)
        return self._bound[name]

    async def steer_away(self, groups: Callable[[], Iterable[int]], names: Iterable[str]) -> bool:
        """Have processes that are to end take no more connections from some of them.

        Args:
            groups: says which process groups that are, when it is their turn.

        Returns:
            Whether they have taken any so far.
        """
        async with self._steering:
            # A millisecond or two: where hundreds end at once, others have their turn in between.
            await asyncio.sleep(0)
            try:
                return steer_away(groups(), [self._bound[name] for name in names if name in self._bound]) > 0
            except OSError as error:
                is_for_good = error.errno in {errno.EPERM, errno.ENOSYS}
                if not (is_for_good and self._cannot_steer):
                    self._cannot_steer = self._cannot_steer or is_for_good
                    log.warning(
                        "programs go on taking connections until their stop signal, unless they drain: %s",
                        error.strerror,
                    )
                return False

    @property
    def configs(self) -> Mapping[str, SocketConfig]:
        """What is in force, by name."""
        return self._configs

    def lost(self) -> frozenset[str]:
        """Those whose path somebody has removed: nobody can connect to them any more."""
        return frozenset(
            name
            for name, config in self._configs.items()
            if config.listen.is_path and name in self._bound and _is_gone(config.listen.host)
        )

    def configure(
        self, configs: Mapping[str, SocketConfig], *, lost: Collection[str] = ()
    ) -> dict[str, SocketError]:
        """Have other ones. One whose address has changed is bound anew; whoever has the old one keeps it.

        Args:
            lost: those that are bound anew at the address they have.

        Returns:
            What went wrong, by name. What cannot be bound is tried again whenever somebody needs it; what
            cannot be changed stays configured as before.
        """
        failures: dict[str, SocketError] = {}
        before, self._configs = self._configs, dict(configs)
        for name, config in before.items():
            after = configs.get(name)
            if after is None or after.listen != config.listen or name in lost:
                self._drop(name)
            elif after != config and name in self._bound:
                try:
                    _furnish(self._bound[name], after)
                except OSError as error:
                    self._configs[name] = config
                    why = error.strerror or str(error)
                    failures[name] = SocketError(f"socket {name} ({after.listen}) cannot be changed: {why}")
        for name in configs:
            if name not in self._bound:
                try:
                    self._bind(name)
                except SpawnError as error:
                    failures[name] = SocketError(error.message)
        for failure in failures.values():
            log.error("%s", failure.message)
        return failures

    def close(self, *, keep: bool) -> None:
        """Let go of all.

        Args:
            keep: another supervisor goes on with them; their paths stay, and so does what waits in them.
        """
        for name in list(self._bound):
            if keep:
                self._bound.pop(name).close()
            else:
                self._drop(name)

    def describe(self) -> dict[str, dict[str, Any]]:
        """Of every socket its address, and whether it is bound."""
        return {
            name: {"listen": str(config.listen), "bound": name in self._bound}
            for name, config in self._configs.items()
        }

    def _bind(self, name: str) -> None:
        config = self._configs.get(name)
        if config is None:
            raise SpawnError(f"there is no [socket.{name}] any more")
        try:
            self._keep(name, _bound(config))
        except OSError as error:
            why = error.strerror or str(error)
            raise SpawnError(f"socket {name} ({config.listen}) cannot be bound: {why}") from None

    def _keep(self, name: str, found: socket.socket) -> None:
        # Spawns put it under a number of the program's: it must not have one of those itself.
        out_of_reach = socket.socket(fileno=out_of_the_way(found.detach()))
        self._bound[name] = out_of_reach
        self._keeper.hold(_held_name(name), out_of_reach.fileno())

    def _drop(self, name: str) -> None:
        if name not in self._bound:
            return
        bound = self._bound.pop(name)
        self._keeper.drop(_held_name(name))
        # Not `shutdown`: that would end it for the instances that have it as well.
        address = bound.getsockname()
        bound.close()
        if isinstance(address, str) and address:
            with contextlib.suppress(OSError):
                os.unlink(address)  # noqa: PTH108 - a text of the kernel's


class Readiness:
    """Calls back once, when something waits in one of some sockets."""

    def __init__(self, sockets: Iterable[socket.socket], callback: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._callback = callback
        # An event loop has one reader for each descriptor, and sockets are shared between targets.
        self._watched = [each.dup() for each in sockets]
        for each in self._watched:
            self._loop.add_reader(each, self._readable)

    def _readable(self) -> None:
        self.close()
        self._callback()

    def close(self) -> None:
        for each in self._watched:
            self._loop.remove_reader(each)
            each.close()
        self._watched.clear()


def _held_name(name: str) -> str:
    """What the keeper knows a socket by."""
    return f"socket/{name}"


def _bound(config: SocketConfig) -> socket.socket:
    address = config.listen
    made = socket.socket(_family(address), _KINDS[address.scheme] | socket.SOCK_CLOEXEC)
    try:
        if address.is_path:
            _remove_dead(address)
            made.bind(address.host)
        else:
            if address.scheme == "tcp":
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if made.family == socket.AF_INET6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address.host != EVERY)
            host = (
                address.host
                if address.host != EVERY
                else "::"
                if made.family == socket.AF_INET6
                else "0.0.0.0"
            )
            made.bind((host, address.port))
        _furnish(made, config)
    except BaseException:
        made.close()
        raise
    return made


def _furnish(bound: socket.socket, config: SocketConfig) -> None:
    """Everything that can be changed later as well."""
    if bound.type == socket.SOCK_STREAM:
        bound.listen(config.backlog)
    if config.listen.is_path:
        if not _is_socket(config.listen.host):
            raise OSError(errno.ENOTSOCK, f"{config.listen.host} is something else by now")
        os.chmod(config.listen.host, config.mode)  # noqa: PTH101 - a text
        owners.give(config.listen.host, user=config.user, group=config.group)


def _family(address: Address) -> socket.AddressFamily:
    if address.is_path:
        return socket.AF_UNIX
    if address.host == EVERY:
        return socket.AF_INET6 if _has_ipv6() else socket.AF_INET
    return socket.AF_INET6 if ":" in address.host else socket.AF_INET


def _has_ipv6() -> bool:
    try:
        socket.socket(socket.AF_INET6, socket.SOCK_STREAM).close()
    except OSError:
        return False
    return os.path.exists("/proc/net/if_inet6")  # noqa: PTH110 - switched off by sysctl or at the boot


def _remove_dead(address: Address) -> None:
    """Remove what a process that has ended has left at the path of a socket. Whatever is no socket stays, and
    so does one that somebody listens to: binding fails then.
    """
    path = address.host
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, _KINDS[address.scheme] | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)  # noqa: PTH108 - a text
        except OSError:
            pass  # for example a full queue: somebody is there


def _if_it_is(address: Address, found: socket.socket) -> socket.socket | None:
    """The socket, if it is bound to this address (and, where clients connect, listened to); else closed."""
    with contextlib.suppress(OSError):
        if (
            found.family == _family(address)
            and found.type == _KINDS[address.scheme]
            and _is_at(address, found)
        ):
            return found
    found.close()
    return None


def _is_at(address: Address, found: socket.socket) -> bool:
    if found.type == socket.SOCK_STREAM and not found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return False
    name = found.getsockname()
    if address.is_path:
        # The path must still lead to it: a socket whose path was removed is reached by nobody.
        return bool(name == address.host and _is_socket(address.host))
    host = {"0.0.0.0": EVERY, "::": EVERY}.get(name[0], name[0])
    wanted = {"0.0.0.0": EVERY, "::": EVERY}.get(address.host, address.host)
    return bool(name[1] == address.port and _packed(host) == _packed(wanted))


def _packed(host: str) -> bytes:
    if host == EVERY:
        return b""
    return socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)


def _is_socket(path: str) -> bool:
    with contextlib.suppress(OSError):
        return stat.S_ISSOCK(os.lstat(path).st_mode)
    return False


def _is_gone(path: str) -> bool:
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        pass  # we may not look; whoever connects may
    return False


def _copy_from(pid: int, address: Address) -> socket.socket | None:
    """The socket of this address that a process has, as a descriptor of ours; None if we may not look."""
    with contextlib.suppress(OSError), opened(pid) as pidfd:
        for number in map(int, os.listdir(f"/proc/{pid}/fd")):  # noqa: PTH208 - numbers
            if not os.readlink(f"/proc/{pid}/fd/{number}").startswith("socket:"):  # noqa: PTH115
                continue
            try:
                copied = copy_descriptor(pidfd, number)
            except OSError:
                continue
            found = _if_it_is(address, socket.socket(fileno=copied))
            if found is not None:
                return found
    return None
