"""Cold patches, restarts and other settings without a gap: the new process first, then the old one goes."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Asked, Serve, alive, free_port, wait_for
from test_sockets import connect

from asyncsup import failpoints
from asyncsup.client import ControlClient
from asyncsup.errors import RemoteError
from asyncsup.patch.build import build_patch
from asyncsup.patch.manifest import Kind

PROGRAMS = Path(__file__).parent / "programs"
PATIENCE = 60.0
AT_ONCE = 8
"""Datagrams of one client that wait for an answer: a few hundred have room in a socket's buffer."""
LONG_PROBATION = 120.0
"""Whoever is to fail in it does so at once, and ends it."""
STARTS = {("stopped", "starting"), ("starting", "running")}


def place(folder: Path, kind: str) -> tuple[Any, str]:
    """An address for a socket of that kind: as the clients take it, and as the configuration does."""
    match kind:
        case "unix":
            return f"{folder}/app.sock", "unix://app.sock"
        case "ipv6":
            try:
                port = free_port(host="::1")
            except OSError as error:
                pytest.skip(f"no IPv6 here: {error}")
            return ("::1", port), f"tcp://[::1]:{port}"
        case "udp":
            port = free_port(kind=socket.SOCK_DGRAM)
            return ("127.0.0.1", port), f"udp://127.0.0.1:{port}"
        case _:
            port = free_port()
            return ("127.0.0.1", port), f"tcp://127.0.0.1:{port}"


class Client(threading.Thread):
    """Asks again and again, and takes down what goes wrong.

    Args:
        keep: one connection for as long as the service keeps it; else a new one for every question.
    """

    def __init__(self, address: Any, *, keep: bool, question: bytes = b"?\n") -> None:
        super().__init__(daemon=True)
        self.failures: list[str] = []
        self.answers: dict[str, int] = {}
        """How many answers there were of each version."""
        self._address = address
        self._keep = keep
        self._question = question
        self._ends = threading.Event()

    def run(self) -> None:
        connection: socket.socket | None = None
        while not self._ends.is_set():
            try:
                if connection is None:
                    connection = connect(self._address)
                connection.sendall(self._question)
                words = connection.recv(1024).decode().split()
                if not words:
                    raise ConnectionError("closed without an answer")
                self.answers[words[0]] = self.answers.get(words[0], 0) + 1
                if not self._keep or words[-1] == "bye":
                    connection.close()
                    connection = None
            except OSError as error:
                self.failures.append(repr(error))
                if connection is not None:
                    connection.close()
                connection = None
            time.sleep(0.002)
        if connection is not None:
            connection.close()

    def end(self) -> None:
        self._ends.set()
        self.join()


class DatagramClient(Client):
    """Sends numbered datagrams, and takes down which of them nobody answers, or more than one."""

    def __init__(self, address: tuple[str, int]) -> None:
        super().__init__(address, keep=False)

    def run(self) -> None:
        number = 0
        with socket.socket(type=socket.SOCK_DGRAM) as own:
            own.settimeout(PATIENCE)
            own.connect(self._address)
            while not self._ends.is_set():
                waiting = {b"%d" % (number + place) for place in range(AT_ONCE)}
                number += AT_ONCE
                for each in waiting:
                    own.send(each)
                try:
                    while waiting:
                        version, _, answered = own.recv(100).decode().partition(" ")
                        waiting.remove(answered.encode())
                        self.answers[version] = self.answers.get(version, 0) + 1
                except KeyError:
                    self.failures.append(f"{answered} was answered twice")
                except OSError as error:
                    self.failures.append(f"no answer to {sorted(waiting)}: {error}")
                time.sleep(0.002)


class Town:
    """A supervisor with one service on a managed socket, clients that use it, and patches for it.

    Args:
        kind: of the socket: tcp, ipv6, unix or udp.
        program: its file in ``programs``.
    """

    readiness = 'protocol = "sdk"'

    def __init__(self, serve: Serve, kind: str = "tcp", *, program: str = "service.py") -> None:
        self.serve = serve
        self.folder = serve.folder
        self.root = serve.folder / "app"
        self.root.mkdir()
        self.source = (PROGRAMS / program).read_text()
        (self.root / "service.py").write_text(self.source)
        self.address, self.listen = place(serve.folder, kind)
        self.clients: list[Client] = []
        self.build = 0
        self.control: ControlClient

    def settings(self, more: str = "", patch: str = "", *, layout: str = "overlay") -> str:
        command = json.dumps([sys.executable, str(self.root / "service.py")])
        usual = {"stop_timeout": "5s", "restart_delay": "50ms"}
        mine = "".join(f'{name} = "{value}"\n' for name, value in usual.items() if name not in more)
        return (
            f'[patch]\ntrust = "none"\nprobation = "500ms"\nack_timeout = "30s"\nkeep = 2\n'
            f'[socket.app]\nlisten = "{self.listen}"\n'
            f'[target.app]\ncommand = {command}\nroot = "app"\nlayout = "{layout}"\n{self.readiness}\n'
            f'sockets = ["app"]\n{mine}{more}\n'
            f"[target.app.patch]\n{patch}\n"
        )

    def start(self, more: str = 'start_timeout = "60s"', patch: str = "", *, layout: str = "overlay") -> None:
        self.control = self.serve.start(self.settings(more, patch, layout=layout))
        self.wait_ready()

    def again(self) -> None:
        self.control.close()
        self.control = self.serve.connect()

    def wait_ready(self) -> None:
        self.control.call("wait", {"names": ["app"], "for": "ready", "timeout": PATIENCE})

    def use(self) -> None:
        self.clients = [
            Client(self.address, keep=False),
            Client(self.address, keep=True),
            Client(self.address, keep=False, question=b"slow\n"),
        ]
        for client in self.clients:
            client.start()

    def heard(self, version: str) -> None:
        """Wait until a client has an answer of that version."""
        wait_for(lambda: any(version in client.answers for client in self.clients), f"answers of {version}")

    def unharmed(self) -> dict[str, int]:
        """Let the clients go; nothing must have gone wrong for them. Returns answers by version."""
        answers: dict[str, int] = {}
        for client in self.clients:
            client.end()
        assert [client.failures for client in self.clients] == [[]] * len(self.clients)
        for client in self.clients:
            for version, count in client.answers.items():
                answers[version] = answers.get(version, 0) + count
        self.clients = []
        return answers

    def patch(self, version: str, mode: str = "ok", **more: Any) -> str:
        self.build += 1
        old, new = (self.folder / f"{name}-{self.build}" for name in ("old", "new"))
        text = self.source.replace('VERSION = "v1"', f'VERSION = "{version}"')
        for folder, content in (
            (old, (self.root / "service.py").read_text()),
            (new, text.replace('MODE = "ok"', f'MODE = "{mode}"')),
        ):
            folder.mkdir()
            (folder / "service.py").write_text(content)
        package = self.folder / f"patch-{self.build}.zip"
        build_patch(
            old=old, new=new, output=package, name="app", version=version, build=self.build,
            kind=Kind.COLD, targets=["app"], regions=["local"], **more,
        )  # fmt: skip
        return str(package)

    def apply(self, version: str, mode: str = "ok", **more: Any) -> dict[str, Any]:
        done: dict[str, Any] = self.control.call(
            "patch.apply", {"path": self.patch(version, mode, **more)}, timeout=200
        )
        return done

    def refused(self, version: str, mode: str) -> RemoteError:
        """What it is refused with, or undone for within a long probation."""
        path = self.patch(version, mode, probation=LONG_PROBATION)
        asked = Asked(self.serve.endpoint, "patch.apply", path=path)
        if mode == "fall":  # not before it was found ready
            wait_for(lambda: [o["role"] for o in self.target["others"]] == ["standby"], "it to count")
            (self.folder / "fall").touch()
        answer = asked.answer()
        assert isinstance(answer, RemoteError), answer
        return answer

    @property
    def target(self) -> dict[str, Any]:
        found: dict[str, Any] = self.control.call("status", {"names": ["app"]})["targets"][0]
        return found

    @property
    def pids(self) -> list[int]:
        return [instance["pid"] for instance in self.target["instances"]]

    def wait_alone(self) -> None:
        """Until every slot has one process."""
        wait_for(lambda: not self.target["others"], "those that were replaced to end")

    def ask(self) -> str:
        with connect(self.address) as connection:
            connection.sendall(b"?\n")
            return connection.recv(1024).decode().split()[0]

    def close(self) -> None:
        for client in self.clients:
            client.end()
        if hasattr(self, "control"):
            self.control.close()


@pytest.fixture
def town(serve: Serve, request: pytest.FixtureRequest) -> Iterator[Town]:
    """On a TCP socket, unless the test says otherwise."""
    made = Town(serve, getattr(request, "param", "tcp"))
    yield made
    made.close()


def connection_to(town: Town, version: str) -> socket.socket:
    """Connected until it is one that this version has taken."""

    def try_one() -> socket.socket | None:
        made = connect(town.address)
        made.sendall(b"?\n")
        if made.recv(1024).decode().startswith(f"{version} "):
            return made
        made.close()  # the one before has not heard yet that it drains
        return None

    found: socket.socket = wait_for(try_one, f"a connection to {version}")
    return found


def last_answer(connection: socket.socket) -> str:
    """Ask until it is the last answer (it may not have heard yet that it drains); the version it is from."""

    def last() -> str | None:
        connection.sendall(b"?\n")
        version, _, *bye = connection.recv(1024).decode().split()
        return version if bye else None

    found: str = wait_for(last, "a last answer")
    return found


@pytest.mark.parametrize(
    ("town", "layout"),
    [("tcp", "overlay"), ("tcp", "tree"), ("ipv6", "overlay"), ("unix", "overlay")],
    indirect=["town"],
)
def test_a_cold_patch_loses_no_request(town: Town, layout: str) -> None:
    town.start(layout=layout)
    before = town.pids
    town.use()
    town.heard("v1")
    for number in range(2, 6):
        town.apply(f"v{number}")
    town.wait_alone()
    assert town.ask() == "v5"
    town.heard("v5")
    answers = town.unharmed()
    assert set(answers) <= {f"v{n}" for n in range(1, 6)}
    assert answers["v1"]
    assert answers["v5"]
    assert town.pids != before


@pytest.mark.parametrize(
    ("town", "mode", "code"),
    [
        ("tcp", "crash", "patch.start_failed"),
        ("tcp", "mute", "patch.start_failed"),
        ("tcp", "regret", "patch.probation_failed"),
        ("tcp", "fall", "patch.probation_failed"),
        ("ipv6", "fall", "patch.probation_failed"),
        ("unix", "fall", "patch.probation_failed"),
    ],
    indirect=["town"],
)
def test_a_broken_build_costs_no_request_and_the_old_process_stays(town: Town, mode: str, code: str) -> None:
    town.start(f'start_timeout = "{25 if mode == "mute" else 60}s"')
    before = town.pids
    town.use()
    error = town.refused("v2", mode)
    assert error.error_code == "patch.rolled_back"
    assert error.details["cause"] == code
    town.wait_alone()
    assert town.pids == before
    assert town.ask() == "v1"
    assert set(town.unharmed()) <= {"v1", "v2"}
    assert town.target["build"] == 0
    # And a good one comes through afterwards.
    town.apply("v3")
    assert town.ask() in {"v1", "v3"}
    town.wait_alone()
    assert town.ask() == "v3"


class Post(Town):
    """On a UDP socket."""

    def __init__(self, serve: Serve, mode: str) -> None:
        super().__init__(serve, "udp", program="datagrams.py")
        if mode != "ok":
            # Datagrams are waited for as connections are, which is seen in the same way.
            self.readiness = "ready.accepts = true"
            self.source = self.source.replace('MODE = "ok"', f'MODE = "{mode}"')
            (self.root / "service.py").write_text(self.source)

    def use(self) -> None:
        self.clients = [DatagramClient(self.address) for _ in range(3)]
        for client in self.clients:
            client.start()

    def is_patched_without_a_loss(self) -> None:
        self.start()
        self.use()
        self.heard("v1")
        versions = ["v2", "v3", "v4"]
        for version in versions:
            self.apply(version)
            self.wait_alone()
            self.heard(version)
        assert set(self.unharmed()) == {"v1", *versions}


@pytest.mark.parametrize("mode", ["ok", "ends"])
def test_a_cold_patch_loses_no_datagram(serve: Serve, mode: str) -> None:
    with contextlib.closing(Post(serve, mode)) as post:
        post.is_patched_without_a_loss()


def test_a_broken_build_costs_no_datagram(serve: Serve) -> None:
    with contextlib.closing(Post(serve, "ok")) as post:
        post.start()
        before = post.pids
        post.use()
        post.heard("v1")
        assert post.refused("v2", "crash").details["cause"] == "patch.start_failed"
        post.wait_alone()
        assert post.pids == before
        assert set(post.unharmed()) == {"v1"}


def test_a_successor_counts_only_when_it_waits_for_connections(town: Town) -> None:
    """Seen from outside: whatever it says itself, and although the old one waits at the same socket."""
    town.readiness = 'protocol = "sdk"\nready.accepts = true\nready.interval = "20ms"'
    town.start('start_timeout = "10m"')
    before = town.pids
    town.use()
    asked = Asked(town.serve.endpoint, "patch.apply", path=town.patch("v2", "late"))
    wait_for((town.folder / "late").exists, "it to say that it is ready")

    def answers() -> int:
        return sum(client.answers.get("v1", 0) for client in town.clients)

    enough = answers() + 100  # which takes as long as some looks at it
    wait_for(lambda: answers() > enough or town.pids != before, "answers of the old one", 200, every=0.1)
    assert town.pids == before
    (new,) = town.target["others"]
    assert (new["role"], new["state"]) == ("successor", "starting")
    assert not asked.is_answered
    (town.folder / "listen").touch()
    asked.result()
    town.wait_alone()
    assert town.pids == [new["pid"]]
    town.heard("v2")
    assert set(town.unharmed()) == {"v1", "v2"}


def test_while_a_patch_waits_for_its_commit_both_serve_and_an_abort_costs_nothing(town: Town) -> None:
    town.start(patch='commit = "manual"')
    before = town.pids
    town.use()
    txn = town.apply("v2")["txn"]
    (other,) = town.target["others"]
    assert (other["role"], other["pid"]) == ("standby", before[0])
    assert town.pids != before
    town.control.call("patch.abort", {"id": str(txn)})
    town.wait_alone()
    assert town.pids == before
    town.unharmed()


def test_several_instances_are_replaced_some_at_a_time(town: Town) -> None:
    town.start("instances = 3", patch="max_parallel = 1")
    before = town.pids
    with ControlClient(town.serve.endpoint) as control:
        since = control.call("events.since")["seq"]
        town.use()
        town.apply("v2")
        events = control.call("events.since", {"seq": since})["events"]
    town.wait_alone()
    assert not set(town.pids) & set(before)
    town.heard("v2")
    town.unharmed()
    # Each is spawned after the one before it is ready.
    order = [
        (event["instance"], event["to"])
        for event in events
        if event["type"] == "instance.state" and (event["from"], event["to"]) in STARTS
    ]
    assert order == [(f"app:{index}", state) for index in range(3) for state in ("starting", "running")]


def test_a_canary_that_falls_saves_the_others(town: Town) -> None:
    town.start("instances = 3", patch="canary = 1")
    before = town.pids
    with ControlClient(town.serve.endpoint) as control:
        since = control.call("events.since")["seq"]
        town.use()
        town.refused("v2", "regret")
        events = control.call("events.since", {"seq": since})["events"]
    town.wait_alone()
    assert town.pids == before
    town.unharmed()
    replaced = {event["instance"] for event in events if event["type"] == "instance.replaced"}
    assert replaced == {"app:0"}
    town.apply("v3")
    town.wait_alone()
    assert town.ask() == "v3"


@pytest.mark.parametrize("fault", ["kill", "error", "hang"])
def test_a_supervisor_that_is_killed_fails_or_hangs_at_a_canary_leaves_everything_as_it_was(
    town: Town, fault: str
) -> None:
    town.serve.environ[failpoints.VARIABLE] = f"transaction.canary:{fault}"
    town.start("instances = 2", patch="canary = 1")
    before = town.pids
    town.use()
    if fault == "error":
        assert town.refused("v2", "ok").error_code == "patch.rolled_back"
    else:
        supervisor = town.serve.supervisor
        Asked(town.serve.endpoint, "patch.apply", path=town.patch("v2"))
        if fault == "kill":
            wait_for(lambda: town.serve.supervisor not in {0, supervisor}, "the next supervisor")
            town.again()
        else:
            wait_for(lambda: [o["role"] for o in town.target["others"]] == ["standby"], "the canary")
            town.control.call("patch.abort", {"id": "1"}, timeout=100)
    wait_for(lambda: town.pids == before, "the old ones to count again")
    town.wait_alone()
    assert town.pids == before
    assert town.ask() == "v1"
    assert town.target["build"] == 0
    town.unharmed()


def test_who_had_no_turn_in_a_patch_that_is_kept_all_the_same_gets_it_then(town: Town) -> None:
    town.start("instances = 3", patch='max_parallel = 1\nrollback = "manual"')
    before = town.pids
    (town.folder / "uneven").touch()
    town.use()
    assert town.refused("v2", "uneven").error_code == "patch.undecided"
    assert [pid in before for pid in town.pids] == [False, True, True]
    (town.folder / "uneven").unlink()
    town.control.call("patch.commit", {"id": str(town.target["undecided"])}, timeout=100)
    town.wait_alone()
    assert not set(town.pids) & set(before)
    town.unharmed()


def test_restart_rolling_and_a_broken_program_costs_nothing(town: Town) -> None:
    town.start("instances = 2")
    before = town.pids
    town.use()
    town.control.call("restart", {"names": ["app"], "rolling": True}, timeout=100)
    town.wait_alone()
    after = town.pids
    assert not set(before) & set(after)
    (town.root / "service.py").write_text(town.source.replace('MODE = "ok"', 'MODE = "crash"'))
    with pytest.raises(RemoteError, match="did not become ready"):
        town.control.call("restart", {"names": ["app"], "rolling": True}, timeout=100)
    town.wait_alone()
    assert town.pids == after
    town.unharmed()


def test_other_settings_and_max_age_replace_without_a_gap(town: Town) -> None:
    town.start()
    before = town.pids
    town.use()
    town.serve.write(town.settings("env = { COLOUR = 'blue' }"))
    assert town.control.call("config.apply", {"wait": True}, timeout=100)["failed"] == {}
    town.wait_alone()
    after = town.pids
    assert after != before
    # What does not come up keeps nobody from working, and the difference is shown again.
    town.serve.write(
        town.settings("env = { COLOUR = 'red' }\nstart_timeout = '1s'\nready.http = 'http://127.0.0.1:1/'")
    )
    assert "app" in town.control.call("config.apply", {"wait": True}, timeout=100)["failed"]
    town.wait_alone()
    assert town.pids == after
    assert "env" in town.control.call("config.plan")["restarted"]["app"]
    town.serve.write(town.settings("env = { COLOUR = 'blue' }\nmax_age = '1s'"))
    town.control.call("config.apply", {"wait": True}, timeout=100)
    wait_for(lambda: town.pids != after, "the old one to be too old")
    town.unharmed()


def test_a_target_that_refuses_another_root_is_patched_where_it_runs(town: Town) -> None:
    town.start()
    before = town.pids
    other = town.folder / "other"
    other.mkdir()
    (other / "service.py").write_text(town.source)
    refused = town.settings("start_timeout = '1s'\nready.http = 'http://127.0.0.1:1/'")
    town.serve.write(refused.replace('root = "app"', 'root = "other"'))
    assert set(town.control.call("config.apply", {"wait": True}, timeout=100)["failed"]) == {"app"}
    town.wait_alone()
    assert town.pids == before
    town.apply("v2")
    town.wait_alone()
    assert town.ask() == "v2"
    assert 'VERSION = "v2"' in (town.root / "service.py").read_text()
    assert (other / "service.py").read_text() == town.source


def test_a_service_that_is_not_drained_in_time_is_stopped(town: Town) -> None:
    (town.root / "service.py").write_text(town.source.replace('MODE = "ok"', 'MODE = "stubborn"'))
    town.start('drain_timeout = "300ms"')
    (pid,) = town.pids
    with connection_to(town, "v1"):
        town.apply("v2")
        wait_for(lambda: not Path(f"/proc/{pid}").exists(), "the old one to end")
    town.wait_alone()
    assert "not drained within 0.3 s" in town.serve.errors()


def test_one_that_asks_for_more_time_has_it_to_drain_and_to_reload(town: Town) -> None:
    (town.root / "service.py").write_text(town.source.replace('MODE = "ok"', 'MODE = "long"'))
    # Less than it takes (`LONG_SECONDS`), and still plenty to ask for more.
    town.start('start_timeout = "60s"\ndrain_timeout = "20s"\nreload_timeout = "20s"')
    with connection_to(town, "v1") as connection:
        town.apply("v2", "long")
        town.control.call("reload", {"names": ["app"]}, timeout=2 * PATIENCE)
        assert last_answer(connection) == "v1"
    town.wait_alone()
    assert "not drained" not in town.serve.errors()


def test_one_after_the_other_while_the_first_are_not_drained_yet(town: Town) -> None:
    town.start()
    held = []
    for number in range(2, 5):
        held.append(connection_to(town, f"v{number - 1}"))
        town.apply(f"v{number}")
    # Three old ones, each held by its client, beside the new one.
    wait_for(lambda: [o["role"] for o in town.target["others"]] == ["retiring"] * 3, "all to be let go")
    for number, connection in enumerate(held, 1):
        assert last_answer(connection) == f"v{number}"
        connection.close()
    town.wait_alone()
    assert town.ask() == "v4"


def test_a_stop_ends_also_those_that_are_on_their_way_out(town: Town) -> None:
    town.start()
    with connect(town.address) as connection:
        connection.sendall(b"?\n")
        connection.recv(1024)
        old = town.pids
        town.apply("v2")
        assert [other["pid"] for other in town.target["others"]] == old
        town.control.call("stop", {"names": ["app"]}, timeout=100)
        assert not any(alive(pid) for pid in old)
    assert town.target["others"] == []


# --- while supervisors come and go --------------------------------------------------------------------------


def test_who_is_on_the_way_out_is_known_to_the_next_supervisor(town: Town) -> None:
    town.start()
    with connect(town.address) as connection:
        connection.sendall(b"?\n")
        connection.recv(1024)
        town.apply("v2")
        others, pids = town.target["others"], town.pids
        town.serve.kill_supervisor()
        town.again()
        wait_for(lambda: [o["pid"] for o in town.target["others"]] == [o["pid"] for o in others], "it")
        assert town.pids == pids
        assert last_answer(connection) == "v1"
    town.wait_alone()
    assert town.pids == pids
    assert town.ask() == "v2"


@pytest.mark.parametrize("decision", ["commit", "abort"])
def test_a_supervisor_killed_while_both_serve_leaves_the_choice(town: Town, decision: str) -> None:
    town.start(patch='commit = "manual"')
    before = town.pids
    town.use()
    txn = town.apply("v2")["txn"]
    after = town.pids
    town.serve.kill_supervisor()
    town.again()
    wait_for(lambda: town.target.get("uncommitted") == txn, "the patch to wait again")
    assert [other["pid"] for other in town.target["others"]] == before
    town.control.call(f"patch.{decision}", {"id": str(txn)}, timeout=100)
    wait_for(lambda: not town.target["others"], "the other one to go")
    assert town.pids == (after if decision == "commit" else before)
    assert town.ask() == ("v2" if decision == "commit" else "v1")
    town.unharmed()


def test_a_supervisor_killed_while_the_new_one_starts_leaves_the_old_one(town: Town) -> None:
    town.start('start_timeout = "60s"')
    before = town.pids
    town.use()
    Asked(town.serve.endpoint, "patch.apply", path=town.patch("v2", "mute"))
    wait_for(lambda: [o["state"] for o in town.target["others"]] == ["starting"], "the new one to start")
    (new,) = [other["pid"] for other in town.target["others"]]
    town.serve.kill_supervisor()
    town.again()
    wait_for(lambda: not Path(f"/proc/{new}").exists(), "the new one to go")
    town.wait_alone()
    assert town.pids == before
    assert town.ask() == "v1"
    town.unharmed()
