"""Control groups: no fork leads out of one, they outlive a supervisor, and where there are none that is said.

The kernel's own cgroup v2 in every test but two: one reads what is written for each limit from plain files,
and one has User Mode Linux (a kernel that runs as a program) in between, for the tests of limits on machines
whose own kernel does not offer the controllers. A group is set up before its supervisor, and outlives it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import Serve, alive, children_of, end_process, wait_for
from requirements import require_program

from asyncsup.cgroups import Cgroup, Usage
from asyncsup.client import ControlClient
from asyncsup.errors import RemoteError

QUICK = '[defaults]\nmin_uptime = "50ms"\nrestart_delay = "10ms"\nrestart_max_delay = "10ms"\n'
SLEEPER = 'command = ["sleep", "3600"]\n'
DAEMONS = """\
import os, signal, sys, time
def daemon(name):
    if os.fork():
        return
    os.setsid()
    between = os.getpid()
    if os.fork():
        os._exit(0)
    signal.signal(signal.SIGTERM, lambda *_: (open(name + ".told", "w").close(), os._exit(0)))
    while os.getppid() == between:
        time.sleep(0.01)
    open(name, "w").write(str(os.getpid()))
    while True:
        time.sleep(60)
for number in range(3):
    daemon(f"daemon{number}")
while True:
    time.sleep(60)
"""
"""Each forks twice and begins a session of its own: no process group and no parent leads to it."""
CONTROLLERS = ("cpu", "memory", "pids")


# --- where there are control groups -------------------------------------------------------------------------


def _remove(folder: Path) -> None:
    """A control group and all below it, with the processes in them."""
    kill = folder / "cgroup.kill"
    if kill.exists():
        kill.write_text("1")
        wait_for(lambda: not Cgroup(folder).populated, "a control group to be empty")
    for below, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(FileNotFoundError):
            Path(below).rmdir()


@contextlib.contextmanager
def _hierarchy() -> Iterator[Path]:
    """The root of cgroup v2, mounted for us."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount cgroup v2 and make groups in it")
    point = Path(tempfile.mkdtemp(prefix="cg-"))
    mounted = subprocess.run(
        ["mount", "-t", "cgroup2", "none", point], capture_output=True, check=False, text=True
    )
    try:
        if mounted.returncode != 0:
            pytest.skip(f"cgroup v2 cannot be mounted here: {mounted.stderr.strip()}")
        yield point
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", point], check=True)
        point.rmdir()


@pytest.fixture
def hierarchy() -> Iterator[Path]:
    with _hierarchy() as root:
        yield root


@pytest.fixture
def delegated(hierarchy: Path) -> Iterator[Path]:
    """A control group of our own, with whatever controllers there are."""
    available = (hierarchy / "cgroup.controllers").read_text().split()
    group = hierarchy / f"tests-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error.strerror}")
    for controller in CONTROLLERS:
        if controller in available:
            with contextlib.suppress(OSError):
                (hierarchy / "cgroup.subtree_control").write_text(f"+{controller}")
    try:
        yield group
    finally:
        _remove(group)


@pytest.fixture
def bare(delegated: Path) -> Path:
    """One that has no controller to pass on, wherever the tests run."""
    group = delegated / "bare"
    group.mkdir()
    return group


@pytest.fixture
def controllers(delegated: Path) -> Path:
    missing = set(CONTROLLERS) - set((delegated / "cgroup.controllers").read_text().split())
    if missing:
        pytest.skip(f"cgroup v2 has no controller {', '.join(sorted(missing))} here (v1 may have them)")
    return delegated


def up(serve: Serve, root: Path | None, targets: str) -> ControlClient:
    where = "" if root is None else f'[supervisor]\ncgroup_root = "{root}"\n'
    return serve.start(f"{where}{QUICK}{targets}")


def instance(client: ControlClient, index: int = 0) -> dict[str, Any]:
    described: dict[str, Any] = client.call("status", usage=True)["targets"][0]["instances"][index]
    return described


def ready(client: ControlClient) -> dict[str, Any]:
    wait_for(lambda: instance(client)["ready"], "the instance to be ready")
    return instance(client)


def refusal(client: ControlClient) -> RemoteError:
    """How a start is refused, and a restart as well."""
    for method in ("restart", "start"):
        with pytest.raises(RemoteError) as caught:
            client.call(method, names=["a"])
        assert caught.value.error_code == "cgroup.unavailable"
    return caught.value


def group_of(client: ControlClient) -> Path:
    return Path(wait_for(lambda: instance(client)["cgroup"], "the instance to have a group"))


def members(group: Path) -> set[int]:
    return set(Cgroup(group).processes())


def daemons(serve: Serve) -> list[int]:
    """The pids of those that a program with `DAEMONS` has started."""
    files = [serve.folder / f"daemon{number}" for number in range(3)]
    wait_for(lambda: all(file.exists() and file.read_text() for file in files), "the daemons")
    return [int(file.read_text()) for file in files]


def with_daemons(serve: Serve, more: str = "") -> str:
    (serve.folder / "daemons.py").write_text(DAEMONS)
    return f'[target.a]\ncommand = ["{sys.executable}", "-I", "-S", "daemons.py"]\n{more}'


# --- who is in it, and how it ends --------------------------------------------------------------------------


def test_every_instance_has_a_group_of_its_own(delegated: Path, serve: Serve) -> None:
    client = up(serve, delegated, f"[target.a]\n{SLEEPER}instances = 2\n")
    ready(client)
    wait_for(lambda: instance(client, 1)["ready"], "the other instance")
    groups = [Path(instance(client, index)["cgroup"]) for index in range(2)]
    assert [group.name for group in groups] == ["a:0", "a:1"]
    assert [members(group) for group in groups] == [{instance(client, index)["pid"]} for index in range(2)]
    assert instance(client)["usage"]["processes"] == 1
    assert client.call("supervisor.info")["isolation"]["by"] == "cgroup"
    client.close()


def test_nobody_who_forks_at_once_is_outside(delegated: Path, serve: Serve) -> None:
    storm = "for i in $(seq 40); do (setsid sleep 3600 &) ; done; touch done; exec sleep 3600"
    client = up(serve, delegated, f"[target.a]\ncommand = ['sh', '-c', '{storm}']\n")
    wait_for((serve.folder / "done").exists, "all to be started")
    wait_for(lambda: len(members(group_of(client))) == 41, "all to be in the group")
    group = group_of(client)
    client.call("stop", names=["a"])
    assert not group.exists()
    client.close()


def test_daemons_that_have_left_the_process_group_are_told_at_the_stop(delegated: Path, serve: Serve) -> None:
    client = up(serve, delegated, with_daemons(serve, 'stop_timeout = "1h"\n'))
    pids = daemons(serve)
    client.call("stop", names=["a"])
    assert not any(alive(pid) for pid in pids)
    assert all((serve.folder / f"daemon{number}.told").exists() for number in range(3))
    client.close()


def test_daemons_that_do_not_end_are_killed_at_the_time_out(delegated: Path, serve: Serve) -> None:
    client = up(serve, delegated, with_daemons(serve, 'stop_timeout = "300ms"\n'))
    pids = daemons(serve)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    (serve.folder / "daemons.py").write_text("")
    group = group_of(client)
    client.call("stop", names=["a"])
    assert not any(alive(pid) for pid in pids)
    assert not group.exists()
    client.close()


def test_nothing_is_left_of_a_program_that_crashes(delegated: Path, serve: Serve) -> None:
    client = up(serve, delegated, with_daemons(serve, 'restart = "never"\n'))
    pids = daemons(serve)
    os.kill(ready(client)["pid"], signal.SIGKILL)
    wait_for(lambda: instance(client)["state"] == "failed", "the instance to have failed")
    assert not any(alive(pid) for pid in pids)
    client.close()


def test_kill_mode_process_leaves_them_alone(delegated: Path, serve: Serve) -> None:
    client = up(serve, delegated, with_daemons(serve, 'kill_mode = "process"\n'))
    pids = daemons(serve)
    group = group_of(client)
    client.call("stop", names=["a"])
    assert members(group) == set(pids)
    client.close()


def test_a_nested_group_of_the_programs_own_is_no_obstacle(delegated: Path, serve: Serve) -> None:
    client = up(serve, delegated, f"[target.a]\n{SLEEPER}")
    ready(client)
    group = group_of(client)
    (group / "its own").mkdir()
    (group / "its own/cgroup.procs").write_text(str(instance(client)["pid"]))
    client.call("stop", names=["a"])
    assert not group.exists()
    client.close()


def test_nothing_is_left_after_an_orderly_end(delegated: Path, serve: Serve) -> None:
    client = up(serve, delegated, f"[target.a]\n{SLEEPER}")
    base = group_of(client).parent
    client.close()
    assert serve.stop() == 0
    assert not base.exists()


def test_hooks_and_the_program_come_one_after_the_other_in_one_group(delegated: Path, serve: Serve) -> None:
    seen = "cat /proc/self/cgroup > hook"
    client = up(serve, delegated, f"[target.a]\n{SLEEPER}hooks.pre_start = ['sh', '-c', '{seen}']\n")
    ready(client)
    assert (serve.folder / "hook").read_text().splitlines()[-1].endswith("/a:0")
    client.close()


# --- over the end of supervisors ----------------------------------------------------------------------------


def test_a_killed_supervisor_changes_nothing(delegated: Path, serve: Serve) -> None:
    client = up(serve, delegated, with_daemons(serve))
    pids, pid, group = daemons(serve), ready(client)["pid"], group_of(client)
    client.close()
    serve.kill_supervisor()
    client = serve.connect()
    assert (instance(client)["pid"], group_of(client)) == (pid, group)
    client.call("stop", names=["a"])
    assert not any(alive(pid) for pid in pids)
    assert not group.exists()
    client.close()


@pytest.mark.parametrize("alone", [False, True])
def test_another_program_in_its_place_keeps_them(delegated: Path, serve: Serve, alone: bool) -> None:
    serve.alone = alone
    client = up(serve, delegated, with_daemons(serve))
    pids, pid, group = daemons(serve), ready(client)["pid"], group_of(client)
    before = client.call("supervisor.info")["started"]
    client.call("supervisor.reexec")
    client.close()
    client = serve.connect_to_next(before)
    assert (instance(client)["pid"], group_of(client)) == (pid, group)
    client.call("stop", names=["a"])
    assert not any(alive(pid) for pid in pids)
    client.close()


def test_the_next_supervisor_ends_what_a_dead_program_has_left(delegated: Path, serve: Serve) -> None:
    """Supervisor and keeper are killed, then the program; only its daemons are left."""
    targets = with_daemons(serve, 'restart = "never"\n')
    client = up(serve, delegated, targets)
    pids, pid, group = daemons(serve), ready(client)["pid"], group_of(client)
    client.close()
    serve.kill()
    end_process(pid)
    assert all(alive(pid) for pid in pids)
    client = up(serve, delegated, targets)
    wait_for(lambda: instance(client)["state"] == "failed", "the end to be seen")
    wait_for(lambda: not group.exists(), "the group to go")
    assert not any(alive(pid) for pid in pids)
    client.close()


def test_an_instance_that_is_configured_no_more_goes_with_its_group(delegated: Path, serve: Serve) -> None:
    client = up(serve, delegated, with_daemons(serve))
    pids, group = daemons(serve), group_of(client)
    client.close()
    serve.kill()
    client = up(serve, delegated, f"[target.b]\n{SLEEPER}")
    wait_for(lambda: not group.exists(), "the group to go")
    assert not any(alive(pid) for pid in pids)
    client.close()


def test_groups_of_nobody_are_removed_or_left_alone_and_said(delegated: Path, serve: Serve) -> None:
    client = up(serve, delegated, f"[target.a]\n{SLEEPER}")
    base = group_of(client).parent
    client.close()
    (base / "empty:0").mkdir()
    (base / "full:0").mkdir()
    stranger = subprocess.Popen(["sleep", "3600"])
    try:
        (base / "full:0/cgroup.procs").write_text(str(stranger.pid))
        serve.kill_supervisor()
        serve.connect().close()
        wait_for(lambda: not (base / "empty:0").exists(), "the empty group to go")
        said = f"{base}/full:0 holds processes of no instance that is known"
        wait_for(lambda: said in serve.errors(), "the other one to be told of")
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


# --- in its own group ---------------------------------------------------------------------------------------


class InOwnGroup(Serve):
    """`serve` where a container would have it: the root of its cgroup namespace is what it was given."""

    def __init__(self, folder: Path, group: Path) -> None:
        super().__init__(folder)
        self.group = group

    def command(self, *arguments: str) -> list[str]:
        point = self.folder / "cgroup"
        point.mkdir(exist_ok=True)
        join = f'echo 0 > "{self.group}/cgroup.procs" && exec unshare --cgroup --mount "$@"'
        inside = f'mount -t cgroup2 none "{point}" && exec "$@"'
        return ["sh", "-c", join, "sh", "sh", "-c", inside, "sh", *super().command(*arguments)]


@pytest.fixture
def contained(short_tmp: Path, delegated: Path) -> Iterator[InOwnGroup]:
    group = delegated / "container"
    group.mkdir()
    server = InOwnGroup(short_tmp, group)
    yield server
    if server.process is not None:
        server.stop()
        assert "Traceback" not in server.errors(), server.errors()


def test_it_finds_the_group_it_was_given(contained: InOwnGroup) -> None:
    client = up(contained, None, f"[target.a]\n{SLEEPER}")
    pid = ready(client)["pid"]
    isolation = client.call("supervisor.info")["isolation"]
    assert isolation["by"] == "cgroup", isolation
    base = contained.group / Path(isolation["cgroup"]).name
    assert members(base / "a:0") == {pid}
    client.close()
    # And again, where the first one may have moved itself.
    contained.kill_supervisor()
    client = contained.connect()
    assert client.call("supervisor.info")["isolation"] == isolation
    assert instance(client)["pid"] == pid
    client.close()


def test_the_end_of_a_contained_one_leaves_no_process(contained: InOwnGroup) -> None:
    client = up(contained, None, with_daemons(contained))
    daemons(contained)
    client.close()
    assert contained.stop() == 0
    assert not Cgroup(contained.group).populated


# --- where there are none -----------------------------------------------------------------------------------


def test_without_them_process_groups_are_what_there_is(serve: Serve) -> None:
    client = up(serve, serve.folder / "none", f"[target.a]\n{SLEEPER}")
    assert ready(client)["cgroup"] is None
    isolation = client.call("supervisor.info")["isolation"]
    assert isolation["by"] == "process group"
    assert "is not in a cgroup v2 file system" in isolation["why"]
    client.call("stop", names=["a"])
    client.close()


@pytest.mark.parametrize(
    ("settings", "needs"),
    [
        ('cgroup = "required"\n', 'cgroup = "required" needs a control group'),
        ('limits.memory = "64MB"\n', "limits.memory needs a control group"),
        ("limits.pids = 10\n", "limits.pids needs a control group"),
        ("limits.cpus = 0.5\n", "limits.cpus needs a control group"),
    ],
)
def test_what_needs_one_is_refused_without(serve: Serve, settings: str, needs: str) -> None:
    client = up(serve, serve.folder / "none", f"[target.a]\n{SLEEPER}autostart = false\n{settings}")
    refused = refusal(client)
    assert needs in refused.message
    assert instance(client)["state"] == "stopped"
    client.close()


def test_an_autostart_that_is_refused_says_why_in_the_status(serve: Serve) -> None:
    client = up(
        serve, serve.folder / "none", f'[target.a]\n{SLEEPER}restart = "never"\nlimits.memory = "9MB"\n'
    )
    wait_for(lambda: instance(client)["state"] == "failed", "the refusal")
    assert "limits.memory needs a control group" in instance(client)["detail"]
    client.close()


def test_optional_starts_without(serve: Serve) -> None:
    settings = 'cgroup = "optional"\nlimits.memory = "64MB"\n'
    client = up(serve, serve.folder / "none", f"[target.a]\n{SLEEPER}{settings}")
    ready(client)
    client.close()


def test_a_controller_that_was_not_passed_on_is_named(bare: Path, serve: Serve) -> None:
    client = up(serve, bare, f'[target.a]\n{SLEEPER}autostart = false\nlimits.memory = "64MB"\n')
    assert f"needs the controller memory, which {bare} does not have" in refusal(client).message
    client.close()


def test_optional_goes_without_a_controller_but_with_a_group(bare: Path, serve: Serve) -> None:
    settings = 'cgroup = "optional"\nlimits.memory = "64MB"\n'
    client = up(serve, bare, f"[target.a]\n{SLEEPER}{settings}")
    assert ready(client)["cgroup"] is not None
    usage = instance(client)["usage"]
    assert (usage["memory"], usage["processes"]) == (None, 1)
    client.close()


def test_figures_of_a_group_that_has_vanished_or_has_no_such_controller_are_unknown(tmp_path: Path) -> None:
    gone = Cgroup(tmp_path / "gone").usage()
    assert gone == Usage(memory=None, cpu=None, processes=0, oom_kills=None)
    (tmp_path / "cgroup.procs").write_text("17\n18\n0\n")
    (tmp_path / "cpu.stat").write_text("usage_usec 2500000\nuser_usec 0\n")
    assert Cgroup(tmp_path).usage() == Usage(memory=None, cpu=2.5, processes=2, oom_kills=None)


def test_off_is_off(delegated: Path, serve: Serve) -> None:
    client = up(serve, delegated, f'[target.a]\n{SLEEPER}cgroup = "off"\n')
    assert ready(client)["cgroup"] is None
    client.close()


def test_somebody_who_may_not_move_processes_there_is_told(short_tmp: Path, delegated: Path) -> None:
    """The folder is theirs, but they run outside of it: the kernel lets nobody be brought in."""
    if shutil.which("setpriv") is None:
        pytest.skip("there is no setpriv (util-linux)")
    group = delegated / "theirs"
    group.mkdir()
    for path in (group, group / "cgroup.procs", group / "cgroup.subtree_control"):
        os.chown(path, 65534, 65534)
    short_tmp.chmod(0o755)
    script = (
        "from pathlib import Path; from asyncsup.cgroups import Cgroups; "
        f"print(Cgroups(Path({str(group)!r}), Path('x')).why)"
    )
    folders = (Path(__file__).parents[1], Path(msgspec.__file__).parents[1])
    asked = subprocess.run(
        [
            "setpriv",
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            "/usr/bin/env",
            "python3",
            "-c",
            script,
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    if "Permission denied" in asked.stderr or "No module" in asked.stderr:
        pytest.skip(f"another user cannot run this source tree: {asked.stderr.splitlines()[-1]}")
    assert "has to be started below the group it was given" in asked.stdout, asked.stderr


# --- limits -------------------------------------------------------------------------------------------------


def test_every_limit_is_written_as_the_kernel_reads_it(tmp_path: Path) -> None:
    files = ("memory.max", "memory.high", "cpu.max", "cpu.weight", "pids.max")

    def written() -> list[str]:
        return [(tmp_path / name).read_text() for name in files]

    for name in files:
        (tmp_path / name).write_text("")
    Cgroup(tmp_path).limit({"memory": 64e6, "memory_high": 5e7, "cpus": 1.5, "cpu_weight": 20, "pids": 9})
    assert written() == ["64000000", "50000000", "150000 100000", "20", "9"]
    for name in files:
        (tmp_path / name).write_text("")
    Cgroup(tmp_path).limit({"cpus": 0.01, "memory": -1})
    assert written() == ["max", "max", "1000 100000", "100", "max"]


def test_limits_are_in_force_with_controllers(controllers: Path, serve: Serve) -> None:
    settings = 'limits = { memory = "64MB", memory_high = "60MB", cpus = 0.5, cpu_weight = 20, pids = 9 }\n'
    client = up(serve, controllers, f"[target.a]\n{SLEEPER}{settings}")
    ready(client)
    group = group_of(client)

    def value(name: str) -> str:
        return (group / name).read_text().strip()

    assert int(value("memory.max")) == 64_000_000 // 4096 * 4096
    assert int(value("memory.high")) == 60_000_000 // 4096 * 4096
    assert (value("cpu.max"), value("cpu.weight"), value("pids.max")) == ("50000 100000", "20", "9")
    usage = instance(client)["usage"]
    assert 0 < usage["memory"] < 64_000_000
    assert (usage["processes"], usage["oom_kills"]) == (1, 0)
    assert usage["cpu"] > 0
    client.close()


def test_who_takes_too_much_memory_is_ended_and_it_is_said_with_controllers(
    controllers: Path, serve: Serve
) -> None:
    eater = "x = bytearray(200 << 20)\nfor i in range(0, len(x), 4096): x[i] = 1\n"
    (serve.folder / "eat.py").write_text(eater)
    command = f'command = ["{sys.executable}", "-I", "-S", "eat.py"]\n'
    client = up(serve, controllers, f'[target.a]\n{command}restart = "never"\nlimits.memory = "48MB"\n')
    wait_for(lambda: instance(client)["state"] == "failed", "the end of it", 60.0)
    ended = instance(client)["exit"]
    assert ended["signal"] == signal.SIGKILL
    assert ended["out_of_memory"] is True
    assert "out of memory" in ended["reason"]
    events = client.call("events.since", seq=0)["events"]
    assert any(event["type"] == "instance.oom" for event in events)
    client.close()


def test_too_many_processes_are_refused_with_controllers(controllers: Path, serve: Serve) -> None:
    forks = "for i in 1 2 3 4 5 6 7 8; do sleep 3600 & done; wait"
    client = up(
        serve,
        controllers,
        f"[target.a]\ncommand = ['sh', '-c', '{forks}']\nrestart = \"never\"\nlimits.pids = 4\n",
    )
    wait_for(lambda: "fork" in _output(client).lower(), "a fork to be refused")
    client.close()


def _output(client: ControlClient) -> str:
    return "".join(chunk["text"] for chunk in client.call("logs", name="a")["chunks"])


def test_it_moves_itself_out_of_the_way_with_controllers(contained: InOwnGroup, controllers: Path) -> None:
    """A group that shares out resources has no processes itself: the kernel refuses that."""
    for controller in CONTROLLERS:
        (controllers / "cgroup.subtree_control").write_text(f"+{controller}")
    client = up(contained, None, f'[target.a]\n{SLEEPER}limits.memory = "64MB"\n')
    ready(client)
    isolation = client.call("supervisor.info")["isolation"]
    assert isolation["controllers"] == list(CONTROLLERS), isolation
    assert members(contained.group) == set()
    assert contained.process is not None
    base = contained.group / Path(isolation["cgroup"]).name
    assert members(base / "supervisor") == {contained.process.pid, *_supervisors(contained)}
    client.close()
    contained.kill_supervisor()
    client = contained.connect()
    assert client.call("supervisor.info")["isolation"] == isolation
    client.call("restart", names=["a"])
    client.close()


def _supervisors(serve: Serve) -> set[int]:
    assert serve.process is not None
    return {pid for pid in children_of(serve.process.pid) if pid == serve.supervisor}


UML_INIT = """\
#!/bin/sh
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t tmpfs tmp /run
ip link set lo up 2>/dev/null
export PYTHONDONTWRITEBYTECODE=1 HOME=/run TMPDIR=/run
cd {folder} && {python} -m pytest -q --color=no -p no:cacheprovider --rootdir=. {file} -k with_controllers
echo "pytest ended with $?"
{python} -I -S -c 'import ctypes; ctypes.CDLL(None).reboot(0x4321fedc)'
"""


def test_the_limits_under_user_mode_linux(short_tmp: Path) -> None:
    """The tests of limits, in a kernel of their own, where ours does not offer the controllers."""
    linux = require_program("linux.uml")
    init = short_tmp / "init"
    folder = Path(__file__).parents[1]
    init.write_text(UML_INIT.format(folder=folder, python=sys.executable, file=Path(__file__)))
    init.chmod(0o755)
    kernel = [linux, "rootfstype=hostfs", "rootflags=/", "rw", f"init={init}", "mem=768M", "quiet"]
    with subprocess.Popen(
        [*kernel, "con=null", "con0=null,fd:1"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "TMPDIR": str(short_tmp)},
        text=True,
        errors="replace",
        start_new_session=True,
    ) as machine:
        try:
            console, _ = machine.communicate(timeout=240)
        finally:
            if machine.poll() is None:
                os.killpg(machine.pid, signal.SIGKILL)
    if "pytest ended with" not in console:
        pytest.skip(f"User Mode Linux does not come up here: {console[-300:]}")
    assert "pytest ended with 0" in console, console
    assert " passed" in console, console
    assert "skipped" not in console, console


def test_what_contradicts_itself_is_refused(serve: Serve) -> None:
    serve.write(f'[target.a]\n{SLEEPER}cgroup = "off"\nlimits.memory = "64MB"\n')
    checked = subprocess.run(
        [sys.executable, "-m", "asyncsup", "-c", serve.config, "config", "check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 5
    assert "limits.memory needs a control group" in checked.stdout + checked.stderr


@pytest.mark.parametrize("arguments", [["status", "-v"], ["show"]])
def test_it_is_said_which_isolation_there_is(bare: Path, serve: Serve, arguments: list[str]) -> None:
    client = up(serve, bare, f"[target.a]\n{SLEEPER}instances = 2\n")
    ready(client)
    client.close()
    asked = subprocess.run(
        [sys.executable, "-m", "asyncsup", "-c", serve.config, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"control groups in {bare}/asyncsup." in asked.stdout, asked.stdout + asked.stderr
