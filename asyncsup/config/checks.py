"""What has to hold between settings, and between them and the machine. Pure but for what it asks a `Machine`.

Whether a single value is right is `asyncsup.config.values`' business.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from asyncsup import listen_fds
from asyncsup.config.machine import Machine
from asyncsup.config.problems import Report
from asyncsup.config.settings import SOCKET, PatchConfig, SupervisorConfig
from asyncsup.config.values import (
    INSTANCE,
    UNLIMITED,
    format_duration,
    format_size,
    is_no_file,
    is_one_file,
    nearest,
    quoted,
)
from asyncsup.endpoint import MAX_SOCKET_PATH_BYTES
from asyncsup.errors import AllowedSignersError, TrustUnavailableError

if TYPE_CHECKING:
    from asyncsup.config.reader import SocketRead, TableRead, TargetRead

RELOADS: Final = ("reload_signal", "reload_command")
READY_KEYS: Final = ("http", "tcp", "exec", "log", "fd", "accepts", "notify")
LIVENESS_KEYS: Final = ("http", "tcp", "exec")
COMMANDS: Final = ("command", "stop_command", "reload_command")
_SHELL_WORDS: Final = frozenset({"|", "||", "&", "&&", ">", ">>", "<", "2>", "2>&1"})


class Checks:
    """Every check, with what they report to and ask."""

    def __init__(self, report: Report, machine: Machine | None, environ: Mapping[str, str]) -> None:
        self._report = report
        self._machine = machine
        self._environ = environ

    # --- [supervisor] and [patch] ---------------------------------------------------------------------------

    def supervisor(self, config: SupervisorConfig, read: TableRead) -> None:
        self._socket_path(read, "runtime_dir", config.runtime_dir / "control.sock")
        if "endpoint" in read.places:
            self._socket_path(read, "endpoint", Path(config.endpoint.removeprefix("ipc://")))
        self._usable_as_folder(read, "state_dir", config.state_dir)
        self._usable_as_folder(read, "runtime_dir", config.runtime_dir)
        root = config.cgroup_root
        if self._machine is not None and root is not None and not self._machine.is_cgroup2(root):
            self._report.warn(
                read.place("cgroup_root"),
                f"{root} is not in a cgroup v2 file system: instances are started without a control group, "
                "and those that need one not at all",
            )
        group = config.socket_group
        if self._machine is not None and group is not None and self._machine.group_id(group) is None:
            self._report.problem(read.place("socket_group"), "there is no such group on this machine")
        if group is not None and not config.socket_mode & 0o060:
            self._report.warn(
                read.place("socket_group"), 'changes nothing: the group needs socket_mode = "0660"'
            )

    def patch(self, config: PatchConfig, read: TableRead) -> None:
        self._usable_as_folder(read, "inbox", config.inbox)
        if config.trust == "required":
            self._signatures(config, read)
        else:
            for key in ("allowed_signers", "signatures_required"):
                if key in read.places and "trust" not in read.failed:
                    self._report.warn(read.place(key), 'is not used: signatures need trust = "required"')
        if config.trust == "required" and config.signatures_required > config.limits.signatures:
            self._report.problem(
                read.place("signatures_required"),
                f"is above patch.limits.signatures ({config.limits.signatures}), so that no package could "
                "ever have enough",
                "set one of them to another number",
            )

    def _signatures(self, config: PatchConfig, read: TableRead) -> None:
        """Everything that verifying needs is there when the supervisor starts, and not missed at a patch."""
        if config.allowed_signers is None:
            if "allowed_signers" not in read.failed:
                self._report.problem(
                    read.place("trust"),
                    "does not say whose signatures count",
                    "set patch.allowed_signers to a file in the format of OpenSSH's allowed_signers",
                )
            return
        if self._machine is None:
            return
        place = read.place("allowed_signers")
        try:
            self._machine.require_cryptography()
        except TrustUnavailableError as error:
            self._report.problem(read.place("trust"), error.message)
        try:
            signers = self._machine.allowed_signers(config.allowed_signers)
        except AllowedSignersError as error:
            for line in error.message.splitlines():
                self._report.problem(place, line)
            return
        from asyncsup.patch.trust import NAMESPACE, count_keys  # noqa: PLC0415 - clients never get here

        keys = count_keys(signers)
        if keys < config.signatures_required and "signatures_required" not in read.failed:
            self._report.problem(
                place,
                f"allows {keys} of the {config.signatures_required} keys that have to sign a patch "
                f"(namespace {NAMESPACE}), so that none could ever be applied",
                "add keys, or set patch.signatures_required to less",
            )
        if self._machine.writable_by_all(config.allowed_signers):
            self._report.warn(
                place, "may be changed by everybody on this machine, who could allow themselves"
            )

    def _socket_path(self, read: TableRead, key: str, path: Path) -> None:
        size = len(os.fsencode(path))
        if size > MAX_SOCKET_PATH_BYTES and key not in read.failed:
            self._report.problem(
                read.place(key),
                f"a socket's path has at most {MAX_SOCKET_PATH_BYTES} bytes, {path} has {size}",
                f'set supervisor.{key} to a shorter path, such as "/run/asyncsup"'
                if key == "runtime_dir"
                else "choose a shorter path",
            )

    def _usable_as_folder(self, read: TableRead, key: str, path: Path) -> None:
        if self._machine and self._machine.exists(path) and not self._machine.is_directory(path):
            self._report.problem(
                read.place(key), f"{path} is there and is no folder", "remove it, or choose another path"
            )

    # --- targets --------------------------------------------------------------------------------------------

    def targets(
        self,
        targets: Mapping[str, TargetRead],
        supervisor: SupervisorConfig,
        patch: PatchConfig,
        sockets: Mapping[str, SocketRead],
        files: Sequence[Path],
    ) -> None:
        """Args: files: those that the configuration was read from."""
        for target in targets.values():
            self._layout(target)
            self._reload(target)
            self._delays(target)
            self._user(target)
            self._probes(target)
            self._fd_store(target)
            self._oneshot(target)
            self._capacity(target)
            self._sockets(target, sockets)
            self._control_group(target)
        self._dependencies(targets)
        self._roots(targets, supervisor, patch, files)
        self._log_files(targets)

    def _layout(self, target: TargetRead) -> None:
        top = target.top
        if "root" not in top.places:
            for key in ("layout", "persist"):
                if top.has_own(key):
                    self._report.problem(
                        top.place(key), "has no meaning without root", "set root, or remove it"
                    )
        elif top.has_own("persist") and target.config.layout != "tree" and "layout" not in top.failed:
            self._report.problem(
                top.place("persist"),
                'has a meaning only with layout = "tree"',
                "remove it: an overlay leaves alone what no patch touches",
            )

    def _reload(self, target: TargetRead) -> None:
        if all(key in target.top.places for key in RELOADS):
            self._report.problem(
                target.top.place("reload_command"),
                "reload_signal and reload_command cannot both be set",
                "remove one of them: a target is told in one way",
            )

    def _delays(self, target: TargetRead) -> None:
        config, top = target.config, target.top
        if config.restart_delay > config.restart_max_delay:
            delay = format_duration(config.restart_delay)
            self._report.problem(
                top.place("restart_max_delay" if "restart_max_delay" in top.places else "restart_delay"),
                f"restart_delay ({delay}) is more than restart_max_delay "
                f"({format_duration(config.restart_max_delay)})",
                f'set restart_max_delay to at least "{delay}"',
            )

    def _user(self, target: TargetRead) -> None:
        machine, config = self._machine, target.config
        if machine is None:
            return
        for key, name, find, own in (
            ("user", config.user, machine.user_id, machine.effective_user),
            ("group", config.group, machine.group_id, machine.effective_group),
        ):
            if name is None:
                continue
            number = find(name)
            if number is None:
                hint = "the group has a key of its own" if key == "user" and ":" in name else None
                self._report.problem(target.top.place(key), f"there is no such {key} on this machine", hint)
            elif number != own() and machine.effective_user() != 0:
                self._report.problem(
                    target.top.place(key),
                    f"only root may start processes as another {key}",
                    "run asyncsup as root, or remove the key",
                )

    def _probes(self, target: TargetRead) -> None:
        """One answer each to the questions whether an instance is ready, and whether it is alive."""
        for table, keys in (("ready", READY_KEYS), ("liveness", LIVENESS_KEYS)):
            read = target.tables[table]
            asked = [key for key in keys if key in read.places and getattr(target.config, table)]
            for key in asked[1:]:
                self._report.problem(
                    read.place(key),
                    f"{asked[0]} and {key} cannot both be set",
                    "remove one of them; a command (exec) can ask for several things",
                )
            if not asked and not read.failed:
                for key in read.places:
                    if read.has_own(key):
                        self._report.problem(
                            read.place(key), "has no meaning alone", f"set one of {', '.join(keys)} as well"
                        )
        config, top = target.config, target.top
        can_say = config.speaks_notify or config.protocol == "sdk" or "protocol" in top.failed
        if config.watchdog_timeout is not None and not can_say:
            self._report.problem(
                top.place("watchdog_timeout"),
                "needs a program that can say that it is alive",
                'set protocol to "notify" or "sdk", or use [target.NAME.liveness]',
            )

    def _fd_store(self, target: TargetRead) -> None:
        config, top = target.config, target.top
        if not config.fd_store_max or "fd_store_max" in top.failed:
            return
        if not config.speaks_notify and "protocol" not in top.failed:
            self._report.problem(
                top.place("fd_store_max"),
                "needs a program that speaks sd_notify",
                'set protocol to "notify", or ready.notify',
            )
        first = listen_fds.FIRST + len(config.sockets)
        last = first + config.fd_store_max - 1
        if config.ready.fd is not None and first <= config.ready.fd <= last:
            self._report.problem(
                target.tables["ready"].place("fd"),
                f"is a number that a stored descriptor may get (fd_store_max): {first} to {last}",
                f"choose {last + 1} or more",
            )

    def _oneshot(self, target: TargetRead) -> None:
        config, top = target.config, target.top
        if not config.oneshot:
            return
        for key, bad in (
            ("restart", config.restart in {"always", "unless-stopped"}),
            ("min_uptime", top.has_own("min_uptime")),
            ("watchdog_timeout", config.watchdog_timeout is not None),
        ):
            if bad and key in top.places and key not in top.failed:
                self._report.problem(top.place(key), "has no meaning for a oneshot, which is to end")
        for table in ("ready", "liveness"):
            if any(key in target.tables[table].places for key in READY_KEYS):
                self._report.problem(
                    top.place("oneshot"), f"a oneshot is ready when it has ended; remove [{table}]"
                )

    def _capacity(self, target: TargetRead) -> None:
        config, read = target.config, target.tables["patch"]
        floor = config.patch.min_available
        # One that is inherited may be meant for others; of what there is, one can always be spared.
        if config.oneshot or config.overlaps or not read.has_own("min_available"):
            return
        if 0 < config.instances <= floor and "min_available" not in read.failed:
            self._report.problem(
                read.place("min_available"),
                f"of {config.instances} instances {floor} are to be ready at any time, so that none could be "
                "replaced",
                f"set it to at most {config.instances - 1}, or have more instances, or set overlap = true",
            )

    def _sockets(self, target: TargetRead, sockets: Mapping[str, SocketRead]) -> None:
        """The sockets a target is started with are there, and its command names no others."""
        config, top = target.config, target.top
        for name in config.sockets:
            if name not in sockets and self._report.whole:
                near = nearest(name, sockets)
                self._report.problem(
                    top.place("sockets"),
                    f"there is no socket {quoted(name)}",
                    f"did you mean {quoted(near)}?" if near else f"write [socket.{name}]",
                )
        for key, texts in (("command", config.command), ("env", config.env.values())):
            for name in SOCKET.findall(" ".join(texts)):
                if name not in config.sockets and "sockets" not in top.failed:
                    self._report.problem(
                        top.place(key),
                        f"$(socket.{name}) is not among the sockets of this target",
                        f"write sockets = [{quoted(name)}]",
                    )
        last = listen_fds.FIRST + len(config.sockets) - 1
        if config.ready.fd is not None and listen_fds.FIRST <= config.ready.fd <= last:
            self._report.problem(
                target.tables["ready"].place("fd"),
                f"is the number of a socket: those have {listen_fds.FIRST} to {last}",
                f"choose {last + 1} or more",
            )
        if config.ready.accepts and not config.sockets and "sockets" not in top.failed:
            self._report.problem(
                target.tables["ready"].place("accepts"),
                "has a meaning only for a target with sockets",
                'set sockets = ["NAME"]',
            )
        if config.autostart == "on-demand" and not config.sockets and "sockets" not in top.failed:
            self._report.problem(
                top.place("autostart"),
                '"on-demand" means: at the first connection to one of its sockets, and it has none',
                'set sockets = ["NAME"]',
            )

    def sockets(self, sockets: Mapping[str, SocketRead]) -> None:
        """Each address is bound once; owners exist; nothing is said that has no meaning."""
        owners: dict[tuple[object, ...], str] = {}
        for name, socket in sockets.items():
            config, read = socket.config, socket.read
            address = config.listen
            if (other := owners.setdefault(tuple(address), name)) != name:
                self._report.problem(read.place("listen"), f"{other} and {name} have the same address")
            for key in ("mode", "user", "group"):
                if key in read.places and not address.is_path:
                    self._report.problem(read.place(key), "has a meaning only for unix:// and unixgram://")
            if address.scheme in {"udp", "unixgram"} and "backlog" in read.places:
                self._report.problem(read.place("backlog"), "has no meaning: nothing connects to it")
            if self._machine is None:
                continue
            for key, who, find in (
                ("user", config.user, self._machine.user_id),
                ("group", config.group, self._machine.group_id),
            ):
                if who is not None and find(who) is None:
                    self._report.problem(read.place(key), f"there is no such {key} on this machine")

    def _control_group(self, target: TargetRead) -> None:
        config, top = target.config, target.top
        limits = {name: value for name, value in config.cgroup_limits.items() if value != UNLIMITED}
        if config.cgroup == "off" and limits and "cgroup" not in top.failed:
            self._report.problem(
                top.place("cgroup"),
                f"limits.{next(iter(limits))} needs a control group",
                'remove one of them; "optional" goes without where there is none',
            )
        memory, high = limits.get("memory"), limits.get("memory_high")
        if memory is not None and high is not None and high > memory:
            self._report.problem(
                top.place("limits"),
                f"memory_high ({format_size(int(high))}) is above memory ({format_size(int(memory))}), so "
                "that processes are killed before they are slowed down",
                "set memory_high to less than memory",
            )

    def _dependencies(self, targets: Mapping[str, TargetRead]) -> None:
        graph: dict[str, tuple[str, ...]] = {}
        for name, target in targets.items():
            graph[name] = tuple(other for other in target.config.depends_on if other in targets)
            if len(graph[name]) == len(target.config.depends_on) or not self._report.whole:
                continue
            for other in target.config.depends_on:
                if other not in targets:
                    near = nearest(other, (known for known in targets if known != name))
                    self._report.problem(
                        target.top.place("depends_on"),
                        f"there is no target {quoted(other)}",
                        f"did you mean {quoted(near)}?" if near else None,
                    )
        while cycle := _find_cycle(graph):
            self._report.problem(
                targets[cycle[0]].top.place("depends_on"),
                f"targets wait for each other: {' -> '.join(cycle)}",
            )
            graph.update(dict.fromkeys(cycle, ()))

    def _roots(
        self,
        targets: Mapping[str, TargetRead],
        supervisor: SupervisorConfig,
        patch: PatchConfig,
        files: Sequence[Path],
    ) -> None:
        state_dir = self._real(supervisor.state_dir)
        ours = (
            ("state_dir", "supervisor.state_dir", state_dir),
            ("runtime_dir", "supervisor.runtime_dir", self._real(supervisor.runtime_dir)),
            ("the inbox", "patch.inbox", self._real(patch.inbox)),
        )
        signers = None if patch.allowed_signers is None else self._real(patch.allowed_signers)
        owners: dict[Path, str] = {}
        for name, target in targets.items():
            root, place = target.config.root, target.top.place("root")
            if root is None or not self._is_root(target, root):
                continue
            # Compared with all links followed, but for the one that the tree layout itself makes of a root.
            real = self._real(root)
            if _within(real, state_dir):
                real = self._real(root.parent) / root.name
            if _within(real, state_dir):
                self._report.problem(
                    place,
                    f"is within state_dir ({supervisor.state_dir})",
                    "choose a folder of the program's own: what is in there belongs to asyncsup",
                )
            if signers is not None and _within(signers, real):
                self._report.problem(
                    place,
                    f"a patch could change who may sign patches: patch.allowed_signers ({signers}) is in it",
                    "keep that file elsewhere",
                )
            if target.config.layout == "tree":
                for what, key, folder in ours:
                    if _within(folder, real):
                        self._report.problem(
                            place,
                            f'with layout = "tree" a patch replaces the whole folder, and {what} is in it',
                            f"set {key} to a folder outside, or give the program a folder of its own",
                        )
                file = next((file for file in files if _within(self._real(file), real)), None)
                if file is not None:
                    self._report.problem(
                        place,
                        f'with layout = "tree" a patch replaces the whole folder, and {file} is in it',
                        "give the program a folder of its own",
                    )
            if (other := owners.setdefault(real, name)) != name:
                self._report.problem(place, f"{name} and {other} have the same root")
        for real, name in owners.items():
            outer = next((parent for parent in real.parents if parent in owners), None)
            if outer is not None:
                self._report.problem(
                    targets[name].top.place("root"),
                    f"the root of {name} is within that of {owners[outer]} "
                    f"({targets[owners[outer]].config.root})",
                )

    def _is_root(self, target: TargetRead, root: Path) -> bool:
        place = target.top.place("root")
        if root == Path("/"):
            self._report.problem(place, "the whole file system cannot be a root")
            return False
        if self._machine is None or self._machine.is_directory(root):
            return True
        if self._machine.exists(root):
            self._report.problem(place, f"{root} is no folder")
        else:
            here = place.source.path.parent
            hint = f"create it, or correct the path (it is relative to {here})"
            self._report.problem(place, f"there is no folder {root}", hint)
        return False

    def _real(self, path: Path) -> Path:
        return path if self._machine is None else self._machine.real_path(path)

    def _log_files(self, targets: Mapping[str, TargetRead]) -> None:
        """Every stream needs a file of its own: two rotations of one file would lose output. What is no file
        is never rotated, and takes the output of all of them."""
        owners: dict[str, tuple[str, str]] = {}
        for name, target in targets.items():
            for stream, path in (("stdout", target.config.log.stdout), ("stderr", target.config.log.stderr)):
                if not isinstance(path, Path) or is_no_file(path):
                    continue
                place, text = target.tables["log"].place(stream), str(path)
                if is_one_file(path) and target.config.instances > 1:
                    self._report.problem(
                        place,
                        f"{target.config.instances} instances of {name} would write into one file",
                        "put ${instance} into its name",
                    )
                for index in range(target.config.instances if INSTANCE in text else 1):
                    owner = owners.setdefault(text.replace(INSTANCE, str(index)), (name, stream))
                    if owner[0] != name:
                        self._report.problem(
                            place,
                            f"{owner[0]} and {name} would write into one file",
                            "put ${name} into its name",
                        )
                        break
                    if owner[1] != stream:
                        self._report.problem(
                            place, "stdout and stderr have the same file", 'write stderr = "stdout"'
                        )
                        break

    # --- warnings -------------------------------------------------------------------------------------------

    def warn(self, targets: Mapping[str, TargetRead]) -> None:
        """Note what is allowed, and perhaps so only for now, but probably not meant."""
        for target in targets.values():
            self._warn_of_shell_words(target)
            if target.config.protocol == "sdk":
                for key in RELOADS:
                    if key in target.top.places:
                        self._report.warn(
                            target.top.place(key), f"is not used: {target.config.name} is told by its SDK"
                        )
            if self._machine is not None:
                self._warn_of_missing(target, self._machine)

    def _warn_of_shell_words(self, target: TargetRead) -> None:
        for key in COMMANDS:
            place = target.top.places.get(key)
            if place is None or not isinstance(place.value, str):
                continue
            for word in sorted(_SHELL_WORDS.intersection(getattr(target.config, key))):
                self._report.warn(
                    place, f'there is no shell, {word} is an argument; for a shell write ["sh", "-c", "..."]'
                )

    def _warn_of_missing(self, target: TargetRead, machine: Machine) -> None:
        config, top = target.config, target.top
        if not machine.is_directory(config.directory):
            self._report.warn(top.place("directory"), f"there is no folder {config.directory}")
        for path in config.env_files:
            if not machine.exists(path):
                self._report.warn(top.place("env_files"), f"there is no file {path}")
        search_path = config.env.get("PATH", self._environ.get("PATH"))
        for key in COMMANDS:
            command: tuple[str, ...] | None = getattr(config, key)
            if command is None or INSTANCE in command[0] or (config.env_files and "/" not in command[0]):
                continue  # which program it is, or where it is searched for, will be known at the start
            if not machine.has_program(command[0], config.directory, search_path):
                self._report.warn(
                    top.place(key), f"there is no program {quoted(command[0])} that could be executed"
                )


def _find_cycle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """A way from a target over those it depends on back to itself; empty when there is none."""
    from graphlib import CycleError, TopologicalSorter  # noqa: PLC0415 - clients never get here

    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        # graphlib has each before the one that needs it.
        found: list[str] = error.args[1]
        return found[::-1]
    return []


def _within(path: Path, folder: Path) -> bool:
    return path == folder or folder in path.parents
