"""What an edit of the configuration means for what runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyncsup.config import parse_config
from asyncsup.config.changes import Changes, compare

BEFORE = """
[supervisor]
region = "eu"
[target.web]
command = "bin/web"
[target.db]
command = "bin/db"
"""


def changes(after: str, before: str = BEFORE) -> Changes:
    path = Path("/etc/asyncsup.toml")
    return compare(parse_config(before, path=path), parse_config(after, path=path))


def test_the_same_configuration_changes_nothing() -> None:
    assert changes(BEFORE).is_empty
    reordered = BEFORE.replace("[target.web]", "[target.w]").replace("[target.w]", "# a remark\n[target.web]")
    assert changes(reordered).is_empty


def test_what_comes_and_what_goes_is_named_and_the_rest_is_the_same() -> None:
    found = changes(BEFORE.replace("[target.db]", "[target.cache]"))
    assert (found.added, found.removed, dict(found.changed)) == (("cache",), ("db",), {})


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("stop_timeout = '3s'", "stop_timeout"),
        ("restart = 'always'", "restart"),
        ("instances = 3", "instances"),
        ("log.max_size = '1MB'", "log.max_size"),
        ("log.max_files = 2", "log.max_files"),
        ("log.max_age = '1d'", "log.max_age"),
        ("log.compress = 'gzip'", "log.compress"),
        ("log.stdout = 'x.log'", "log.stdout"),
        ("log.format = 'json'", "log.format"),
        ("liveness.tcp = 'localhost:1'", "liveness.tcp"),
        ("hooks.post_start = 'true'", "hooks.post_start"),
        ("depends_on = ['db']", "depends_on"),
        ("patch.probation = '1m'", "patch.probation"),
        ("reload_signal = 'HUP'", "reload_signal"),
    ],
)
def test_what_a_running_process_never_sees_restarts_nothing(line: str, key: str) -> None:
    found = changes(BEFORE.replace('"bin/web"', f'"bin/web"\n{line}'))
    assert dict.fromkeys(found.changed) == {"web": None}
    assert (found.changed["web"].keys, found.changed["web"].at_start) == ((key,), ())


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("env.A = 'b'", "env"),
        ("umask = '077'", "umask"),
        ("directory = '/tmp'", "directory"),
        ("limits.nofile = 5", "limits"),
        ("log.stderr = 'separate'", "log.stderr"),
        ("protocol = 'sdk'", "protocol"),
        ("ready.fd = 3", "ready.fd"),
    ],
)
def test_what_a_process_has_from_its_start_restarts_it(line: str, key: str) -> None:
    found = changes(BEFORE.replace('"bin/web"', f'"bin/web"\n{line}\nstop_timeout = "1s"'))
    assert set(found.changed["web"].keys) == {key, "stop_timeout"}
    assert found.changed["web"].at_start == (key,)


def test_a_default_concerns_whoever_does_not_say_otherwise() -> None:
    before = BEFORE.replace('"bin/db"', '"bin/db"\numask = "022"')
    found = changes(f"{before}[defaults]\numask = '077'\n", before)
    assert list(found.changed) == ["web"]


def test_a_region_concerns_targets_and_a_folder_only_another_supervisor() -> None:
    found = changes(BEFORE.replace('region = "eu"', 'region = "us"\nstate_dir = "/var/lib/x"'))
    assert {name: change.at_start for name, change in found.changed.items()} == {
        "web": ("region",),
        "db": ("region",),
    }
    assert set(found.postponed) == {"supervisor.state_dir", "supervisor.runtime_dir", "supervisor.endpoint"}
    assert found.immediate == ("supervisor.region",)


def test_groups_take_effect_at_once() -> None:
    assert changes(f"{BEFORE}[group.all-of-it]\ntargets = ['*']\n").immediate == ("group.all-of-it",)
