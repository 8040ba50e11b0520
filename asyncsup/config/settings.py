"""The settings of `asyncsup.toml` as typed, frozen values. Pure.

An option is declared once, as a field: the annotation says how its TOML value is read and shown, the field
says the default. Reading, merging `[defaults]`, `describe` and the reference in ``docs/configuration.md`` all
follow the fields (`options`). `asyncsup.config.reader` reads them.

There is no ``from __future__ import annotations`` here because the annotations are read at run time.
"""

import re
import signal
from collections.abc import Mapping
from enum import Enum, auto
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NamedTuple, cast

import msgspec
from msgspec import NODEFAULT
from msgspec.structs import asdict, fields

from asyncsup.config import values
from asyncsup.config.address import Address
from asyncsup.config.values import UNLIMITED, Condition, ValueType, choice, integer, toml_text
from asyncsup.patch.paths import MAX_DEPTH

if TYPE_CHECKING:
    from asyncsup.patch.manifest import Kind

    Kinds = frozenset[Kind]
else:
    Kinds = frozenset  # the module is slow to import, and clients never need it


class Default(NamedTuple):
    """A default that depends on other settings.

    ``toml`` is read as if it stood in the file; a default that only code can find has ``words`` for people.
    """

    toml: str | None = None
    words: str = ""


class Takes(Enum):
    """When a changed value takes effect; without this, at once."""

    AT_START = auto()
    """When the process it is about is started: an instance, or for `[supervisor]` and `[patch]` ourselves."""


class Entries(NamedTuple):
    """A table whose keys are the user's own (``known`` None) or the names of ``known``."""

    value: ValueType[Any]
    known: Mapping[str, ValueType[Any]] | None = None


SOCKET: Final = re.compile(r"\$\(socket\.([^)]*)\)")
"""In `command` and `env`: the number of the descriptor of that socket."""

Duration = Annotated[float, values.DURATION]
Timeout = Annotated[float, values.TIMEOUT]
Text = Annotated[str, values.TEXT]

LogLevel = Literal["debug", "info", "warning", "error"]
Orphans = Literal["adopt", "kill"]
Trust = Literal["digest", "none", "required"]
Layout = Literal["overlay", "tree"]
Protocol = Literal["sdk", "notify", "none"]
Restart = Literal["always", "on-failure", "unless-stopped", "never"]
KillMode = Literal["group", "process"]
CgroupMode = Literal["auto", "required", "optional", "off"]
LogFormat = Literal["raw", "prefix", "timestamp", "json"]
LogCompression = Literal["none", "gzip"]
Commit = Literal["auto", "manual"]
Readiness = Literal["exit", "http", "tcp", "exec", "log", "fd", "accepts", "notify", "sdk", "uptime"]
Drift = Literal["refuse", "keep", "overwrite"]
Rollback = Literal["auto", "manual"]


def _empty() -> Mapping[str, Any]:
    return MappingProxyType({})


def _all_kinds() -> Kinds:
    from asyncsup.patch.manifest import Kind  # noqa: PLC0415 - as above

    return frozenset(Kind)


class SupervisorConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`[supervisor]`: the supervisor itself, and where it keeps things."""

    region: Text = "local"
    """Where the targets run; a patch names the regions it is meant for."""
    state_dir: Annotated[Path, values.PATH, Default(".asyncsup"), Takes.AT_START]
    """Generations, the database, logs: what must survive a restart of the machine."""
    runtime_dir: Annotated[Path, values.PATH, Default(words="`STATE_DIR/run`"), Takes.AT_START]
    """Sockets: what need not."""
    endpoint: Annotated[
        str, values.ENDPOINT, Default(words="`ipc://RUNTIME_DIR/control.sock`"), Takes.AT_START
    ]
    """Where local clients connect to."""
    socket_mode: Annotated[int, values.SOCKET_MODE, Takes.AT_START] = 0o600
    """Permissions of the control socket and of the events: who may write may do everything."""
    socket_group: Annotated[str | None, values.TEXT, Takes.AT_START] = None
    """Whose group the two sockets are."""
    listen: Annotated[str | None, values.LISTEN, Takes.AT_START] = None
    """Where clients with an allowed key connect to; events are at the next port."""
    log_level: Annotated[LogLevel, choice(LogLevel)] = "info"
    """Of the supervisor's own log, on its standard error."""
    orphans: Annotated[Orphans, choice(Orphans)] = "adopt"
    """What becomes of instances that a supervisor which did not end in good order has left behind."""
    cgroup_root: Annotated[Path | None, values.PATH, Takes.AT_START] = None
    """Where the control groups of the instances are made, instead of in the one `serve` is in."""
    include: Annotated[tuple[str, ...], values.STRINGS] = ()
    """Patterns of files with more targets, relative to this file."""

    @property
    def events_endpoint(self) -> str:
        """Where events are published."""
        return f"ipc://{self.runtime_dir / 'events.sock'}"

    @property
    def target_endpoint(self) -> str:
        """Where instances with the SDK connect to."""
        return f"ipc://{self.runtime_dir / 'target.sock'}"


class PatchConduct(msgspec.Struct, frozen=True, kw_only=True):
    """How targets are patched: set in `[patch]`, overridden for one target in `.patch`."""

    ack_timeout: Timeout = 10.0
    """How long an instance may take to answer `prepare` and `reload`."""
    wait_max: Duration = 60.0
    """How long an instance may answer `wait`, all in all, before the patch is given up."""
    probation: Duration = 2.0
    """How long after the switch a failure still undoes the patch, unless the patch itself names a time."""
    commit: Annotated[Commit, choice(Commit)] = "auto"
    """``"manual"``: after its probation a patch waits for `asyncsup patch commit`."""
    rollback: Annotated[Rollback, choice(Rollback)] = "auto"
    """``"manual"``: a patch that fails after the switch stays, until somebody decides."""
    drift: Annotated[Drift, choice(Drift)] = "refuse"
    """What becomes of files that are not what a patch was made for."""


class PatchLimits(msgspec.Struct, frozen=True, kw_only=True):
    """`[patch.limits]`: what a package may cost at most.

    Checked on what the package declares, before anything is extracted; the declaration is then enforced.
    """

    package_size: Annotated[int, values.SIZE] = 2 << 30
    """Of the zip file."""
    files: Annotated[int, integer(1, 1_000_000)] = 50_000
    """Entries of the archive, folders included; and files of the manifest, deleted ones included."""
    file_size: Annotated[int, values.SIZE] = 4 << 30
    """Of one file, unpacked."""
    total_size: Annotated[int, values.SIZE] = 8 << 30
    """Of all files, unpacked."""
    ratio: Annotated[int, integer(1, 1_000_000)] = 200
    """Unpacked to packed size: of every file above 1 MiB, and of the whole."""
    path_depth: Annotated[int, integer(1, MAX_DEPTH)] = MAX_DEPTH
    """Components of a path below the target's root."""
    manifest_size: Annotated[int, values.SIZE] = 16 << 20
    """Ten thousand files take 1.4 MiB."""
    signatures: Annotated[int, integer(1, 1000)] = 32
    signature_size: Annotated[int, values.SIZE] = 64 << 10
    delta_size: Annotated[int, values.SIZE] = 128 << 20
    """The old and the new content of a file that comes as a delta, and the delta: all are held in memory."""


class PatchConfig(PatchConduct, frozen=True, kw_only=True):
    """`[patch]`: where patches come from, and what is asked of them."""

    inbox: Annotated[Path, values.PATH, Default("inbox"), Takes.AT_START]
    """The folder patches are dropped into."""
    trust: Annotated[Trust, choice(Trust)] = "digest"
    """What must be right besides the content: a digest, nothing, or signatures."""
    allowed_signers: Annotated[Path | None, values.PATH] = None
    """Whose signatures count: a file in OpenSSH's format."""
    signatures_required: Annotated[int, integer(1, 32)] = 1
    """By how many different keys a patch has to be signed."""
    keep: Annotated[int, integer(1, 10_000)] = 3
    """How many old generations of each target stay, to go back to."""
    auto: Annotated[bool, values.BOOLEAN, Takes.AT_START] = False
    """Apply what arrives in the inbox without being told to."""
    limits: PatchLimits = PatchLimits()


class TargetPatchConfig(PatchConduct, frozen=True, kw_only=True):
    """`[target.NAME.patch]`."""

    allow: Annotated[Kinds, values.ALLOW] = msgspec.field(default_factory=_all_kinds)
    """Kinds of patches the target takes; none at all for `[]`."""
    warm_program: Annotated[bool, values.BOOLEAN] = False
    """A warm patch may change the very file that `command` runs: being told makes the program run it anew."""
    canary: Annotated[int, integer(0, 10_000)] = 0
    """Of a cold patch: so many instances first, with a probation of their own, and then the others."""
    max_parallel: Annotated[int | None, integer(1, 10_000)] = None
    """At most so many instances are replaced at a time; by default all."""
    min_available: Annotated[int, integer(0, 10_000)] = 0
    """Never fewer than so many are ready, where they have to be stopped before they are started; less than
    `instances`."""


class LogConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`[target.NAME.log]`: where the output of the instances goes."""

    stdout: Annotated[Path | None, values.LOG_PATH, Default(words="`STATE_DIR/logs/NAME.INDEX.log`")] = None
    stderr: Annotated[Path | Literal["stdout"] | None, values.LOG_STDERR, Takes.AT_START] = "stdout"
    """``"stdout"``: into the same file. None (``"separate"``): ``STATE_DIR/logs/NAME.INDEX.err.log``."""
    format: Annotated[LogFormat, choice(LogFormat)] = "raw"
    max_size: Annotated[int, values.SIZE] = 50 * 10**6
    """A full file becomes ``FILE.1``, that ``FILE.2``, and so on."""
    max_files: Annotated[int, integer(1, 10_000)] = 10
    """How many files there are of one stream, the current one included."""
    max_age: Annotated[float | None, values.TIMEOUT] = None
    """A file this old is rotated too, whatever its size."""
    compress: Annotated[LogCompression, choice(LogCompression)] = "none"
    """What becomes of rotated files; in the background."""


class ProbeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What `.ready` and `.liveness` have in common: one question, and how often it is asked."""

    http: Annotated[str | None, values.URL] = None
    """GET it; an answer from 200 to 399 is a good one."""
    tcp: Annotated[str | None, values.ADDRESS] = None
    """Connect to it."""
    exec: Annotated[tuple[str, ...] | None, values.COMMAND] = None
    """Run it, as the instance itself is run; exit status 0 is a good answer."""
    interval: Timeout = 10.0
    """From one answer to the next question."""
    timeout: Timeout = 2.0
    """How long one answer may take."""


class ReadyConfig(ProbeConfig, frozen=True, kw_only=True):
    """`[target.NAME.ready]`: how it is known from outside that an instance can do its work."""

    interval: Timeout = 0.2
    log: Annotated[str | None, values.PATTERN] = None
    """A line of its output matches, as the program wrote it, whatever `log.format` is."""
    fd: Annotated[int | None, integer(3, 255), Takes.AT_START] = None
    """It writes a newline to this descriptor (s6)."""
    accepts: Annotated[bool, values.BOOLEAN] = False
    """It waits for connections at one of its `sockets`, which shows from outside."""
    notify: Annotated[bool, values.BOOLEAN, Takes.AT_START] = False
    """It says READY=1 to NOTIFY_SOCKET (sd_notify), whatever its protocol."""


class LivenessConfig(ProbeConfig, frozen=True, kw_only=True):
    """`[target.NAME.liveness]`: how it is known that an instance still does its work."""

    failure_threshold: Annotated[int, integer(1, 1000)] = 3
    """After this many bad answers in a row the instance is ended, and its restart policy applies."""


class HooksConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`[target.NAME.hooks]`: commands that are run at points in the life of an instance, or of a patch."""

    pre_start: Annotated[tuple[str, ...] | None, values.COMMAND] = None
    """Before the program; if it fails, so does the start."""
    post_start: Annotated[tuple[str, ...] | None, values.COMMAND] = None
    """Once the instance is ready."""
    pre_stop: Annotated[tuple[str, ...] | None, values.COMMAND] = None
    """Before the stop signal; within `stop_timeout`."""
    post_stop: Annotated[tuple[str, ...] | None, values.COMMAND] = None
    """Once the process and its group have ended, however they did."""
    pre_patch: Annotated[tuple[str, ...] | None, values.COMMAND] = None
    """Once for each patch, before the target's instances are asked; if it fails, the patch is refused."""
    post_patch: Annotated[tuple[str, ...] | None, values.COMMAND] = None
    """Once for each patch, when its instances have taken it up; if it fails, the patch is undone."""
    timeout: Timeout = 30.0
    """How long each may take."""


class TargetConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`[target.NAME]`, with `[defaults]` and `[patch]` already beneath it.

    Commands, ``env`` and log paths may still contain ``${instance}`` (`values.INSTANCE`), which is
    replaced at each start.
    """

    name: str
    command: Annotated[tuple[str, ...], values.COMMAND, Takes.AT_START]
    directory: Annotated[Path, values.PATH, Default("."), Takes.AT_START]
    """The working directory of the instances."""
    env: Annotated[Mapping[str, str], Entries(values.ENV_VALUE), Takes.AT_START] = msgspec.field(
        default_factory=_empty
    )
    env_files: Annotated[tuple[Path, ...], values.PATHS, Takes.AT_START] = ()
    """Files of NAME=VALUE lines, read at each start; ``env`` wins over them."""
    inherit_env: Annotated[bool | tuple[str, ...], values.INHERIT, Takes.AT_START] = True
    """The supervisor's own environment: all of it, nothing but PATH, or these variables."""
    user: Annotated[str | None, values.TEXT, Takes.AT_START] = None
    group: Annotated[str | None, values.TEXT, Takes.AT_START] = None
    umask: Annotated[int | None, values.UMASK, Takes.AT_START] = None
    instances: Annotated[int, integer(0, 10_000)] = 1
    autostart: Annotated[bool | Literal["on-demand"], values.AUTOSTART] = True
    """Start with the supervisor, or when somebody connects to one of its sockets."""
    sockets: Annotated[tuple[str, ...], values.STRINGS, Takes.AT_START] = ()
    """Sockets of ours that its instances are given, as descriptors from 3 on (LISTEN_FDS)."""
    overlap: Annotated[bool | None, values.BOOLEAN, Default(words="whether it has `sockets`")] = None
    """A replacement is started, and ready, before the one it replaces is stopped."""
    drain_timeout: Duration = 30.0
    """How long one that was replaced may take to finish what it has begun, before its stop signal."""
    depends_on: Annotated[Mapping[str, Condition], values.DEPENDS] = msgspec.field(default_factory=_empty)
    """What must have become of which targets before this one is started."""
    oneshot: Annotated[bool, values.BOOLEAN, Takes.AT_START] = False
    """Its instances are meant to end: it is ready when they have, with success."""
    schedule: Annotated[str | None, values.SCHEDULE] = None
    """When it is started (oneshot) or restarted: a cron expression, in local time."""
    max_age: Annotated[float | None, values.TIMEOUT] = None
    """How long an instance may be up: it is then restarted, or, if it is a oneshot, ended."""

    root: Annotated[Path | None, values.PATH, Takes.AT_START] = None
    """The resources: what patches change. A target without one cannot be patched."""
    layout: Annotated[Layout, choice(Layout), Takes.AT_START] = "overlay"
    persist: Annotated[tuple[str, ...], values.PERSIST, Takes.AT_START] = ()
    """Paths below root that are not part of any generation."""
    region: Annotated[str, values.TEXT, Default(words="`region` of `[supervisor]`"), Takes.AT_START] = "local"
    build: Annotated[int, integer(0)] = 0
    """The build of root before the first patch."""

    protocol: Annotated[Protocol, choice(Protocol), Takes.AT_START] = "none"
    """How an instance says that it is ready: by the SDK, by sd_notify, or by staying up for min_uptime."""
    restart: Annotated[Restart, choice(Restart)] = "on-failure"
    restart_delay: Duration = 1.0
    """Before the first restart of a process that did not stay up; doubles each time."""
    restart_max_delay: Duration = 30.0
    start_limit_burst: Annotated[int, integer(1)] = 10
    """After this many restarts within start_limit_interval the instance has failed."""
    start_limit_interval: Duration = 60.0
    """0 for no limit."""
    min_uptime: Duration = 1.0
    start_timeout: Timeout = 30.0
    """How long a target with a protocol may take to become ready."""
    success_exit_codes: Annotated[tuple[int, ...], values.EXIT_CODES] = (0,)
    essential: Annotated[bool, values.BOOLEAN] = False
    """The supervisor ends when an instance has ended and is not to be started again."""

    stop_signal: Annotated[signal.Signals, values.STOP_SIGNAL] = signal.SIGTERM
    stop_timeout: Duration = 10.0
    """After it, SIGKILL."""
    stop_command: Annotated[tuple[str, ...] | None, values.COMMAND] = None
    kill_mode: Annotated[KillMode, choice(KillMode), Takes.AT_START] = "group"
    reload_signal: Annotated[signal.Signals | None, values.RELOAD_SIGNAL] = None
    reload_command: Annotated[tuple[str, ...] | None, values.COMMAND] = None
    reload_timeout: Timeout = 10.0
    watchdog_timeout: Annotated[float | None, values.TIMEOUT, Takes.AT_START] = None
    """How long an instance may be silent: no WATCHDOG=1 (sd_notify), no answer to a ping (SDK)."""
    fd_store_max: Annotated[int, integer(0, 512), Takes.AT_START] = 0
    """How many descriptors an instance may store for its next start (sd_notify: FDSTORE=1)."""

    ready: ReadyConfig = msgspec.field(default_factory=ReadyConfig)
    liveness: LivenessConfig = msgspec.field(default_factory=LivenessConfig)
    hooks: HooksConfig = msgspec.field(default_factory=HooksConfig)
    log: LogConfig = msgspec.field(default_factory=LogConfig)
    cgroup: Annotated[CgroupMode, choice(CgroupMode), Takes.AT_START] = "auto"
    """Whether an instance has a control group, and whether it may be started without what it asks of one."""
    limits: Annotated[Mapping[str, Any], Entries(values.LIMIT_COUNT, values.LIMITS), Takes.AT_START] = (
        msgspec.field(default_factory=_empty)
    )
    """Name to value (`RLIMITS`, `CGROUP_LIMITS`); `UNLIMITED` for no limit."""
    patch: TargetPatchConfig = msgspec.field(default_factory=TargetPatchConfig)

    @property
    def overlaps(self) -> bool:
        """Whether a replacement is started before the one it replaces is stopped."""
        return bool(self.sockets) if self.overlap is None else self.overlap

    @property
    def remembers_wishes(self) -> bool:
        """Whether that an operator has stopped it counts for later supervisors, too."""
        return self.restart == "unless-stopped" or self.schedule is not None

    @property
    def rolls(self) -> bool:
        """Whether a cold patch replaces its instances after the switch, some at a time if need be."""
        patch = self.patch
        return self.overlaps or bool(patch.canary or patch.min_available) or patch.max_parallel is not None

    @property
    def readiness(self) -> Readiness:
        """What makes an instance ready. What is asked from outside goes before what it says itself."""
        if self.oneshot:
            return "exit"
        asked: tuple[Readiness, ...] = ("http", "tcp", "exec", "log", "fd")
        for key in asked:
            if getattr(self.ready, key) is not None:
                return key
        if self.ready.accepts:
            return "accepts"
        if self.speaks_notify:
            return "notify"
        return "sdk" if self.protocol == "sdk" else "uptime"

    def __repr__(self) -> str:
        shown = (f"{name}={value!r}" for name, value in asdict(self).items() if name != "env")  # secrets
        return f"TargetConfig({', '.join(shown)})"

    @property
    def rlimits(self) -> Mapping[str, int]:
        """The limits of each process."""
        return {name: value for name, value in self.limits.items() if name in values.RLIMITS}

    @property
    def cgroup_limits(self) -> Mapping[str, float]:
        """The limits of all processes of an instance together."""
        return {name: value for name, value in self.limits.items() if name in values.CGROUP_LIMITS}

    @property
    def speaks_notify(self) -> bool:
        """Whether its instances are given a NOTIFY_SOCKET."""
        return self.protocol == "notify" or self.ready.notify

    @property
    def tells_watchdog(self) -> bool:
        """Whether its instances are told to say WATCHDOG=1, and how often."""
        return self.speaks_notify and self.watchdog_timeout is not None


class GroupConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`[group.NAME]`: one name for several targets, wherever a command takes names."""

    targets: Annotated[tuple[str, ...], values.STRINGS] = ()
    """Names of targets, or patterns of such."""


class SocketConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`[socket.NAME]`: a socket that is bound once, by the supervisor, and handed to targets."""

    listen: Annotated[Address, values.BIND]
    """Where it is bound."""
    backlog: Annotated[int, integer(1, 65_535)] = 4096
    """How many connections may wait to be accepted; the kernel has a limit, too (net.core.somaxconn)."""
    mode: Annotated[int, values.SOCKET_MODE] = 0o600
    """Permissions of a UNIX socket: who may write to it may connect."""
    user: Annotated[str | None, values.TEXT] = None
    """Whose a UNIX socket is."""
    group: Annotated[str | None, values.TEXT] = None


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """A whole configuration that has passed every check. All paths are absolute."""

    path: Path
    files: tuple[Path, ...]
    """It, and what it includes."""
    include: tuple[str, ...]
    """The patterns that were looked up for that, absolute."""
    supervisor: SupervisorConfig
    patch: PatchConfig
    targets: Mapping[str, TargetConfig]
    """By name, in the order of the files."""
    groups: Mapping[str, tuple[str, ...]] = msgspec.field(default_factory=_empty)
    """By name, the names of their targets, in the order of the files."""
    sockets: Mapping[str, SocketConfig] = msgspec.field(default_factory=_empty)
    warnings: tuple[str, ...] = ()
    """What is allowed but probably not meant, one sentence each."""

    def describe(self, name: str) -> dict[str, Any]:
        """The settings of one target, as `describe` has them."""
        return describe(self.targets[name])


class Option(NamedTuple):
    """One key of a table."""

    name: str
    type: ValueType[Any] | Entries | type
    """How its value is read; for a table of its own `Entries`, or the struct of its keys."""
    default: Any
    """Or a function that makes it (`field`'s ``default_factory``); NODEFAULT for a key that is required."""
    depends: Default | None
    at_start: bool
    """Whether a running process keeps the value it was started with."""

    @property
    def type_text(self) -> str:
        """The type, for the reference."""
        return self.type.name if isinstance(self.type, ValueType) else "table"

    @property
    def default_text(self) -> str:
        """The default, for the reference (Markdown)."""
        if self.depends is not None:
            return self.depends.words or f"`{toml_text(self.depends.toml)}`"
        if self.default is NODEFAULT:
            return "required"
        if self.default is None:
            return "not set"
        if not isinstance(self.type, ValueType):
            return "`{}`"
        return f"`{self.type.show(self.default() if callable(self.default) else self.default)}`"


@cache
def options(settings: type) -> Mapping[str, Option]:
    """The keys of the table that a settings class stands for, in order."""
    found: dict[str, Option] = {}
    for item in fields(settings):
        metadata = getattr(item.type, "__metadata__", ())
        depends = next((entry for entry in metadata if isinstance(entry, Default)), None)
        kind = next((entry for entry in metadata if isinstance(entry, ValueType | Entries)), None)
        if kind is None and not _is_table(item.type):
            continue  # a target's name, which stands in the header
        default = item.default if item.default_factory is NODEFAULT else item.default_factory
        at_start = Takes.AT_START in metadata
        found[item.name] = Option(item.name, kind or cast(type, item.type), default, depends, at_start)
    return MappingProxyType(found)


def _is_table(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def describe(target: TargetConfig) -> dict[str, Any]:
    """A target's settings as JSON values, for `show`; of `env` only the names: values may be secrets."""
    return {"name": target.name, **_described(target), "env": sorted(target.env)}


def _described(settings: Any) -> dict[str, Any]:
    settings_class: type = type(settings)
    return {name: _json_value(getattr(settings, name), name) for name in options(settings_class)}


def _json_value(value: Any, name: str = "") -> Any:
    if name == "umask" and value is not None:
        return f"{value:03o}"
    if isinstance(value, msgspec.Struct):
        return _described(value)
    if isinstance(value, signal.Signals):
        return value.name
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, frozenset):
        return sorted(map(str, value))
    if isinstance(value, tuple):
        return [_json_value(item) for item in value]
    if isinstance(value, Mapping):
        return {key: "unlimited" if item == UNLIMITED else item for key, item in value.items()}
    return value
