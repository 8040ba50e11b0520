"""Files to settings: which tables and keys there are, what `[defaults]` adds, who is called what. Pure.

`Reader` is given the content of files and reads all of it, whatever is wrong on the way. `checks` then looks
at how the settings fit together, and the `Report` of both raises one error.
"""

from __future__ import annotations

import fnmatch
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from asyncsup.config import checks
from asyncsup.config.machine import Machine
from asyncsup.config.problems import Layer, Place, Report, Source
from asyncsup.config.settings import (
    Config,
    Entries,
    GroupConfig,
    HooksConfig,
    LogConfig,
    PatchConduct,
    PatchConfig,
    PatchLimits,
    SocketConfig,
    SupervisorConfig,
    TargetConfig,
    TargetPatchConfig,
    options,
)
from asyncsup.config.values import (
    COMMAND_HINT,
    LIMITS,
    STRINGS,
    BadValueError,
    Scope,
    ValueType,
    escape,
    nearest,
    quoted,
    type_name,
)

_TABLES: Final = ("supervisor", "patch", "defaults", "target", "socket", "group")
_INCLUDED: Final = ("target", "socket")
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_TOML_ERROR: Final = re.compile(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", re.DOTALL)

_SYNTAX_HINTS: Final[Mapping[str, str]] = MappingProxyType({
    "invalid value": "texts need quotes; numbers, true and false have none",
    "invalid initial character for a key part": "a table in braces has to stand on one line",
})  # fmt: skip
"""What is usually behind what tomllib says."""

_OTHER_NAMES: Final[Mapping[str, str]] = MappingProxyType({
    "cmd": "command", "exec": "command", "args": "command", "script": "command", "execstart": "command",
    "cwd": "directory", "workdir": "directory", "working_dir": "directory", "workingdirectory": "directory",
    "environment": "env", "env_file": "env_files", "environmentfile": "env_files", "copy_env": "inherit_env",
    "uid": "user", "gid": "group", "numprocs": "instances", "numprocesses": "instances",
    "replicas": "instances", "requires": "depends_on", "after": "depends_on", "autorestart": "restart",
    "restart_policy": "restart", "respawn": "restart", "restartsec": "restart_delay",
    "backoff": "restart_delay", "startretries": "start_limit_burst", "startsecs": "min_uptime",
    "exitcodes": "success_exit_codes", "stopsignal": "stop_signal", "killsignal": "stop_signal",
    "stopwaitsecs": "stop_timeout", "graceful_timeout": "stop_timeout", "kill_timeout": "stop_timeout",
    "stdout_logfile": "log.stdout", "stderr_logfile": "log.stderr", "stdout": "log.stdout",
    "stderr": "log.stderr", "rlimits": "limits", "type": "oneshot", "watchdogsec": "watchdog_timeout",
    "runtimemaxsec": "max_age", "cron": "schedule", "cron_restart": "schedule",
    "readiness_probe": "ready", "liveness_probe": "liveness", "notification_fd": "ready.fd",
    "ready_log_line": "ready.log", "execstartpre": "hooks.pre_start", "execstartpost": "hooks.post_start",
    "execstoppost": "hooks.post_stop", "max_package": "limits.package_size",
    "memorymax": "limits.memory", "memoryhigh": "limits.memory_high", "cpuquota": "limits.cpus",
    "cpuweight": "limits.cpu_weight", "tasksmax": "limits.pids", "max_memory_restart": "limits.memory",
})  # fmt: skip
"""What other supervisors call our keys: nearer to what is meant than the nearest spelling."""


class TableRead(NamedTuple):
    """What was read of one table and the layers beneath it."""

    own: Layer
    values: dict[str, Any]
    places: Mapping[str, Place]
    """Where each key that was given stands, possibly in `[defaults]`, and also when it could not be read."""
    failed: frozenset[str]

    def place(self, name: str) -> Place:
        """Where a key stands, or would if it was given."""
        return self.places.get(name) or self.own.place(name)

    def has_own(self, name: str) -> bool:
        """Whether a key was given here, and not in `[defaults]`."""
        return name in self.own.table


class TargetRead(NamedTuple):
    """A target, and what is needed to say where its settings stand."""

    config: TargetConfig
    top: TableRead
    tables: Mapping[str, TableRead]
    """Of the tables in it, those that have keys of their own, by name: `log`, `ready` ..."""


class SocketRead(NamedTuple):
    """A socket, and where its settings stand."""

    config: SocketConfig
    read: TableRead


def parse_config(
    source: str | Mapping[str, Any],
    *,
    path: Path,
    includes: Mapping[Path, str | Mapping[str, Any]] = MappingProxyType({}),
    environ: Mapping[str, str] = MappingProxyType({}),
    machine: Machine | None = None,
) -> Config:
    """Read a configuration from its text, or from a mapping as tomllib makes it. Reads no file.

    Args:
        path: where it stands, or is taken to stand: relative paths in it are relative to its folder.
        includes: the included files, in order; the patterns under `include` are not looked up.
        environ: what ``${NAME}`` is replaced from.
        machine: answers whether folders, users and programs exist; None: that is not checked.

    Raises:
        ConfigError: with every problem in ``details["problems"]`` (see `Problem`), one to a line.
    """
    reader = Reader(environ=environ, machine=machine)
    reader.add(path, source, shown=str(path))
    reader.report.raise_problems()
    for included, content in includes.items():
        reader.add(included, content, shown=str(included))
    return reader.config()


class Reader:
    """Takes the files, the main one first, and makes a `Config` of them.

    When the main file cannot be read at all, ``report`` has the problem and nothing else can be asked for.
    """

    def __init__(self, *, environ: Mapping[str, str], machine: Machine | None) -> None:
        self.report = Report()
        self._environ = environ
        self._machine = machine
        self._sources: list[Source] = []
        self._count = 0

    # --- files ----------------------------------------------------------------------------------------------

    def add(self, path: Path, content: str | bytes | Mapping[str, Any] | OSError, *, shown: str) -> None:
        """Take one file, or the reason why it could not be read."""
        self._count += 1
        source = Source(absolute(path), shown=shown, number=self._count, data={})
        if isinstance(content, OSError):
            self.report.unusable(source, None, f"cannot be read: {content.strerror}")
            return
        if isinstance(content, bytes):
            try:
                content = content.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                line = error.object[: error.start].count(b"\n") + 1
                self.report.unusable(source, line, "is not UTF-8")
                return
        if isinstance(content, str):
            text = content
            try:
                data = tomllib.loads(text)
            except RecursionError:
                self.report.unusable(source, None, "is nested too deeply")
                return
            except ValueError as error:  # not only TOMLDecodeError: numbers of thousands of digits
                self._syntax_problem(source, text, str(error))
                return
            source = Source(source.path, shown=shown, number=source.number, data=data, text=text)
        else:
            source = Source(source.path, shown=shown, number=source.number, data=content)
        self._sources.append(source)

    def _syntax_problem(self, source: Source, text: str, message: str) -> None:
        line, where = None, ""
        if match := _TOML_ERROR.fullmatch(message):
            message = match[1]
            line = int(match[2]) if match[2] else text.count("\n") + 1
            where = f" at column {match[3]}" if match[3] else ""
        # tomllib quotes characters and keys of the text, control characters among them.
        message = "".join(c if c.isprintable() else escape(c) for c in message[:1].lower() + message[1:])
        self.report.unusable(source, line, f"not valid TOML{where}: {message}", _SYNTAX_HINTS.get(message))

    def include_patterns(self) -> tuple[Place, tuple[str, ...]]:
        """`include` of the main file; no patterns when it is not valid, which `config` will report."""
        layer = self._table(self._sources[0], "supervisor", quiet=True)
        try:
            patterns = STRINGS.read(layer.table.get("include", []), self._scope(layer))
        except BadValueError:
            patterns = ()
        return layer.place("include"), patterns

    # --- the whole ------------------------------------------------------------------------------------------

    def config(self) -> Config:
        """Read everything and check it.

        Raises:
            ConfigError: with every problem there is.
        """
        main = self._sources[0]
        self._check_top_level()
        supervisor, supervisor_read = self._supervisor()
        patch, patch_read = self._patch()
        targets = self._targets(supervisor, patch_read)
        sockets = self._sockets()
        check = checks.Checks(self.report, self._machine, self._environ)
        check.supervisor(supervisor, supervisor_read)
        check.patch(patch, patch_read)
        check.sockets(sockets)
        check.targets(targets, supervisor, patch, sockets, [source.path for source in self._sources])
        groups = self._groups(list(targets))
        self.report.raise_problems()
        check.warn(targets)
        if not targets:
            self.report.warn(Place(main, ("target",)), "there are no targets, so there is nothing to run")
        return Config(
            path=main.path,
            files=tuple(source.path for source in self._sources),
            include=tuple(str(main.path.parent / pattern) for pattern in self.include_patterns()[1]),
            supervisor=supervisor,
            patch=patch,
            targets=MappingProxyType({name: target.config for name, target in targets.items()}),
            groups=groups,
            sockets=MappingProxyType({name: socket.config for name, socket in sockets.items()}),
            warnings=self.report.warnings,
        )

    def supervisor(self) -> SupervisorConfig:
        """Read and check `[supervisor]` alone.

        Raises:
            ConfigError: with every problem there is in it.
        """
        supervisor, read = self._supervisor()
        checks.Checks(self.report, self._machine, self._environ).supervisor(supervisor, read)
        self.report.raise_problems()
        return supervisor

    def patch_limits(self) -> PatchLimits:
        """Read and check `[patch.limits]` alone.

        Raises:
            ConfigError: with every problem there is in it.
        """
        read = self._limits(self._table(self._sources[0], "patch"))
        self.report.raise_problems()
        return PatchLimits(**read.values)

    def _supervisor(self) -> tuple[SupervisorConfig, TableRead]:
        layer = self._table(self._sources[0], "supervisor")
        self._check_keys(layer, options(SupervisorConfig), "supervisor")
        read = self._read(SupervisorConfig, [layer])
        runtime_dir = read.values.setdefault("runtime_dir", read.values["state_dir"] / "run")
        read.values.setdefault("endpoint", f"ipc://{runtime_dir / 'control.sock'}")
        return SupervisorConfig(**read.values), read

    def _patch(self) -> tuple[PatchConfig, TableRead]:
        layer = self._table(self._sources[0], "patch")
        self._check_keys(layer, options(PatchConfig), "patch")
        read = self._read(PatchConfig, [layer])
        limits = self._limits(layer)
        return PatchConfig(**read.values, limits=PatchLimits(**limits.values)), read

    def _limits(self, patch: Layer) -> TableRead:
        layer = self._sub(patch, "limits") or Layer(patch.source, ("patch", "limits"), {})
        self._check_keys(layer, options(PatchLimits), "patch.limits")
        return self._read(PatchLimits, [layer])

    def _targets(self, supervisor: SupervisorConfig, patch: TableRead) -> dict[str, TargetRead]:
        defaults = self._table(self._sources[0], "defaults")
        conduct = {name: patch.values[name] for name in options(PatchConduct) if name in patch.values}
        inherited = {"region": supervisor.region}
        # A default has to be right even where no target uses it; the name it is read for does not matter.
        self._target("NAME", [defaults], inherited, conduct)
        targets: dict[str, TargetRead] = {}
        by_folded_name: dict[str, Layer] = {}
        for source in self._sources:
            table = self._table(source, "target")
            for name in table.table:
                layer = self._sub(table, name)
                if layer is not None and self._check_name(layer, name, by_folded_name):
                    beneath = _without_contradicting(defaults, layer)
                    targets[name] = self._target(name, [layer, beneath], inherited, conduct)
                    if "command" not in layer.table and "command" not in defaults.table:
                        self.report.problem(layer.place("command"), "is missing", COMMAND_HINT)
        return targets

    def _sockets(self) -> dict[str, SocketRead]:
        sockets: dict[str, SocketRead] = {}
        by_folded_name: dict[str, Layer] = {}
        for source in self._sources:
            table = self._table(source, "socket")
            for name in table.table:
                layer = self._sub(table, name)
                if layer is None or not self._check_name(layer, name, by_folded_name):
                    continue
                self._check_keys(layer, options(SocketConfig), "socket.NAME")
                read = self._read(SocketConfig, [layer])
                if "listen" in read.values:
                    sockets[name] = SocketRead(SocketConfig(**read.values), read)
                elif "listen" not in read.failed:
                    self.report.problem(
                        layer.place("listen"), "is missing", 'write listen = "tcp://127.0.0.1:8080"'
                    )
        return sockets

    def _groups(self, targets: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
        """The groups, each with the targets that its names and patterns mean."""
        groups: dict[str, tuple[str, ...]] = {}
        table = self._table(self._sources[0], "group")
        folded = {target.casefold(): target for target in targets}
        for name in table.table:
            layer = self._sub(table, name)
            if layer is None or not self._check_name(layer, name, {}):
                continue
            place = Place(layer.source, layer.keys)
            if (other := folded.get(name.casefold())) is not None:
                self.report.problem(place, f"there is a target {quoted(other)}: a name means one thing")
            self._check_keys(layer, options(GroupConfig), "group.NAME")
            read = self._read(GroupConfig, [layer])
            wanted = GroupConfig(**read.values).targets
            found = tuple(t for t in targets if any(fnmatch.fnmatchcase(t, pattern) for pattern in wanted))
            for pattern in wanted:
                if self.report.whole and not fnmatch.filter(targets, pattern):
                    near = nearest(pattern, targets)
                    hint = f"did you mean {quoted(near)}?" if near else None
                    self.report.problem(read.place("targets"), f"there is no target {quoted(pattern)}", hint)
            if not found and not read.failed and not wanted:
                self.report.problem(place, "has no targets", 'write targets = ["web", "worker*"]')
            groups[name] = found
        return MappingProxyType(groups)

    def _target(
        self, name: str, layers: Sequence[Layer], inherited: Mapping[str, Any], conduct: Mapping[str, Any]
    ) -> TargetRead:
        """Read a target from its layers, the strongest first."""
        own, keys = layers[0], options(TargetConfig)
        self._check_keys(own, keys, "target.NAME")
        top = self._read(TargetConfig, layers, name)
        values = {**inherited, **top.values}
        # A command that is missing or not readable has been reported: no Config will come of this.
        values.setdefault("command", ())
        if values.get("layout") != "tree" and not top.has_own("persist"):
            values.pop("persist", None)  # a default meant for the targets of the other layout
        tables: dict[str, TableRead] = {}
        for key, option in keys.items():
            if isinstance(option.type, ValueType):
                continue
            subs = [sub for layer in layers if (sub := self._sub(layer, key)) is not None]
            known = option.type.known if isinstance(option.type, Entries) else options(option.type)
            if known is not None and key in own.table and subs:
                self._check_keys(subs[0], known, f"target.NAME.{key}")
            if isinstance(option.type, Entries):
                if known is None:
                    self._check_variable_names(subs)
                values[key] = MappingProxyType(self._entries(option.type, subs, name))
            else:
                here = [] if key in own.table and subs else [Layer(own.source, (*own.keys, key), {})]
                read = self._read(option.type, [*here, *subs], name)
                given = {**conduct, **read.values} if option.type is TargetPatchConfig else read.values
                values[key] = option.type(**given)
                tables[key] = read
        return TargetRead(TargetConfig(name=name, **values), top, tables)

    # --- tables ---------------------------------------------------------------------------------------------

    def _scope(self, layer: Layer, name: str | None = None) -> Scope:
        return Scope(here=layer.source.path.parent, environ=self._environ, name=name)

    def _table(self, source: Source, name: str, *, quiet: bool = False) -> Layer:
        """A table of the top level; an empty one when it is not there."""
        return self._sub(Layer(source, (), source.data), name, quiet=quiet) or Layer(source, (name,), {})

    def _sub(self, layer: Layer, name: str, *, quiet: bool = False) -> Layer | None:
        """A table within a table; None when it is not there, or no table."""
        if name not in layer.table:
            return None
        value, place = layer.table[name], layer.place(name)
        if isinstance(value, Mapping):
            return Layer(layer.source, place.keys, value)
        if not quiet:
            tables = isinstance(value, list) and any(isinstance(item, Mapping) for item in value)
            single = "with single brackets" if tables else "and its keys below it"
            self.report.problem(
                place, f"must be a table, got {type_name(value)}", f"write [{place.key}] {single}"
            )
        return None

    def _read(self, settings: type, layers: Sequence[Layer], name: str | None = None) -> TableRead:
        """Read the keys of a table, each from the strongest layer that has it; leave out tables within it."""
        values: dict[str, Any] = {}
        places: dict[str, Place] = {}
        failed: set[str] = set()
        for key, option in options(settings).items():
            if not isinstance(option.type, ValueType):
                continue
            for layer in layers:
                if key not in layer.table:
                    continue
                places[key] = layer.place(key)
                try:
                    values[key] = option.type.read(layer.table[key], self._scope(layer, name))
                except BadValueError as bad:
                    self.report.problem(places[key], bad.problem, bad.hint)
                    failed.add(key)
                break
            if key not in values and option.depends is not None and option.depends.toml is not None:
                values[key] = option.type.read(option.depends.toml, self._scope(layers[0], name))
        return TableRead(layers[0], values, places, frozenset(failed))

    def _entries(self, entries: Entries, layers: Sequence[Layer], name: str) -> dict[str, Any]:
        """Read a table of entries: of each key, what the strongest layer says."""
        values: dict[str, Any] = {}
        for layer in reversed(layers):
            for key, value in layer.table.items():
                value_type = entries.value if entries.known is None else entries.known.get(key)
                if value_type is None:
                    continue  # reported as unknown
                try:
                    values[key] = value_type.read(value, self._scope(layer, name))
                except BadValueError as bad:
                    self.report.problem(layer.place(key), bad.problem, bad.hint)
        return values

    # --- names ----------------------------------------------------------------------------------------------

    def _check_top_level(self) -> None:
        main = self._sources[0]
        for source in self._sources:
            for name in source.data:
                place = Place(source, (name,))
                if name not in _TABLES:
                    self.report.problem(place, "unknown key", _top_level_hint(name))
                elif name not in _INCLUDED and source is not main:
                    self.report.problem(
                        place,
                        "an included file has only [target.NAME] and [socket.NAME] tables",
                        f"move [{name}] to {main.shown}",
                    )

    def _check_keys(self, layer: Layer, known: Mapping[str, object], table: str) -> None:
        for name in layer.table:
            if name not in known:
                place = Place(layer.source, (*layer.keys, name))
                self.report.problem(place, "unknown key", _unknown_key_hint(name, list(known), table))

    def _check_name(self, layer: Layer, name: str, by_folded_name: dict[str, Layer]) -> bool:
        """Whether the name of a target (group, socket) is a name, and not one that is taken."""
        place = Place(layer.source, layer.keys)
        if not _NAME.fullmatch(name):
            self.report.problem(
                place,
                "not a name for a target",
                'use 1 to 100 letters, digits, "_", "." and "-", the first no "." and no "-"',
            )
            return False
        if name.casefold() == "all":
            self.report.problem(place, '"all" stands for all targets and cannot be the name of one')
            return False
        other = by_folded_name.setdefault(name.casefold(), layer)
        if other is layer:
            return True
        first = Place(other.source, other.keys)
        if other.keys == layer.keys:
            self.report.problem(
                place,
                f"defined in {first.source.shown} and again in {layer.source.shown}",
                "remove one of them",
            )
        else:
            self.report.problem(
                place, f"differs only in case from {first.key} ({first.source.shown})", "rename one of them"
            )
        return False

    def _check_variable_names(self, layers: Sequence[Layer]) -> None:
        for layer in layers:
            for name in layer.table:
                if not name or "=" in name or "\0" in name:
                    self.report.problem(
                        layer.place(name), 'the name of a variable is not empty and has no "=" in it'
                    )
                elif name.startswith("ASYNCSUP_") and name in _own_variables():
                    self.report.problem(layer.place(name), "is set by asyncsup itself", "remove it")


def absolute(path: Path) -> Path:
    """The path without ``..``: as in all paths here, that is resolved before links are."""
    return Path(os.path.abspath(path))  # noqa: PTH100 - Path.absolute leaves `..` in


def _without_contradicting(defaults: Layer, own: Layer) -> Layer:
    """The defaults for a target: its own way to reload replaces theirs, although the keys differ."""
    if not any(key in own.table for key in checks.RELOADS):
        return defaults
    kept = {key: value for key, value in defaults.table.items() if key not in checks.RELOADS}
    return defaults._replace(table=kept)


def _top_level_hint(name: str) -> str:
    if near := nearest(name, _TABLES):
        return f'did you mean "{near}"?'
    if table := _table_of(name):
        return f"it belongs under [{table}]"
    return "the tables are [supervisor], [patch], [defaults], [target.NAME], [socket.NAME] and [group.NAME]"


def _unknown_key_hint(name: str, known: Sequence[str], table: str) -> str | None:
    if name == "name" and table == "target.NAME":
        return "the name stands in the header: [target.NAME]"
    ours = _OTHER_NAMES.get(name.casefold())
    if ours is not None and ours.partition(".")[0] in known:
        return f'did you mean "{ours}"?'
    if (home := _table_of(name)) is not None and home != table:
        return f"it belongs under [{home}]"
    if near := nearest(name, known):
        return f'did you mean "{near}"?'
    return f"the keys are {', '.join(known)}" if len(known) <= 12 else None


def _table_of(name: str) -> str | None:
    """The table that has a key of this name, when it is only one."""
    tables: Mapping[str, Mapping[str, object]] = {
        "supervisor": options(SupervisorConfig),
        "patch": options(PatchConfig),
        "patch.limits": options(PatchLimits),
        "target.NAME": options(TargetConfig),
        "group.NAME": options(GroupConfig),
        "socket.NAME": options(SocketConfig),
        "target.NAME.log": options(LogConfig),
        "target.NAME.hooks": options(HooksConfig),
        "target.NAME.limits": LIMITS,
    }
    homes = [table for table, keys in tables.items() if name in keys]
    return homes[0] if len(homes) == 1 else None


def _own_variables() -> frozenset[str]:
    from target_sdk import protocol  # noqa: PLC0415 - hardly any configuration gets here

    return frozenset(value for name, value in vars(protocol).items() if name.startswith("ENV_"))
