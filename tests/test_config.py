"""Configuration: what is read, what it becomes, and how every mistake in it is told."""

from __future__ import annotations

import datetime
import os
import pwd
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from asyncsup.config import (
    INSTANCE,
    UNLIMITED,
    Config,
    Machine,
    TargetConfig,
    describe,
    find_config,
    format_duration,
    format_size,
    load_config,
    load_supervisor,
    parse_config,
    parse_duration,
    parse_size,
)
from asyncsup.config.settings import (
    Entries,
    GroupConfig,
    HooksConfig,
    LivenessConfig,
    LogConfig,
    PatchConduct,
    PatchConfig,
    PatchLimits,
    ReadyConfig,
    SocketConfig,
    SupervisorConfig,
    TargetPatchConfig,
    options,
)
from asyncsup.config.toml_lines import find_lines
from asyncsup.config.values import LIMITS, MAX_DURATION, Scope, ValueType
from asyncsup.errors import ConfigError
from asyncsup.patch.manifest import Kind
from asyncsup.restart import RestartMode

HERE = Path("/etc/app")
FILE = HERE / "asyncsup.toml"
DOCS = Path(__file__).parent.parent / "docs" / "configuration.md"


def parse(text: str, *, environ: Mapping[str, str] | None = None, **more: Any) -> Config:
    return parse_config(text, path=FILE, environ=environ or {}, **more)


def target(body: str, *, before: str = "", environ: Mapping[str, str] | None = None) -> TargetConfig:
    """The target of a configuration that has only one."""
    command = "" if re.search(r"^command\b", body, re.MULTILINE) else 'command = "x"\n'
    (found,) = parse(f"{before}\n[target.web]\n{command}{body}", environ=environ).targets.values()
    return found


def error_of(text: str, *, environ: Mapping[str, str] | None = None, **more: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse(text, environ=environ, **more)
    return caught.value


def problems_of(text: str, **more: Any) -> list[dict[str, Any]]:
    problems: list[dict[str, Any]] = error_of(text, **more).details["problems"]
    return problems


def problem_of(body: str, *, table: str = "target.web", **more: Any) -> dict[str, Any]:
    """The only problem of a table."""
    command = 'command = "x"\n' if table == "target.web" and not body.startswith("command") else ""
    (problem,) = problems_of(f"[{table}]\n{command}{body}", **more)
    return problem


# --- defaults and structure ---------------------------------------------------------------------------------


def test_the_smallest_configuration_has_every_default() -> None:
    config = parse('[target.web]\ncommand = ["sleep", "1"]\n')
    assert config == Config(
        path=FILE,
        files=(FILE,),
        include=(),
        supervisor=SupervisorConfig(
            state_dir=HERE / ".asyncsup",
            runtime_dir=HERE / ".asyncsup/run",
            endpoint="ipc:///etc/app/.asyncsup/run/control.sock",
        ),
        patch=PatchConfig(inbox=HERE / "inbox"),
        targets={"web": TargetConfig(name="web", command=("sleep", "1"), directory=HERE)},
    )
    assert config.supervisor.events_endpoint == "ipc:///etc/app/.asyncsup/run/events.sock"
    assert config.supervisor.target_endpoint == "ipc:///etc/app/.asyncsup/run/target.sock"


def test_the_defaults_are_the_agreed_ones() -> None:
    web = target("")
    assert (web.instances, web.autostart, web.essential, web.depends_on) == (1, True, False, {})
    assert (web.restart, web.restart_delay, web.restart_max_delay) == ("on-failure", 1.0, 30.0)
    assert (web.start_limit_burst, web.start_limit_interval, web.min_uptime) == (10, 60.0, 1.0)
    assert (web.start_timeout, web.stop_timeout, web.reload_timeout) == (30.0, 10.0, 10.0)
    assert (web.stop_signal, web.kill_mode, web.success_exit_codes) == (signal.SIGTERM, "group", (0,))
    assert (web.protocol, web.layout, web.build, web.region) == ("none", "overlay", 0, "local")
    assert (web.inherit_env, web.umask, web.user, web.group) == (True, None, None, None)
    assert web.log == LogConfig(stdout=None, stderr="stdout", format="raw", max_size=50_000_000, max_files=10)
    assert web.patch == TargetPatchConfig(
        allow=frozenset({Kind.WARM, Kind.COLD}), ack_timeout=10.0, wait_max=60.0, probation=2.0
    )
    patch = parse("").patch
    assert (patch.trust, patch.keep, patch.auto) == ("digest", 3, False)
    assert patch.limits == PatchLimits(
        package_size=2 << 30, files=50_000, file_size=4 << 30, total_size=8 << 30, ratio=200, path_depth=64,
        manifest_size=16 << 20, signatures=32, signature_size=64 << 10, delta_size=128 << 20,
    )  # fmt: skip


@pytest.mark.parametrize(
    "kind", [SupervisorConfig, PatchConfig, PatchLimits, TargetConfig, LogConfig, TargetPatchConfig]
)
def test_every_default_reads_back_as_it_is_shown(kind: type) -> None:
    scope = Scope(here=HERE, environ={})
    checked = 0
    for option in options(kind).values():
        default = option.default() if callable(option.default) else option.default
        if not isinstance(option.type, ValueType) or default in (msgspec.NODEFAULT, None):
            continue
        shown = tomllib.loads(f"k = {option.type.show(default)}")["k"]
        assert option.type.read(shown, scope) == default
        checked += 1
    assert checked


def test_settings_are_frozen_and_do_not_show_the_environment() -> None:
    web = target('env = { TOKEN = "hush" }')
    with pytest.raises(AttributeError):
        web.build = 5  # type: ignore[misc]
    with pytest.raises(TypeError):
        web.env["TOKEN"] = "other"  # type: ignore[index]
    assert "hush" not in repr(web)


def test_the_restart_modes_are_those_of_the_restart_policy() -> None:
    for mode in get_args(RestartMode):
        assert target(f'restart = "{mode}"').restart == mode


def test_targets_keep_the_order_of_the_file() -> None:
    text = "".join(f'[target.{name}]\ncommand = "x"\n' for name in ("zeta", "alpha", "mid"))
    assert list(parse(text).targets) == ["zeta", "alpha", "mid"]


def test_a_configuration_without_targets_is_warned_about() -> None:
    config = parse("")
    assert config.targets == {}
    assert len(config.warnings) == 1
    assert "nothing to run" in config.warnings[0]


def test_a_mapping_is_read_like_the_text_it_would_be() -> None:
    text = '[target.web]\ncommand = "a b"\n[target.web.log]\nmax_size = "1MB"\n'
    assert parse_config(tomllib.loads(text), path=FILE) == parse(text)


# --- values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("10s", 10.0), ("500ms", 0.5), ("2m", 120.0), ("1h", 3600.0), ("1.5s", 1.5), ("1d", 86400.0),
        ("1h30m", 5400.0), ("1 h 30 m", 5400.0), ("0.25ms", 0.00025), ("0s", 0.0), (3, 3.0),
        (2.5, 2.5), (0, 0.0),
        ("365d", MAX_DURATION),
    ],
)  # fmt: skip
def test_durations(written: object, seconds: float) -> None:
    assert parse_duration(written) == seconds
    value = f'"{written}"' if isinstance(written, str) else written
    assert target(f"stop_timeout = {value}").stop_timeout == seconds


@pytest.mark.parametrize(
    "written",
    ["", "s", "10", "10 seconds", "1 0s", "10s ", " 10s", "-5s", "1e3s", "1.s", ".5s", "10S", "5x", "366d",
     "\u0661s", -1, -0.5, 1e300,
     10**400, float("nan"), float("inf"), True, None, [], {}, datetime.time(1, 2)],
)  # fmt: skip
def test_what_is_no_duration_is_refused(written: object) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_duration(written)
    with pytest.raises(ConfigError):
        parse_config({"target": {"web": {"command": "x", "stop_timeout": written}}}, path=FILE)


def test_a_duration_without_a_unit_is_told_what_to_write() -> None:
    assert problem_of('stop_timeout = "10"')["hint"] == 'write "10s" for seconds'


@given(
    st.floats(0, MAX_DURATION)
    | st.integers(0, int(MAX_DURATION))
    | st.integers(0, 10**6).map(lambda n: n / 1000)
)
def test_durations_read_back_as_they_are_written(value: float) -> None:
    seconds = parse_duration(value)
    assert abs(seconds - value) <= 5e-7
    assert parse_duration(format_duration(seconds)) == seconds


@pytest.mark.parametrize(
    ("seconds", "written"),
    [
        (0, "0s"),
        (0.5, "500ms"),
        (0.0005, "0.5ms"),
        (1.5, "1.5s"),
        (60, "1m"),
        (90, "90s"),
        (7200, "2h"),
        (86400, "1d"),
    ],
)
def test_durations_are_written_for_people(seconds: float, written: str) -> None:
    assert format_duration(seconds) == written


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("50MB", 50_000_000), ("1GiB", 2**30), ("64KiB", 65536), ("1.5GB", 1_500_000_000), ("1 kB", 1000),
        ("1mib", 2**20), ("7B", 7), ("2TB", 2 * 10**12), ("0.5KiB", 512), (123, 123),
    ],
)  # fmt: skip
def test_sizes(written: object, size: int) -> None:
    assert parse_size(written) == size
    value = f'"{written}"' if isinstance(written, str) else written
    assert target(f"log.max_size = {value}").log.max_size == size


@pytest.mark.parametrize(
    "written",
    ["", "MB", "50", "50M", "50 M", "-1MB", "1.0001KiB", "0.5B", "1e3MB", "5XB", "9" * 30 + "B", "99999999TB",
     "iB", "\u0665B", -1, 2**63, 10**400, 1.5, True, None, []],
)  # fmt: skip
def test_what_is_no_size_is_refused(written: object) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_size(written)
    with pytest.raises(ConfigError):
        parse_config({"target": {"web": {"command": "x", "log": {"max_size": written}}}}, path=FILE)


@given(
    st.integers(0, 2**63 - 1)
    | st.integers(0, 10**6).map(lambda n: n * 1000)
    | st.integers(0, 2**20).map(lambda n: n * 1024)
)
def test_sizes_read_back_as_they_are_written(size: int) -> None:
    assert parse_size(format_size(size)) == size


@pytest.mark.parametrize("written", ['"TERM"', '"SIGTERM"', '"term"', '"sigterm"', "15", '"15"', '"00015"'])
def test_signals(written: str) -> None:
    assert target(f"stop_signal = {written}").stop_signal is signal.SIGTERM


@pytest.mark.parametrize(
    "written",
    ['"TREM"', '""', "0", "999", "-1", "true", "1.5", '"SIGSIG"', '"00000"', '"150000"', f'"{"9" * 5000}"'],
)
def test_what_is_no_signal_is_refused(written: str) -> None:
    assert problem_of(f"stop_signal = {written}")["key"] == "target.web.stop_signal"


def test_a_misspelt_signal_names_the_nearest() -> None:
    assert problem_of('stop_signal = "TREM"')["hint"] == 'did you mean "TERM"?'


@pytest.mark.parametrize("name", ["STOP", "CONT", "TSTP"])
def test_a_signal_that_ends_nothing_is_no_stop_signal(name: str) -> None:
    assert "cannot end" in problem_of(f'stop_signal = "{name}"')["problem"]


@pytest.mark.parametrize("name", ["KILL", "STOP"])
def test_a_signal_no_program_can_handle_is_no_reload_signal(name: str) -> None:
    assert "cannot reload" in problem_of(f'reload_signal = "{name}"')["problem"]


@pytest.mark.parametrize(("written", "umask"), [("022", 0o022), ("0027", 0o027), ("777", 0o777), ("0", 0)])
def test_umask_is_octal(written: str, umask: int) -> None:
    assert target(f'umask = "{written}"').umask == umask


@pytest.mark.parametrize("written", ['"888"', '"1777"', '""', '"-22"', '"0o22"', "18", "0o022"])
def test_a_umask_that_is_not_an_octal_string_is_refused(written: str) -> None:
    assert problem_of(f"umask = {written}")["hint"] == 'write it as "022"'


def test_commands_are_arrays_or_are_split_without_a_shell() -> None:
    assert target('command = ["a", "b c", ""]').command == ("a", "b c", "")
    assert target("""command = "a 'b c' \\"d\\" # e" """).command == ("a", "b c", "d", "#", "e")
    assert target('stop_command = "kill $MAINPID"').stop_command == ("kill", "$MAINPID")


@pytest.mark.parametrize(
    "written", ['"a \'b"', '""', "[]", '[""]', '["a", 1]', "5", "[[]]", '" "', '"a\\\\"']
)
def test_what_is_no_command_is_refused(written: str) -> None:
    assert problem_of(f"command = {written}")["key"] == "target.web.command"


def test_an_unclosed_quote_says_so() -> None:
    problem = problem_of('command = "echo \'hello"')
    assert problem["problem"] == "cannot be split into words: no closing quotation"


def test_a_missing_command_is_told_with_the_line_of_its_target() -> None:
    (problem,) = problems_of("# a comment\n\n[target.web]\ninstances = 2\n")
    assert (problem["key"], problem["line"], problem["value"]) == ("target.web.command", 3, None)


@pytest.mark.parametrize("number", [0, 1, 10_000])
def test_instances_in_range(number: int) -> None:
    assert target(f"instances = {number}").instances == number


@pytest.mark.parametrize("written", ["-1", "10001", "1.0", '"2"', "true", "0x" + "f" * 6000])
def test_instances_out_of_range(written: str) -> None:
    assert problem_of(f"instances = {written}")["key"] == "target.web.instances"


def test_numbers_and_booleans_in_quotes_are_told_to_lose_them() -> None:
    assert problem_of('instances = "2"')["hint"] == "write it without quotes"
    assert problem_of('autostart = "true"')["hint"] == "write it without quotes"
    assert problem_of("region = 5")["hint"] == "write it in quotes"
    assert problem_of('depends_on = "db"')["hint"] == 'write ["db"]'


def test_success_exit_codes() -> None:
    assert target("success_exit_codes = [0, 143]").success_exit_codes == (0, 143)
    for bad in ("[256]", "[-1]", '["0"]', "0", "[true]"):
        assert problem_of(f"success_exit_codes = {bad}")["key"] == "target.web.success_exit_codes"


def test_inherit_env_is_a_boolean_or_names() -> None:
    assert target("inherit_env = false").inherit_env is False
    assert target('inherit_env = ["PATH", "HOME"]').inherit_env == ("PATH", "HOME")
    for bad in ('"PATH"', "1", '["A", "A"]', '[""]'):
        assert problem_of(f"inherit_env = {bad}")["key"] == "target.web.inherit_env"


def test_durations_that_must_not_be_zero() -> None:
    for key in ("start_timeout", "reload_timeout"):
        assert problem_of(f"{key} = 0")["problem"] == "must be more than 0"
    assert target("stop_timeout = 0").stop_timeout == 0


def test_a_choice_names_the_alternatives_and_the_nearest() -> None:
    error = error_of('\n[target.web]\ncommand = "x"\nrestart = "allways"\n')
    assert error.message == (
        f'{FILE}:4: target.web.restart = "allways": not one of always, on-failure, unless-stopped, never; '
        'did you mean "always"?'
    )
    assert error.error_code == "config.invalid"
    assert error.exit_status == 5
    assert error.details["problems"] == [{
        "file": str(FILE), "line": 4, "key": "target.web.restart", "value": '"allways"',
        "problem": "not one of always, on-failure, unless-stopped, never", "hint": 'did you mean "always"?',
    }]  # fmt: skip


def test_limits_are_counts_sizes_or_seconds() -> None:
    limits = target(
        '[target.web.limits]\nnofile = 1024\nnproc = "unlimited"\ncpu = "1m"\n'
        'core = 0\nas = "1GiB"\nstack = 8192\n'
    ).limits
    assert limits == {
        "nofile": 1024, "nproc": UNLIMITED, "cpu": 60, "core": 0, "as": 2**30, "stack": 8192,
    }  # fmt: skip


@pytest.mark.parametrize(
    "written",
    [
        'nofile = "64KiB"',
        "nofile = -1",
        'as = "lots"',
        'cpu = "1.5s"',
        'cpu = "0s"',
        "nofile = true",
        'core = ""',
    ],
)
def test_what_is_no_limit_is_refused(written: str) -> None:
    assert problem_of(f"[target.web.limits]\n{written}")["key"].startswith("target.web.limits.")


def test_a_limit_the_machine_does_not_know_is_an_unknown_key() -> None:
    problem = problem_of("limits.nofiles = 5")
    assert (problem["problem"], problem["hint"]) == ("unknown key", 'did you mean "nofile"?')


def test_allow() -> None:
    assert target('patch.allow = ["warm"]').patch.allow == frozenset({Kind.WARM})
    assert target("patch.allow = []").patch.allow == frozenset()
    assert problem_of('patch.allow = ["wram"]')["hint"] == 'did you mean "warm"?'


def test_stderr_has_three_ways() -> None:
    assert target('log.stderr = "stdout"').log.stderr == "stdout"
    assert target('log.stderr = "separate"').log.stderr is None
    assert target('log.stderr = "err.log"').log.stderr == HERE / "err.log"
    assert target('log.stderr = "./stdout"').log.stderr == HERE / "stdout"


def test_persist_is_relative_and_clean() -> None:
    tree = 'root = "work"\nlayout = "tree"\n'
    assert target(f'{tree}persist = ["data/", "var/cache"]').persist == ("data", "var/cache")
    for bad in (
        '["/data"]',
        '["../x"]',
        '["a/../b"]',
        '["."]',
        '["a//b"]',
        '["a", "a/"]',
        '["a", "a/b"]',
        '"data"',
    ):
        assert problem_of(f"{tree}persist = {bad}")["key"] == "target.web.persist"


@pytest.mark.parametrize("character", ["\\u0000", "\\u0007"])
def test_control_characters_are_refused_and_not_printed(character: str) -> None:
    error = error_of(f'[target.web]\ncommand = "x"\nregion = "a{character}b"\n')
    assert error.message.isprintable()
    assert error_of(f'[target.web]\ncommand = ["x", "{chr(92)}u0000"]\n').message.isprintable()


# --- environment --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", ["8080", "true", "1.5", "[]", "{}", "2024-01-01"])
def test_a_value_of_env_that_is_no_string_is_told_to_be_quoted_and_not_shown(written: str) -> None:
    problem = problem_of(f"[target.web.env]\nPORT = {written}")
    assert (problem["key"], problem["value"]) == ("target.web.env.PORT", None)
    assert problem["problem"].startswith("must be a string")
    if written[0].isdigit() and "-" not in written:
        assert problem["hint"] == "write it in quotes"


@pytest.mark.parametrize(
    "text",
    [
        'env = "TOKEN=hush"',
        'env = ["TOKEN=hush"]',
        'env = { TOKEN = ["hush"] }',
        'env = { TOKEN = "hush ${NOPE}" }',
        'env = { TOKEN = "hush ${" }',
        'environment = { TOKEN = "hush" }',
        'enw = "TOKEN=hush"',
        'log = { env = "hush" }',
    ],
)
def test_what_may_be_a_secret_is_never_shown(text: str) -> None:
    for where in ("[target.web]\ncommand = 'x'\n", "[defaults]\n", "[[target.web]]\n"):
        error = error_of(where + text)
        assert "hush" not in error.message
        assert "hush" not in str(error.details)


@pytest.mark.parametrize("name", ['""', '"A=B"', '"A\\u0000B"'])
def test_what_cannot_name_a_variable_is_refused(name: str) -> None:
    assert "name of a variable" in problem_of(f'env = {{ {name} = "x" }}')["problem"]


def test_variables_that_asyncsup_sets_itself_are_refused() -> None:
    for name in ("ASYNCSUP_TOKEN", "ASYNCSUP_TARGET_ENDPOINT", "ASYNCSUP_ROOT"):
        assert problem_of(f'env.{name} = "x"')["problem"] == "is set by asyncsup itself"
    assert target('env.ASYNCSUP_CONFIG = "x"').env == {"ASYNCSUP_CONFIG": "x"}


# --- ${...} -------------------------------------------------------------------------------------------------


def test_variables_are_put_in() -> None:
    web = target(
        'command = ["${BIN}/x", "a$$b", "$HOME", "$(date)", "${name}", "#${instance}"]\n'
        'directory = "${here}/work"\nregion = "${REGION}"\nstop_timeout = "${PATIENCE}"\n'
        'env = { A = "${REGION}-${instance}", B = "$$" }\nlog.stdout = "log/${name}.${instance}"\n'
        'success_exit_codes = [0]\nstop_signal = "${SIGNAL}"\n',
        environ={"BIN": "/opt/my bin", "REGION": "eu", "PATIENCE": "3s", "SIGNAL": "INT"},
    )
    assert web.command == ("/opt/my bin/x", "a$b", "$HOME", "$(date)", "web", f"#{INSTANCE}")
    assert (web.directory, web.region, web.stop_timeout) == (HERE / "work", "eu", 3.0)
    assert web.env == {"A": f"eu-{INSTANCE}", "B": "$"}
    assert web.log.stdout == HERE / "log" / f"web.{INSTANCE}"
    assert web.stop_signal is signal.SIGINT


def test_a_command_is_split_before_variables_are_put_in() -> None:
    assert target("command = \"run ${FILE} '${FILE}'\"", environ={"FILE": "a b"}).command == (
        "run",
        "a b",
        "a b",
    )


def test_what_a_variable_holds_is_not_looked_at_again() -> None:
    assert target('region = "${A}"', environ={"A": "${B} $$"}).region == "${B} $$"


def test_an_unknown_variable_is_named_with_the_nearest() -> None:
    problem = problem_of('region = "${REGOIN}"', environ={"REGION": "eu"})
    assert problem["problem"] == "unknown variable ${REGOIN}"
    assert problem["hint"] == "did you mean ${REGION}?"
    assert "$${QQQ}" in problem_of('region = "${QQQ}"')["hint"]


@pytest.mark.parametrize("text", ["${", "${A", "${}", "${A:-b}", "${a b}", "x ${"])
def test_a_broken_variable_is_refused(text: str) -> None:
    assert problem_of(f'command = ["sh", "{text}"]', environ={"A": "x"})["key"] == "target.web.command"


@pytest.mark.parametrize("key", ["region", "directory", "stop_timeout", "root", "umask", "user"])
def test_the_instance_has_no_meaning_outside_of_commands_env_and_logs(key: str) -> None:
    assert "${instance}" in problem_of(f'{key} = "${{instance}}"')["problem"]


@pytest.mark.parametrize("text", ["$${instance}", "${TRICK}"])
def test_a_literal_instance_is_refused_because_a_start_would_replace_it(text: str) -> None:
    problem = problem_of(f'command = ["sh", "-c", "{text}"]', environ={"TRICK": "${instance}"})
    assert "literal" in problem["problem"]


def test_the_name_has_no_meaning_outside_of_targets() -> None:
    assert "${name}" in problem_of('region = "${name}"', table="supervisor")["problem"]


def test_a_variable_that_is_not_utf_8_is_refused_and_not_passed_on() -> None:
    broken = os.fsdecode(b"\xff")
    assert "UTF-8" in problem_of('region = "${A}"', environ={"A": broken})["problem"]


# --- [defaults] ---------------------------------------------------------------------------------------------


def test_defaults_apply_and_targets_override_them() -> None:
    text = """
    [defaults]
    restart = "always"
    region = "${name}-land"
    log = { max_files = 3, format = "json" }
    env = { A = "default", B = "${name}" }
    limits = { nofile = 10, nproc = 20 }
    patch = { wait_max = "5m", allow = ["warm"] }
    [target.a]
    command = "x"
    [target.b]
    command = "x"
    restart = "never"
    region = "b"
    log = { format = "raw" }
    env = { A = "own" }
    limits = { nofile = 30 }
    patch = { wait_max = "1s" }
    [patch]
    ack_timeout = "7s"
    wait_max = "3m"
    """
    a, b = parse(text).targets.values()
    assert (a.restart, b.restart) == ("always", "never")
    assert (a.region, b.region) == ("a-land", "b")
    assert (a.log.max_files, a.log.format) == (3, "json")
    assert (b.log.max_files, b.log.format) == (3, "raw")
    assert (a.env, b.env) == ({"A": "default", "B": "a"}, {"A": "own", "B": "b"})
    assert (a.limits, b.limits) == ({"nofile": 10, "nproc": 20}, {"nofile": 30, "nproc": 20})
    assert (a.patch.wait_max, b.patch.wait_max) == (300.0, 1.0)
    assert a.patch.allow == b.patch.allow == {Kind.WARM}
    assert a.patch.ack_timeout == b.patch.ack_timeout == 7.0


def test_a_target_inherits_region_and_patch_timing() -> None:
    config = parse(
        '[supervisor]\nregion = "India"\n[patch]\nprobation = 9\nwait_max = 8\nack_timeout = 7\n'
        '[target.web]\ncommand = "x"\n[target.own]\ncommand = "x"\nregion = "us"\npatch.probation = 1\n'
    )
    web, own = config.targets.values()
    assert (web.region, own.region) == ("India", "us")
    assert (web.patch.probation, web.patch.wait_max, web.patch.ack_timeout) == (9.0, 8.0, 7.0)
    assert (own.patch.probation, own.patch.wait_max, own.patch.ack_timeout) == (1.0, 8.0, 7.0)


def test_a_mistake_in_defaults_is_told_once_and_where_it_is() -> None:
    targets = "".join(f'[target.t{i}]\ncommand = "x"\n' for i in range(5))
    (problem,) = problems_of(f'[defaults]\nrestart = "of-failure"\n{targets}')
    assert (problem["key"], problem["line"]) == ("defaults.restart", 2)


def test_a_mistake_in_defaults_is_told_where_no_target_uses_it() -> None:
    (problem,) = problems_of(
        '[defaults]\nrestart = "x"\nenv = { A = 1 }\n[target.a]\ncommand = "x"\nrestart = "never"\n'
    )[:1]
    assert problem["key"] == "defaults.restart"
    assert len(problems_of('[defaults]\nrestart = "x"\nrestrt = "x"\nlog.frmat = "raw"\n')) == 3


def test_the_command_may_be_a_default() -> None:
    assert parse('[defaults]\ncommand = "x ${name}"\n[target.a]\n').targets["a"].command == ("x", "a")


def test_one_way_to_reload_replaces_a_default_of_the_other() -> None:
    web = target('reload_command = "x"', before='[defaults]\nreload_signal = "HUP"')
    assert (web.reload_command, web.reload_signal) == (("x",), None)
    web = target('reload_signal = "USR1"', before='[defaults]\nreload_command = "x"')
    assert (web.reload_command, web.reload_signal) == (None, signal.SIGUSR1)


def test_tree_settings_in_defaults_leave_other_targets_alone() -> None:
    defaults = '[defaults]\nlayout = "tree"\npersist = ["data"]\n'
    assert target("", before=defaults).root is None
    assert target('root = "w"\nlayout = "overlay"', before=defaults).persist == ()
    assert target('root = "w"', before=defaults).persist == ("data",)


# --- stored descriptors -------------------------------------------------------------------------------------


def test_descriptors_are_stored_by_programs_that_speak_sd_notify_alone() -> None:
    assert target("ready.notify = true\nfd_store_max = 512").fd_store_max == 512
    problem = problem_of("fd_store_max = 1")
    assert (problem["key"], problem["problem"]) == (
        "target.web.fd_store_max",
        "needs a program that speaks sd_notify",
    )


def test_the_descriptor_of_readiness_is_none_that_a_stored_one_gets() -> None:
    assert target('protocol = "notify"\nready.fd = 6\nfd_store_max = 3').ready.fd == 6
    problem = problem_of('protocol = "notify"\nfd_store_max = 3\nready.fd = 5')
    assert problem["key"] == "target.web.ready.fd"
    assert problem["problem"] == "is a number that a stored descriptor may get (fd_store_max): 3 to 5"
    assert problem["hint"] == "choose 6 or more"


# --- unknown keys -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key", "hint"),
    [
        ("[supervisor]\nregoin = 'x'", "supervisor.regoin", 'did you mean "region"?'),
        ("[patch]\nInbox = 'x'", "patch.Inbox", 'did you mean "inbox"?'),
        ("[defaults]\nrestrat = 'x'", "defaults.restrat", 'did you mean "restart"?'),
        ("[target.a]\ncommand='x'\nstop_timout = 1", "target.a.stop_timout", 'did you mean "stop_timeout"?'),
        (
            "[target.a]\ncommand='x'\n[target.a.log]\nmaxsize = 1",
            "target.a.log.maxsize",
            'did you mean "max_size"?',
        ),
        ("[target.a]\ncommand='x'\npatch.alow = []", "target.a.patch.alow", 'did you mean "allow"?'),
        ("[patch]\nmax_package = '1GB'", "patch.max_package", 'did you mean "limits.package_size"?'),
        ("[patch.limits]\nfile = 3", "patch.limits.file", 'did you mean "files"?'),
        ("[patch]\nfile_size = 3", "patch.file_size", "it belongs under [patch.limits]"),
        ("[targets.a]\ncommand='x'", "targets", 'did you mean "target"?'),
        ("[target.a]\ncommand='x'\nautorestart = true", "target.a.autorestart", 'did you mean "restart"?'),
        ("[target.a]\ncommand='x'\nnumprocs = 2", "target.a.numprocs", 'did you mean "instances"?'),
        (
            "[target.a]\ncommand='x'\nstdout_logfile = ''",
            "target.a.stdout_logfile",
            'did you mean "log.stdout"?',
        ),
        ("[target.a]\ncommand='x'\nmax_size = 1", "target.a.max_size", "it belongs under [target.NAME.log]"),
        ("[target.a]\ncommand='x'\ninbox = 'x'", "target.a.inbox", "it belongs under [patch]"),
        ("[supervisor]\nkeep = 3", "supervisor.keep", "it belongs under [patch]"),
        ("command = 'x'", "command", "it belongs under [target.NAME]"),
        (
            "[target.a]\ncommand='x'\nname = 'b'",
            "target.a.name",
            "the name stands in the header: [target.NAME]",
        ),
        (
            "[zzz]",
            "zzz",
            "the tables are [supervisor], [patch], [defaults], [target.NAME], [socket.NAME] and [group.NAME]",
        ),
    ],
)
def test_an_unknown_key_says_what_was_probably_meant(text: str, key: str, hint: str) -> None:
    (problem,) = problems_of(text)
    assert problem == {
        "file": str(FILE), "line": text.count("\n") + (0 if key == "targets" else 1), "key": key,
        "value": None, "problem": "unknown key", "hint": hint,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("[[target.web]]\ncommand = 'x'", "write [target.web] with single brackets"),
        ("[target]\nweb = 'sleep 1'", "write [target.web] and its keys below it"),
        ("target = 5", "write [target] and its keys below it"),
        ("supervisor = 5", "write [supervisor] and its keys below it"),
        ("[target.web]\ncommand = 'x'\nlog = 'x'", "write [target.web.log] and its keys below it"),
        ("[patch]\nlimits = 5", "write [patch.limits] and its keys below it"),
        ("defaults = []", "write [defaults] and its keys below it"),
    ],
)
def test_what_should_be_a_table_says_so(text: str, hint: str) -> None:
    (problem,) = problems_of(text)
    assert problem["problem"].startswith("must be a table")
    assert problem["hint"] == hint


# --- names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "web-1", "web_1", "0", "_x", '"web.v2"', "x" * 100])
def test_names_of_targets(name: str) -> None:
    assert list(parse(f'[target.{name}]\ncommand = "x"\n').targets) == [name.strip('"')]


@pytest.mark.parametrize(
    "name",
    ['""', '".hidden"', "-x", '"a b"', '"a:0"', '"a/b"', '"é"', '"a\\n"', '"*"', '"\\u0661"', "x" * 101],
)
def test_what_is_no_name_is_refused(name: str) -> None:
    (problem,) = problems_of(f'[target.{name}]\ncommand = "x"\n')
    assert problem["problem"] == "not a name for a target"
    assert problem["line"] == 1


@pytest.mark.parametrize("name", ["all", "ALL"])
def test_all_is_no_name(name: str) -> None:
    (problem,) = problems_of(f'[target.{name}]\ncommand = "x"\n')
    assert "stands for all targets" in problem["problem"]


def test_names_that_differ_only_in_case_are_refused() -> None:
    (problem,) = problems_of('[target.Web]\ncommand = "x"\n[target.web]\ncommand = "x"\n')
    assert problem["problem"] == f"differs only in case from target.Web ({FILE})"
    assert problem["line"] == 3


# --- paths and endpoints ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "path"),
    [
        (".", "/etc/app"),
        ("work", "/etc/app/work"),
        ("../x", "/etc/x"),
        ("/srv/./a/../b/", "/srv/b"),
        ("//srv", "/srv"),
    ],
)
def test_paths_are_relative_to_the_file(written: str, path: str) -> None:
    assert target(f'directory = "{written}"').directory == Path(path)


def test_a_relative_configuration_path_becomes_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = parse_config(
        '[target.web]\ncommand = "x"\ndirectory = "d"\n', path=Path("conf/../asyncsup.toml")
    )
    assert config.path == tmp_path / "asyncsup.toml"
    assert config.targets["web"].directory == tmp_path / "d"


@pytest.mark.parametrize("written", ["", "~/x", "~", "a\\u0000b"])
def test_what_is_no_path_is_refused(written: str) -> None:
    assert problem_of(f'directory = "{written}"')["key"] == "target.web.directory"


def test_runtime_dir_and_endpoint_follow_state_dir() -> None:
    supervisor = parse('[supervisor]\nstate_dir = "/var/lib/x"\n').supervisor
    assert supervisor.runtime_dir == Path("/var/lib/x/run")
    assert supervisor.endpoint == "ipc:///var/lib/x/run/control.sock"
    supervisor = parse('[supervisor]\nruntime_dir = "run"\n').supervisor
    assert supervisor.endpoint == "ipc:///etc/app/run/control.sock"
    assert parse('[supervisor]\nendpoint = "ipc://c.sock"\n').supervisor.endpoint == "ipc:///etc/app/c.sock"


@pytest.mark.parametrize(
    "endpoint", ["tcp://127.0.0.1:5555", "inproc://x", "ipc://", "ipc://@abstract", "/run/x", ""]
)
def test_endpoints_other_than_ipc_are_refused(endpoint: str) -> None:
    problem = problem_of(f'endpoint = "{endpoint}"', table="supervisor")
    assert problem["key"] == "supervisor.endpoint"
    if endpoint.startswith("tcp"):
        assert "listen" in problem["hint"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('socket_mode = "0640"', "not one of the modes"),
        ("socket_mode = 432", "not one of the modes"),
        ('socket_group = "nobody-of-that-name"', "no such group"),
    ],
)
def test_who_may_write_to_the_control_socket(line: str, problem: str) -> None:
    assert problem in problem_of(line, table="supervisor", machine=Machine())["problem"]


def test_the_longest_socket_path_that_fits_and_the_shortest_that_does_not() -> None:
    folder = "/" + "r" * (107 - len("//control.sock"))
    assert len(f"{folder}/control.sock") == 107
    assert parse(f'[supervisor]\nruntime_dir = "{folder}"\n').supervisor.runtime_dir == Path(folder)
    problem = problem_of(f'runtime_dir = "{folder}r"', table="supervisor")
    assert "at most 107 bytes" in problem["problem"]
    assert "supervisor.runtime_dir" in problem["hint"]


def test_bytes_and_not_characters_of_a_socket_path_are_counted() -> None:
    assert "has 120" in problem_of('runtime_dir = "/' + "é" * 53 + '"', table="supervisor")["problem"]


def test_a_long_path_of_the_file_itself_is_told_to_set_runtime_dir() -> None:
    deep = Path("/" + "d" * 120, "asyncsup.toml")
    with pytest.raises(ConfigError, match=r"supervisor\.runtime_dir: a socket's path has at most"):
        parse_config("", path=deep)
    assert parse_config('[supervisor]\nruntime_dir = "/run/x"\n', path=deep).supervisor.runtime_dir == Path(
        "/run/x"
    )


def test_a_long_endpoint_is_refused() -> None:
    problem = problem_of(f'endpoint = "ipc:///{"e" * 107}"\nruntime_dir = "/run/x"', table="supervisor")
    assert problem["key"] == "supervisor.endpoint"


# --- checks between settings --------------------------------------------------------------------------------


def test_an_unknown_dependency_names_the_nearest() -> None:
    (problem,) = problems_of(
        '[target.web]\ncommand="x"\ndepends_on = ["databse"]\n[target.database]\ncommand="x"\n'
    )
    assert problem["problem"] == 'there is no target "databse"'
    assert problem["hint"] == 'did you mean "database"?'


def test_a_cycle_is_printed_as_a_cycle() -> None:
    text = "".join(
        f'[target.{name}]\ncommand="x"\ndepends_on = [{needs}]\n'
        for name, needs in (("a", '"b"'), ("b", '"c"'), ("c", '"a", "d"'), ("d", ""))
    )
    (problem,) = problems_of(text)
    match = re.fullmatch(r"targets wait for each other: (\w) -> (\w) -> (\w) -> (\w)", problem["problem"])
    assert match is not None
    cycle = "".join(match.groups())
    assert cycle in {"abca", "bcab", "cabc"}
    assert problem["key"] == f"target.{cycle[0]}.depends_on"


def test_every_cycle_is_told() -> None:
    text = "".join(
        f'[target.{name}]\ncommand="x"\ndepends_on = ["{needs}"]\n'
        for name, needs in ("ab", "ba", "cd", "dc", "ee")
    )
    assert len(problems_of(text)) == 3


def test_a_long_chain_of_dependencies_is_no_cycle() -> None:
    chain = {f"t{i}": {"command": "x", "depends_on": [f"t{i + 1}"] if i < 4999 else []} for i in range(5000)}
    assert len(parse_config({"target": chain}, path=FILE).targets) == 5000
    chain["t4999"]["depends_on"] = ["t0"]
    with pytest.raises(ConfigError, match="wait for each other"):
        parse_config({"target": chain}, path=FILE)


def test_reload_signal_and_reload_command_contradict_each_other() -> None:
    problem = problem_of('reload_signal = "HUP"\nreload_command = "x"')
    assert "cannot both be set" in problem["problem"]
    both = problems_of('[defaults]\nreload_signal = "HUP"\nreload_command = "x"\n[target.a]\ncommand = "x"\n')
    assert [problem["key"] for problem in both] == ["defaults.reload_command"]


@pytest.mark.parametrize("text", ['layout = "tree"', 'layout = "overlay"', 'persist = ["a"]'])
def test_layout_and_persist_need_a_root(text: str) -> None:
    assert problem_of(text)["problem"] == "has no meaning without root"


def test_persist_needs_the_tree_layout() -> None:
    assert problem_of('root = "w"\npersist = ["a"]')["problem"] == 'has a meaning only with layout = "tree"'


def test_the_first_delay_is_not_more_than_the_longest() -> None:
    problem = problem_of('restart_delay = "1m"')
    assert problem["hint"] == 'set restart_max_delay to at least "1m"'
    assert (
        problem_of('restart_delay = "2s"\nrestart_max_delay = "1s"')["key"] == "target.web.restart_max_delay"
    )
    assert target('restart_delay = "1s"\nrestart_max_delay = "1s"').restart_max_delay == 1.0


def test_some_instances_can_be_spared() -> None:
    problem = problem_of("instances = 2\npatch.min_available = 2")
    assert problem["key"] == "target.web.patch.min_available"
    assert problem["hint"].startswith("set it to at most 1, ")
    target("instances = 2\npatch.min_available = 1")
    target("instances = 2\noverlap = true\npatch.min_available = 2")
    target("oneshot = true\npatch.min_available = 2")
    parse("[defaults.patch]\nmin_available = 1\n[target.web]\ncommand = 'x'\n")


def test_required_signatures_need_somebody_whose_signatures_count() -> None:
    problem = problem_of('trust = "required"', table="patch")
    assert (problem["key"], problem["problem"]) == ("patch.trust", "does not say whose signatures count")
    patch = parse('[patch]\ntrust = "required"\nallowed_signers = "signers"\nsignatures_required = 2\n').patch
    assert (patch.allowed_signers, patch.signatures_required) == (HERE / "signers", 2)
    problem = problem_of(
        'trust = "required"\nallowed_signers = "s"\nsignatures_required = 3\nlimits.signatures = 2',
        table="patch",
    )
    assert (problem["key"], problem["hint"]) == (
        "patch.signatures_required",
        "set one of them to another number",
    )
    for number in (0, 33):
        assert problem_of(f"signatures_required = {number}", table="patch")["key"].endswith("_required")
    for key in ('allowed_signers = "signers"', "signatures_required = 2"):
        (warning,) = parse(f'[target.a]\ncommand = "x"\n[patch]\n{key}\n').warnings
        assert 'is not used: signatures need trust = "required"' in warning


class _Signers:
    """A configuration that requires signatures, on this machine."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "allowed_signers"
        self.path = folder / "asyncsup.toml"
        key = "AAAAC3NzaC1lZDI1NTE5AAAAI" + "A" * 43
        self.lines = f'alice ssh-ed25519 {key}\nalice namespaces="git" ssh-ed25519 {key[:-1]}E\n'
        self.file.write_text(self.lines)
        self.file.chmod(0o644)

    def problems(self, more: str = "") -> list[tuple[str, str]]:
        text = f'[patch]\ntrust = "required"\nallowed_signers = "{self.file}"\n{more}'
        try:
            self.warnings = parse_config(text, path=self.path, machine=Machine()).warnings
        except ConfigError as error:
            return [(problem["key"], problem["problem"]) for problem in error.details["problems"]]
        return []


def test_allowed_signers_have_to_be_there_and_right(tmp_path: Path) -> None:
    signers = _Signers(tmp_path)
    assert signers.problems() == []
    ((key, problem),) = signers.problems("signatures_required = 2\n")
    assert key == "patch.allowed_signers"
    assert "allows 1 of the 2 keys" in problem
    signers.file.write_text(f"{signers.lines}bob cert-authority x\n\ncarol\n")
    assert [problem.split(":", 1)[1][:2] for _, problem in signers.problems()] == ["3:", "5:"]
    signers.file.unlink()
    assert "No such file" in signers.problems()[0][1]


def test_allowed_signers_that_anybody_could_change_are_warned_of(tmp_path: Path) -> None:
    signers = _Signers(tmp_path)
    signers.file.chmod(0o666)
    assert signers.problems() == []
    assert "could allow themselves" in signers.warnings[0]


@pytest.mark.parametrize("layout", ["overlay", "tree"])
def test_allowed_signers_are_nothing_a_patch_could_change(tmp_path: Path, layout: str) -> None:
    signers = _Signers(tmp_path)
    root = tmp_path.with_name(f"{tmp_path.name}-root")
    root.mkdir()
    more = f'[target.a]\ncommand = "true"\nroot = "{root}"\nlayout = "{layout}"\n'
    assert signers.problems(more) == []
    signers.file.rename(root / "signers")
    signers.file.symlink_to(root / "signers")
    ((key, problem),) = signers.problems(more)
    assert key == "target.a.root"
    assert "could change who may sign" in problem


def test_required_signatures_without_cryptography_are_an_error_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signers = _Signers(tmp_path)
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric.ec", None)
    ((key, problem),) = signers.problems()
    assert key == "patch.trust"
    assert 'pip install "asyncsup[trust]"' in problem


def test_two_targets_cannot_write_into_one_log_file() -> None:
    two = '[target.a]\ncommand="x"\nlog.stdout = "x.log"\n[target.b]\ncommand="x"\nlog.{} = "./y/../x.log"\n'
    for stream in ("stdout", "stderr"):
        (problem,) = problems_of(two.replace("{}", stream))
        assert problem["key"] == f"target.b.log.{stream}"
        assert "a and b would write into one file" in problem["problem"]
    default = '[defaults]\nlog.stdout = "{}"\n[target.a]\ncommand="x"\n[target.b]\ncommand="x"\n'
    assert problems_of(default.replace("{}", "x.log"))[0]["key"] == "defaults.log.stdout"
    assert len(parse(default.replace("{}", "${name}.log")).targets) == 2


@pytest.mark.parametrize("path", ["/dev/stdout", "/dev/stderr", "/dev/null", "/dev/fd/4", "/proc/self/fd/1"])
def test_what_is_no_file_takes_the_output_of_all(path: str) -> None:
    log = f'log = {{ stdout = "{path}", stderr = "{path}" }}\n'
    parsed = parse(f'[defaults]\n{log}[target.a]\ncommand = "x"\ninstances = 3\n[target.b]\ncommand = "x"\n')
    assert {str(target.log.stdout) for target in parsed.targets.values()} == {path}


def test_a_file_in_dev_is_one() -> None:
    text = '[target.a]\ncommand = "x"\ninstances = 2\nlog.stdout = "/dev/shm/x.log"\n'
    assert problems_of(text)[0]["key"] == "target.a.log.stdout"


def test_instances_cannot_write_into_one_log_file() -> None:
    assert "2 instances" in problem_of('instances = 2\nlog.stdout = "x.log"')["problem"]
    assert target('instances = 2\nlog.stdout = "x.${instance}.log"').instances == 2
    text = (
        '[target.a]\ncommand="x"\ninstances=3\nlog.stdout = "x.${instance}.log"\n'
        '[target.b]\ncommand="x"\nlog.stdout="x.{}.log"\n'
    )
    assert len(problems_of(text.replace("{}", "2"))) == 1
    assert len(parse(text.replace("{}", "3")).targets) == 2


def test_stdout_and_stderr_cannot_have_one_file_each_its_own() -> None:
    assert problem_of('log.stdout = "x"\nlog.stderr = "x"')["hint"] == 'write stderr = "stdout"'


@pytest.mark.parametrize(
    ("roots", "expected"),
    [
        (("w", "w"), "b and a have the same root"),
        (("w", "w/../w"), "b and a have the same root"),
        (("w", "w/x"), "the root of b is within that of a"),
        (("w/x", "w"), "the root of a is within that of b"),
        (("w", "/"), "the whole file system cannot be a root"),
        (("w", ".asyncsup/x"), "is within state_dir"),
        (("w", ".asyncsup"), "is within state_dir"),
    ],
)
def test_roots_that_cannot_be(roots: tuple[str, str], expected: str) -> None:
    text = f'[target.a]\ncommand="x"\nroot="{roots[0]}"\n[target.b]\ncommand="x"\nroot="{roots[1]}"\n'
    (problem,) = problems_of(text)
    assert problem["problem"].startswith(expected)


def test_roots_side_by_side_are_fine() -> None:
    text = '[target.a]\ncommand="x"\nroot="w/a"\n[target.b]\ncommand="x"\nroot="w/ab"\n'
    assert len(parse(text).targets) == 2


@pytest.mark.parametrize(
    ("before", "what"),
    [
        ("", "state_dir is in it"),
        ('[supervisor]\nstate_dir = "/s"\nruntime_dir = "w/run"', "runtime_dir is in it"),
        ('[supervisor]\nstate_dir = "/s"\n[patch]\ninbox = "w"', "the inbox is in it"),
        ('[supervisor]\nstate_dir = "/s"\nruntime_dir = "/r"\n[patch]\ninbox = "/i"', f"{FILE} is in it"),
    ],
)
def test_a_tree_cannot_hold_what_has_to_outlive_it(before: str, what: str) -> None:
    root = "w" if "w" in before else "."
    text = f'{before}\n[target.web]\ncommand = "x"\nroot = "{root}"\n'
    assert parse(text).targets["web"].layout == "overlay"
    assert what in problems_of(f'{text}layout = "tree"')[0]["problem"]


# --- the machine --------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def load_problems(path: Path) -> list[dict[str, Any]]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, environ={})
    problems: list[dict[str, Any]] = caught.value.details["problems"]
    return problems


def test_a_root_has_to_be_a_folder(tmp_path: Path) -> None:
    file = write(tmp_path / "a.toml", '[target.web]\ncommand = "sh"\nroot = "work"\n')
    (problem,) = load_problems(file)
    assert problem["problem"] == f"there is no folder {tmp_path / 'work'}"
    assert str(tmp_path) in problem["hint"]
    (tmp_path / "work").write_text("")
    (problem,) = load_problems(file)
    assert problem["problem"] == f"{tmp_path / 'work'} is no folder"
    (tmp_path / "work").unlink()
    (tmp_path / "work").mkdir()
    assert load_config(file).targets["web"].root == tmp_path / "work"


def test_roots_are_compared_with_their_links_followed(tmp_path: Path) -> None:
    (tmp_path / "real/inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    text = '[target.a]\ncommand="sh"\nroot="real"\n[target.b]\ncommand="sh"\nroot="link{}"\n'
    assert "same root" in load_problems(write(tmp_path / "a.toml", text.replace("{}", "")))[0]["problem"]
    assert "within" in load_problems(write(tmp_path / "a.toml", text.replace("{}", "/inner")))[0]["problem"]


def test_a_tree_root_that_is_already_a_link_into_the_state_is_fine(tmp_path: Path) -> None:
    generation = tmp_path / ".asyncsup/generations/web/1"
    generation.mkdir(parents=True)
    (tmp_path / "app").mkdir()
    (tmp_path / "app/work").symlink_to(generation)
    text = '[target.web]\ncommand="sh"\nroot="app/work"\nlayout="tree"\n'
    assert load_config(write(tmp_path / "a.toml", text)).targets["web"].root == tmp_path / "app/work"


@pytest.mark.parametrize("key", ["supervisor.state_dir", "supervisor.runtime_dir", "patch.inbox"])
def test_a_folder_of_ours_cannot_be_a_file(tmp_path: Path, key: str) -> None:
    (tmp_path / "taken").write_text("")
    (problem,) = load_problems(write(tmp_path / "a.toml", f'{key} = "taken"\n'))
    assert (problem["key"], problem["problem"]) == (key, f"{tmp_path / 'taken'} is there and is no folder")


class Unprivileged(Machine):
    """This machine as somebody sees it who is not root."""

    def effective_user(self) -> int:
        return 65_534

    def effective_group(self) -> int:
        return 65_534


class Privileged(Machine):
    def effective_user(self) -> int:
        return 0


@pytest.mark.parametrize("pattern", ["(", "a{99999999999}", "(" * 5000])
def test_what_is_no_pattern_is_said(pattern: str) -> None:
    assert "not a regular expression: " in problem_of(f'ready.log = "{pattern}"')["problem"]


@pytest.mark.parametrize("key", ["user", "group"])
def test_users_and_groups_have_to_exist(key: str) -> None:
    for name in ("no-such-name-here", "4294967290", "9999999999", "99999999999999999999", "root:root"):
        problem = problem_of(f'{key} = "{name}"', machine=Privileged())
        assert problem["problem"] == f"there is no such {key} on this machine"
    assert "key of its own" in problem_of('user = "root:root"', machine=Privileged())["hint"]
    for name in ("root", "0"):
        config = parse(f'[target.web]\ncommand="x"\n{key} = "{name}"\n', machine=Privileged())
        assert getattr(config.targets["web"], key) == name


@pytest.mark.parametrize("key", ["user", "group"])
def test_only_root_starts_processes_as_somebody_else(key: str) -> None:
    problem = problem_of(f'{key} = "root"', machine=Unprivileged())
    assert problem["problem"] == f"only root may start processes as another {key}"


def test_naming_the_user_one_already_is_needs_no_root() -> None:
    own, other = pwd.getpwnam("nobody"), "root"

    class Nobody(Machine):
        def effective_user(self) -> int:
            return own.pw_uid

        def effective_group(self) -> int:
            return own.pw_gid

    text = f'user = "nobody"\ngroup = "{own.pw_gid}"\n'
    config = parse(f'[target.web]\ncommand="x"\n{text}', machine=Nobody())
    assert (config.targets["web"].user, config.targets["web"].group) == ("nobody", str(own.pw_gid))
    assert problem_of(f'user = "{other}"', machine=Nobody())["key"] == "target.web.user"


def test_a_program_that_is_not_there_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "tool").write_text("#!/bin/sh\n")
    text = '[target.web]\ncommand = "{}"\n'
    file = tmp_path / "a.toml"
    for program in ("no-such-program", "./tool", "/no/such/program", "."):
        config = load_config(write(file, text.replace("{}", program)), environ={"PATH": "/usr/bin:/bin"})
        assert config.warnings == (
            f'{file}:2: target.web.command: there is no program "{program}" that could be executed',
        )
    (tmp_path / "tool").chmod(0o755)
    for program in ("sh", "./tool", str(tmp_path / "tool"), "${instance}", "./${instance}"):
        assert (
            load_config(write(file, text.replace("{}", program)), environ={"PATH": "/usr/bin:/bin"}).warnings
            == ()
        )


def test_programs_are_searched_for_in_the_targets_own_path(tmp_path: Path) -> None:
    tool = write(tmp_path / "bin/own-tool", "#!/bin/sh\n")
    tool.chmod(0o755)
    text = '[target.web]\ncommand = "own-tool"\n'
    assert load_config(write(tmp_path / "a.toml", text), environ={"PATH": "/bin"}).warnings
    own = f'{text}env.PATH = "{tmp_path}/bin"\n'
    assert load_config(write(tmp_path / "a.toml", own), environ={"PATH": "/bin"}).warnings == ()
    assert load_config(write(tmp_path / "a.toml", text), environ={"PATH": f"{tmp_path}/bin"}).warnings == ()


def test_folders_and_files_a_start_needs_are_warned_about(tmp_path: Path) -> None:
    text = (
        '[target.web]\ncommand = "/bin/sh"\ndirectory = "d"\nenv_files = ["e.env"]\nstop_command = "nope-x"\n'
    )
    warnings = load_config(write(tmp_path / "a.toml", text), environ={"PATH": "/bin"}).warnings
    assert [warning.split(": ")[1] for warning in warnings] == [
        "target.web.directory",
        "target.web.env_files",
    ]
    write(tmp_path / "e.env", "")
    (tmp_path / "d").mkdir()
    assert load_config(tmp_path / "a.toml", environ={"PATH": "/bin"}).warnings == ()


def test_shell_syntax_without_a_shell_is_warned_about() -> None:
    warnings = parse('[target.web]\ncommand = "a | b > c"\n').warnings
    assert len(warnings) == 2
    assert "there is no shell" in warnings[0]
    assert parse('[target.web]\ncommand = ["a", "|", "b"]\n').warnings == ()


def test_a_reload_signal_an_sdk_target_will_not_get_is_warned_about() -> None:
    (warning,) = parse('[target.web]\ncommand="x"\nprotocol="sdk"\nreload_signal="HUP"\n').warnings
    assert "reload_signal: is not used" in warning


# --- include ------------------------------------------------------------------------------------------------


def test_included_files_are_read_in_order_and_are_relative_to_themselves(tmp_path: Path) -> None:
    main = write(
        tmp_path / "asyncsup.toml",
        '[supervisor]\ninclude = ["conf.d/*.toml", "extra/**/*.toml"]\n'
        '[defaults]\nrestart = "always"\nenv_files = ["d.env"]\n[target.main]\ncommand = "sh"\n',
    )
    write(tmp_path / "d.env", "")
    for name in ("b", "a"):
        write(
            tmp_path / f"conf.d/{name}.toml",
            f'[target.{name}]\ncommand = "sh"\nlog.stdout = "${{here}}/x/{name}"\n',
        )
    write(tmp_path / "extra/deep/er/c.toml", '[target.c]\ncommand = "sh"\nroot = "."\n')
    write(tmp_path / "conf.d/ignored.txt", "not TOML")
    (tmp_path / "conf.d/folder.toml").mkdir()
    config = load_config(main)
    assert list(config.targets) == ["main", "a", "b", "c"]
    a, c = config.targets["a"], config.targets["c"]
    assert (a.directory, a.log.stdout, a.restart) == (tmp_path / "conf.d", tmp_path / "conf.d/x/a", "always")
    assert a.env_files == (tmp_path / "d.env",)
    assert c.root == tmp_path / "extra/deep/er"
    assert config.warnings == ()


def test_a_file_is_read_once_and_a_file_does_not_include_itself(tmp_path: Path) -> None:
    main = write(
        tmp_path / "asyncsup.toml",
        '[supervisor]\ninclude = ["*.toml", "b*", "./b.toml"]\n[target.a]\ncommand="sh"\n',
    )
    write(tmp_path / "b.toml", '[target.b]\ncommand="sh"\n')
    assert list(load_config(main).targets) == ["a", "b"]


def test_a_pattern_may_be_absolute_and_have_variables(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere/t.toml", '[target.t]\ncommand="sh"\n')
    main = write(tmp_path / "main/a.toml", '[supervisor]\ninclude = ["${BASE}/else*/t.toml"]\n')
    assert list(load_config(main, environ={"BASE": str(tmp_path)}).targets) == ["t"]


def test_a_pattern_that_matches_nothing_is_a_warning(tmp_path: Path) -> None:
    main = write(
        tmp_path / "a.toml", '[supervisor]\ninclude = ["conf.d/*.toml"]\n[target.a]\ncommand="/bin/sh"\n'
    )
    assert load_config(main).warnings == (f'{main}:2: supervisor.include: no file matches "conf.d/*.toml"',)


@pytest.mark.parametrize("table", ["supervisor", "patch", "defaults"])
def test_an_included_file_has_only_targets(tmp_path: Path, table: str) -> None:
    main = write(tmp_path / "a.toml", '[supervisor]\ninclude = ["b.toml"]\n')
    included = write(tmp_path / "b.toml", f'[target.b]\ncommand="sh"\n\n[{table}]\n')
    (problem,) = load_problems(main)
    assert (problem["file"], problem["line"], problem["key"]) == (str(included), 4, table)
    assert problem["hint"] == f"move [{table}] to {main}"


def test_problems_name_the_included_file(tmp_path: Path) -> None:
    main = write(tmp_path / "a.toml", '[supervisor]\ninclude = ["conf.d/*"]\n[target.a]\ncomand = "x"\n')
    bad = write(tmp_path / "conf.d/b.toml", '[target.b]\ncommand = "sh"\nrestrat = "x"\n')
    write(tmp_path / "conf.d/c.toml", "[target.c\n")
    (tmp_path / "conf.d/d.toml").symlink_to("nowhere")
    with pytest.raises(ConfigError) as caught:
        load_config(main)
    problems = caught.value.details["problems"]
    assert [(Path(p["file"]).name, p["key"]) for p in problems] == [
        ("a.toml", "target.a.command"), ("a.toml", "target.a.comand"), ("b.toml", "target.b.restrat"),
        ("c.toml", ""), ("d.toml", ""),
    ]  # fmt: skip
    assert f"{bad}:3: target.b.restrat: unknown key" in caught.value.message


def test_an_included_file_that_cannot_be_read_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "loop.toml").symlink_to("/proc/self/mem")
    main = write(tmp_path / "a.toml", '[supervisor]\ninclude = ["loop.toml"]\n')
    (problem,) = load_problems(main)
    assert problem["problem"].startswith("cannot be read: ")


def test_a_dependency_on_a_target_in_a_broken_file_is_not_called_unknown(tmp_path: Path) -> None:
    main = write(
        tmp_path / "a.toml",
        '[supervisor]\ninclude = ["b.toml"]\n[target.a]\ncommand="sh"\ndepends_on=["b"]\n',
    )
    write(tmp_path / "b.toml", "[target.b]\ncommand = sh\n")
    (problem,) = load_problems(main)
    assert problem["problem"].startswith("not valid TOML")


def test_a_target_in_two_files_names_both(tmp_path: Path) -> None:
    main = write(tmp_path / "a.toml", '[supervisor]\ninclude = ["b.toml"]\n[target.x]\ncommand="sh"\n')
    other = write(tmp_path / "b.toml", '[target.x]\ncommand="sh"\n')
    (problem,) = load_problems(main)
    assert problem["problem"] == f"defined in {main} and again in {other}"
    assert problem["file"] == str(other)


def test_a_broken_include_is_told_once(tmp_path: Path) -> None:
    main = write(tmp_path / "a.toml", "[supervisor]\ninclude = 5\n")
    (problem,) = load_problems(main)
    assert problem["key"] == "supervisor.include"


# --- all at once, and where ---------------------------------------------------------------------------------


def test_all_problems_are_told_at_once_in_the_order_of_the_file() -> None:
    text = """\
[supervisor]
regoin = "x"

[target.web]
command = "echo 'x"
instances = 20000
env = { TOKEN = 5 }
stop_signal = "TREM"

[target.web.log]
max_size = "big"

[target.db]
depends_on = ["wbe"]
"""
    error = error_of(text)
    assert [(p["line"], p["key"]) for p in error.details["problems"]] == [
        (2, "supervisor.regoin"), (5, "target.web.command"), (6, "target.web.instances"),
        (7, "target.web.env.TOKEN"), (8, "target.web.stop_signal"), (11, "target.web.log.max_size"),
        (13, "target.db.command"), (14, "target.db.depends_on"),
    ]  # fmt: skip
    assert len(error.message.splitlines()) == len(error.details["problems"])
    for line, problem in zip(error.message.splitlines(), error.details["problems"], strict=True):
        assert line.startswith(f"{FILE}:{problem['line']}: {problem['key']}")


def test_files_are_called_what_the_user_called_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "asyncsup.toml", '[supervisor]\ninclude = ["conf.d/*"]\nx = 1\n')
    write(tmp_path / "conf.d/b.toml", "y = 1\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_config(Path("asyncsup.toml"))
    lines = caught.value.message.splitlines()
    assert lines[0].startswith("asyncsup.toml:3: supervisor.x: unknown key")
    assert lines[1].startswith("conf.d/b.toml:1: y: unknown key")
    assert [p["file"] for p in caught.value.details["problems"]] == [
        str(tmp_path / "asyncsup.toml"), str(tmp_path / "conf.d/b.toml"),
    ]  # fmt: skip


def test_long_values_are_shortened() -> None:
    value = problem_of(f'restart = "{"x" * 500}"')["value"]
    assert len(value) == 60
    assert value.endswith(" ...")


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("[target.web\n", 1, "not valid TOML at column 12: expected ']'"),
        ("a = 1\n[b]\nx = allways\n", 3, "not valid TOML at column 5: invalid value"),
        ("x = 1\nx = 2\n", 2, "not valid TOML at column 6: cannot overwrite a value"),
        ('x = """\n\n', 3, "not valid TOML: unterminated string"),
        ("x = {\n a = 1 }\n", 1, "not valid TOML at column 6"),
        ("[a]\n[a]\n", 2, "not valid TOML at column 3: cannot declare"),
        ('x = "\x1b[31m"', 1, "not valid TOML at column 6"),
    ],
)
def test_a_syntax_error_has_line_and_column(text: str, line: int, what: str) -> None:
    error = error_of(text)
    (problem,) = error.details["problems"]
    assert (problem["key"], problem["line"], problem["value"]) == ("", line, None)
    assert problem["problem"].startswith(what)
    assert error.message.startswith(f"{FILE}:{line}: not valid TOML")
    assert error.message.isprintable()


@pytest.mark.parametrize("text", ["x = " + "[" * 5000, "x = " + "9" * 5000])
def test_texts_that_break_the_parser_are_refused_like_others(text: str) -> None:
    assert len(problems_of(text)) == 1


def test_bytes_that_are_not_utf_8_are_told_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(b"# fine\n# \xff\n")
    (problem,) = load_problems(tmp_path / "a.toml")
    assert (problem["line"], problem["problem"]) == (2, "is not UTF-8")


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(b'\xef\xbb\xbf[target.web]\ncommand = "/bin/sh"\n')
    assert list(load_config(tmp_path / "a.toml").targets) == ["web"]


def test_lines_of_keys() -> None:
    text = """\
# comment [no.table]
top = 1
[a]
x = "[not]" # y = 1
'quoted key' = 2
"esc\\u0061ped"=3
b.c = { d = 1, "e f" = [ { g = 1 } ], h.i = '''x
y = 2''' }
multi = [
  "k = 1", # [comment]
  [ 1, 2 ],
  { z = 1 },
]
text = \"\"\"
[not.a.table]
k = 5
\\\"\"\" still
"\"\"\"
after = 1979-05-27 07:32:00
[[list]]
one = 1
[ spaced . "out" ]
two=+1e5
"""
    tomllib.loads(text)
    assert find_lines(text) == {
        ("top",): 2, ("a",): 3, ("a", "x"): 4, ("a", "quoted key"): 5, ("a", "escaped"): 6, ("a", "b"): 7,
        ("a", "b", "c"): 7, ("a", "b", "c", "d"): 7, ("a", "b", "c", "e f"): 7, ("a", "b", "c", "h"): 7,
        ("a", "b", "c", "h", "i"): 7, ("a", "multi"): 9, ("a", "text"): 14, ("a", "after"): 19,
        ("list",): 20, ("list", "one"): 21, ("spaced",): 22, ("spaced", "out"): 22,
        ("spaced", "out", "two"): 23,
    }  # fmt: skip


_VALUES = st.sampled_from(
    ["1", "-2.5e3", "true", "1979-05-27T07:32:00Z", "1979-05-27 07:32:00", '"a # b"',
     "'c = [d]'", '"\\"x\\\\"', "[]", "[1, 2]", "{}", "{ k = 1 }", "[\n  1, # x = 2\n\n  [ 'y = 3' ],\n]",
     '"""\n[t]\nz = 1\n"""', '""""x"""""', "'''\nq = \"\"\"\n'''", "[ { a = 1 }, { b = [ 2 ] } ]", "inf",
     "0xff"]
)  # fmt: skip


@given(
    st.lists(
        st.tuples(st.booleans(), _VALUES, st.sampled_from(["", "\n", " # c\n", "\n# [x]\n"])), max_size=30
    )
)
def test_lines_are_found_whatever_the_values_are(statements: list[tuple[bool, str, str]]) -> None:
    text, table = "", "top"
    expected: dict[tuple[str, ...], int] = {}
    for number, (header, value, gap) in enumerate(statements):
        line = text.count("\n") + 1
        if header:
            table = f"table{number}"
            text += f"[{table}]\n{gap}"
            expected[table,] = line
        elif table == "top":
            continue
        else:
            text += f"key{number} = {value}\n{gap}"
            expected[table, f"key{number}"] = line
    tomllib.loads(text)
    found = find_lines(text)
    assert {key: found.get(key) for key in expected} == expected


@given(st.text() | st.text(alphabet="[]{}=.,\"'#\\ \nab1"))
def test_the_line_finder_survives_any_text(text: str) -> None:
    for keys, line in find_lines(text).items():
        assert keys
        assert 1 <= line <= text.count("\n") + 1


# --- nothing but Config or ConfigError ----------------------------------------------------------------------

_SCALARS = (
    st.none() | st.booleans() | st.integers() | st.integers(-3, 20_000) | st.floats()
    | st.text(max_size=20) | st.dates() | st.times() | st.datetimes()
    | st.sampled_from(
        ["x", "10s", "50MB", "TERM", "HUP", "022", "tree", "sdk", "always", "unlimited", "${A}",
         "${instance}", "$", "${name}", "${here}", "~", ".", "..", "/", "", "a b 'c", "ipc://x", "ipc://@", "tcp://x",
         "work", "work/x", "\0", "\x1b[0m", "${B", "root", "web", "db", "warm", "stdout", "separate"]
    )
)  # fmt: skip
_ANYTHING = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def _names(kind: type) -> st.SearchStrategy[str]:
    return st.sampled_from([*options(kind), "unknown", ""])


_LOG = st.dictionaries(_names(LogConfig), _ANYTHING, max_size=3)
_LIMITS = st.dictionaries(st.sampled_from([*LIMITS, "x"]), _ANYTHING, max_size=3)
_TARGET = st.builds(
    lambda plain, log, limits, patch, env: {**plain, **log, **limits, **patch, **env},
    st.dictionaries(_names(TargetConfig), _ANYTHING, max_size=5),
    st.one_of(st.just({}), st.fixed_dictionaries({"log": _LOG | _ANYTHING})),
    st.one_of(st.just({}), st.fixed_dictionaries({"limits": _LIMITS | _ANYTHING})),
    st.one_of(
        st.just({}),
        st.fixed_dictionaries({"patch": st.dictionaries(_names(TargetPatchConfig), _ANYTHING, max_size=3)}),
    ),
    st.one_of(
        st.just({}),
        st.fixed_dictionaries({"env": st.dictionaries(st.text(max_size=4), _ANYTHING, max_size=2)}),
    ),
)
_TARGETS = st.dictionaries(
    st.sampled_from(["web", "Web", "db", "all", "a.b", "-", ""]) | st.text(max_size=4),
    _TARGET | _ANYTHING,
    max_size=3,
)
_WHOLE = st.fixed_dictionaries(
    {},
    optional={
        "supervisor": st.dictionaries(_names(SupervisorConfig), _ANYTHING, max_size=3) | _ANYTHING,
        "patch": st.dictionaries(_names(PatchConfig), _ANYTHING, max_size=3) | _ANYTHING,
        "defaults": _TARGET | _ANYTHING,
        "target": _TARGETS | _ANYTHING,
        "other": _ANYTHING,
    },
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(_WHOLE, _WHOLE)
@example({"target": {"web": {"command": "x", "log": {"stdout": "a"}, "instances": 5}}}, {})
def test_any_mapping_gives_a_config_or_a_config_error(main: dict[str, Any], included: dict[str, Any]) -> None:
    for machine in (None, Unprivileged()):
        try:
            config = parse_config(
                main, path=FILE, includes={HERE / "b.toml": included}, environ={"A": "a\nb"}, machine=machine
            )
        except ConfigError as error:
            assert error.details["problems"]
            assert len(error.message.splitlines()) == len(error.details["problems"])
            for problem in error.details["problems"]:
                assert set(problem) == {"file", "line", "key", "value", "problem", "hint"}
                assert all(isinstance(problem[key], str) for key in ("file", "key", "problem"))
        else:
            for name, found in config.targets.items():
                assert found.name == name
                assert found.command
                assert config.describe(name)["name"] == name


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200) | st.text(alphabet="[]{}=.,\"'#\\ \ntargetcomnd", max_size=200))
def test_any_text_gives_a_config_or_a_config_error(text: str) -> None:
    try:
        parse(text)
    except ConfigError as error:
        assert error.details["problems"]


# --- finding and loading ------------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path


def test_the_configuration_is_looked_for_in_this_order(places: Path) -> None:
    environ = {"HOME": str(places / "home"), "ASYNCSUP_CONFIG": ""}
    home = write(places / "home/.config/asyncsup/asyncsup.toml", "")
    assert find_config(None, environ) == home
    environ["XDG_CONFIG_HOME"] = "relative/is/ignored"
    assert find_config(None, environ) == home
    environ["XDG_CONFIG_HOME"] = str(places / "xdg")
    xdg = write(places / "xdg/asyncsup/asyncsup.toml", "")
    assert find_config(None, environ) == xdg
    Path("asyncsup.toml").write_text("")
    assert find_config(None, environ) == Path("asyncsup.toml")
    environ["ASYNCSUP_CONFIG"] = str(write(places / "named.toml", ""))
    assert find_config(None, environ) == places / "named.toml"
    explicit = write(places / "explicit.toml", "")
    assert find_config(explicit, environ) == explicit


def test_no_configuration_says_where_it_was_looked_for(places: Path) -> None:
    if Path("/etc/asyncsup/asyncsup.toml").exists():
        pytest.skip("this machine has a configuration of its own")
    with pytest.raises(ConfigError) as caught:
        find_config(None, {"HOME": str(places)})
    assert caught.value.error_code == "config.not_found"
    assert caught.value.details["looked"] == [
        "asyncsup.toml", f"{places}/.config/asyncsup/asyncsup.toml", "/etc/asyncsup/asyncsup.toml",
    ]  # fmt: skip
    assert "asyncsup init" in caught.value.message


@pytest.mark.parametrize("how", ["-c", "ASYNCSUP_CONFIG"])
def test_a_file_that_was_named_has_to_be_there(places: Path, how: str) -> None:
    write(places / "cwd/asyncsup.toml", "")
    missing = places / "missing.toml"
    explicit, environ = (missing, {}) if how == "-c" else (None, {how: str(missing)})
    with pytest.raises(ConfigError, match=how) as caught:
        find_config(explicit, environ)
    assert caught.value.error_code == "config.not_found"
    with pytest.raises(ConfigError) as caught:
        load_config(missing)
    assert caught.value.error_code == "config.not_found"


def test_a_folder_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: Is a directory") as caught:
        load_config(find_config(tmp_path, {}))
    assert caught.value.error_code == "config.unreadable"


def test_clients_read_the_supervisor_table_and_nothing_else(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.toml",
        '[supervisor]\nruntime_dir = "/run/x"\ninclude = ["*"]\n[target.web]\ncomand = 5\nroot = "no"\n',
    )
    assert load_supervisor(file).endpoint == "ipc:///run/x/control.sock"
    write(file, '[supervisor]\nendpoint = "tcp://x"\n[target.web]\ncomand = 5\n')
    with pytest.raises(ConfigError) as caught:
        load_supervisor(file)
    assert [problem["key"] for problem in caught.value.details["problems"]] == ["supervisor.endpoint"]


def test_the_environment_of_this_process_is_used_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONFIG_TEST_REGION", "India")
    file = write(tmp_path / "a.toml", '[supervisor]\nregion = "${CONFIG_TEST_REGION}"\n')
    assert load_config(file).supervisor.region == "India"
    assert load_supervisor(file).region == "India"
    with pytest.raises(ConfigError, match="CONFIG_TEST_REGION"):
        load_config(file, environ={})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_says_so(tmp_path: Path) -> None:
    file = write(tmp_path / "a.toml", "")
    file.chmod(0)
    with pytest.raises(ConfigError, match="Permission denied") as caught:
        load_config(find_config(file, {}))
    assert caught.value.error_code == "config.unreadable"


def test_importing_the_configuration_imports_nothing_heavy() -> None:
    heavy = {
        "anyio", "zmq", "asyncio", "orjson", "difflib", "shlex", "shutil", "glob", "pwd", "grp", "graphlib",
        "asyncsup.patch.manifest",
    }  # fmt: skip
    code = f"import sys, asyncsup.config; print(*sorted(set(sys.modules) & {heavy!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_thousand_targets_are_read(tmp_path: Path) -> None:
    text = "".join(f'[target.t{i}]\ncommand = "sh -c {i}"\nroot = "r{i}"\n' for i in range(1000))
    for i in range(1000):
        (tmp_path / f"r{i}").mkdir()
    assert len(load_config(write(tmp_path / "a.toml", text)).targets) == 1000


# --- describe -----------------------------------------------------------------------------------------------


def test_a_described_target_is_json_and_has_no_secret() -> None:
    orjson = pytest.importorskip("orjson")
    web = target(
        'command = ["a", "b"]\nenv = { TOKEN = "hush", A = "x" }\numask = "027"\nroot = "w"\n'
        'reload_signal = "HUP"\n'
        'limits = { nofile = "unlimited", as = 5 }\nlog.stdout = "x"\npatch.allow = ["warm"]\n'
    )
    described = orjson.loads(orjson.dumps(describe(web)))
    assert "hush" not in str(described)
    assert set(described) == {"name", *options(TargetConfig)}
    assert (described["name"], described["command"], described["env"]) == ("web", ["a", "b"], ["A", "TOKEN"])
    assert (described["umask"], described["root"], described["reload_signal"]) == (
        "027",
        "/etc/app/w",
        "SIGHUP",
    )
    assert described["limits"] == {"nofile": "unlimited", "as": 5}
    assert described["log"]["stdout"] == "/etc/app/x"
    assert described["patch"]["allow"] == ["warm"]


# --- the documentation --------------------------------------------------------------------------------------


def _documented() -> dict[str, dict[str, tuple[str, str, str]]]:
    """Table to key to type, default and meaning, as the page has them."""
    tables: dict[str, dict[str, tuple[str, str, str]]] = {}
    table = ""
    for line in DOCS.read_text().splitlines():
        if match := re.match(r"#+ `\[([a-zA-Z.]+)\]`", line):
            table = match[1]
        elif match := re.fullmatch(r"\| `(\w+)` \| (.+?) \| (.+?) \| (.*?) ?\|", line):
            assert match[1] not in tables.setdefault(table, {}), f"{match[1]} is there twice"
            tables[table][match[1]] = (match[2], match[3], match[4])
    return tables


def test_the_page_has_every_key_with_its_type_and_default() -> None:
    def expected(kind: type) -> dict[str, tuple[str, str]]:
        return {option.name: (option.type_text, option.default_text) for option in options(kind).values()}

    timing = {
        name: (option.type_text, f"`{name}` of `[patch]`") for name, option in options(PatchConduct).items()
    }
    documented = {table: {key: row[:2] for key, row in keys.items()} for table, keys in _documented().items()}
    assert documented == {
        "supervisor": expected(SupervisorConfig),
        "patch": expected(PatchConfig),
        "patch.limits": expected(PatchLimits),
        "target.NAME": expected(TargetConfig),
        "group.NAME": expected(GroupConfig),
        "socket.NAME": expected(SocketConfig),
        "target.NAME.ready": expected(ReadyConfig),
        "target.NAME.liveness": expected(LivenessConfig),
        "target.NAME.hooks": expected(HooksConfig),
        "target.NAME.log": expected(LogConfig),
        "target.NAME.limits": {name: (kind.name, "inherited") for name, kind in LIMITS.items()},
        "target.NAME.patch": {**expected(TargetPatchConfig), **timing},
    }


def _examples() -> list[str]:
    return re.findall(r"^```toml\n(.*?)^```", DOCS.read_text(), re.DOTALL | re.MULTILINE)


def test_the_examples_of_the_page_are_valid() -> None:
    for text in _examples():
        config = parse(text, environ={"MAINPID": "never"})
        assert config.warnings == () or "nothing to run" in config.warnings[0]


def test_the_examples_of_the_page_show_every_key() -> None:
    shown: dict[str, set[str]] = {}

    def walk(table: str, values: Mapping[str, Any], kind: type) -> None:
        shown.setdefault(table, set()).update(values)
        for option in options(kind).values():
            if option.name in values and not isinstance(option.type, ValueType):
                inner = f"{table}.{option.name}"
                if isinstance(option.type, Entries):
                    shown.setdefault(inner, set()).update(values[option.name])
                else:
                    walk(inner, values[option.name], option.type)

    for text in _examples():
        data = tomllib.loads(text)
        walk("supervisor", data.get("supervisor", {}), SupervisorConfig)
        walk("patch", data.get("patch", {}), PatchConfig)
        for body in data.get("group", {}).values():
            walk("group.NAME", body, GroupConfig)
        for body in data.get("socket", {}).values():
            walk("socket.NAME", body, SocketConfig)
        for body in [data.get("defaults", {}), *data.get("target", {}).values()]:
            walk("target.NAME", body, TargetConfig)
    missing = {
        f"{table}.{key}"
        for table, keys in _documented().items()
        for key in keys
        if key not in shown.get(table, set())
    }
    assert missing == set()


def test_the_errors_the_page_shows_are_the_real_ones() -> None:
    block = re.findall(r"^```text\n(.*?)^```", DOCS.read_text(), re.DOTALL | re.MULTILINE)[0]
    text = (
        "\n" * 10
        + '[target.web]\nrestart = "allways"\ncommand = "x"\n\n'
        + '[target.worker]\ncommand = "x"\nstop_timout = 1\n'
    )
    with pytest.raises(ConfigError) as caught:
        parse_config(text, path=Path("asyncsup.toml"))
    assert caught.value.message == block.strip()
