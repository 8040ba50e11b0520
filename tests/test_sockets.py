"""Managed sockets: bound once by the supervisor, and kept whatever becomes of the programs that have them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Serve, free_port, wait_for

from asyncsup.client import ControlClient

LISTENER = Path(__file__).parent / "programs" / "listener.py"
PATIENCE = 60.0


def connect(address: str | tuple[str, int]) -> socket.socket:
    """A connection that may have to wait until somebody accepts it. Raises when it is refused."""
    if isinstance(address, str):
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        made.connect(address)
    else:
        made = socket.create_connection(address, PATIENCE)
    made.settimeout(PATIENCE)
    return made


def is_refused(address: tuple[str, int]) -> bool:
    """Whether nobody listens there any more: the keeper closes what it holds a moment after it was told."""
    try:
        connect(address).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:
        pass  # it was closed in this very moment
    return False


def ask(address: str | tuple[str, int], question: bytes = b"who are you?") -> dict[str, Any]:
    with connect(address) as connection:
        return asked(connection, question)


def asked(connection: socket.socket, question: bytes = b"who are you?") -> dict[str, Any]:
    connection.sendall(question)
    answer: dict[str, Any] = json.loads(connection.recv(65536))
    return answer


def target(name: str = "web", *, sockets: str = '["web"]', more: str = "") -> str:
    command = json.dumps([sys.executable, "-S", str(LISTENER)])
    return (
        f"[target.{name}]\ncommand = {command}\nsockets = {sockets}\nready.log = '^listening'\n"
        f'restart_delay = "50ms"\n{more}\n'
    )


def tcp(name: str = "web") -> tuple[tuple[str, int], str]:
    """An address, and the table of a socket at it."""
    address = ("127.0.0.1", free_port())
    return address, f'[socket.{name}]\nlisten = "tcp://{address[0]}:{address[1]}"\n'


def instance(client: ControlClient, name: str = "web") -> dict[str, Any]:
    found: dict[str, Any] = client.call("status", {"names": [name]})["targets"][0]["instances"][0]
    return found


def wait_ready(client: ControlClient) -> None:
    client.call("wait", {"names": ["all"], "for": "ready", "timeout": PATIENCE})


class Clients:
    """Clients of one supervisor, one after the other."""

    def __init__(self, serve: Serve) -> None:
        self._serve = serve
        self._open: ControlClient | None = None

    def start(self, text: str | None = None) -> ControlClient:
        return self._take(self._serve.start, text)

    def again(self) -> ControlClient:
        return self._take(self._serve.connect)

    def next(self, started: str) -> ControlClient:
        return self._take(self._serve.connect_to_next, started)

    def _take(self, make: Callable[..., ControlClient], *arguments: Any) -> ControlClient:
        self.close()
        self._open = make(*arguments)
        return self._open

    def close(self) -> None:
        if self._open is not None:
            self._open.close()


@pytest.fixture
def clients(serve: Serve) -> Iterator[Clients]:
    made = Clients(serve)
    yield made
    made.close()


def test_a_program_is_given_its_sockets_by_number_and_name(serve: Serve, clients: Clients) -> None:
    web, web_table = tcp()
    api, api_table = tcp("api")
    command = json.dumps([sys.executable, "-S", str(LISTENER), "--fd", "$(socket.api)", "fd://$(socket.web)"])
    client = clients.start(
        f"{web_table}{api_table}[target.web]\ncommand = {command}\nsockets = ['web', 'api']\n"
        "env.TOLD = '$(socket.web):$(socket.api)'\nready.log = 'listening'\n"
    )
    wait_ready(client)
    answer = ask(api)
    assert answer["name"] == "api"
    assert ask(web)["name"] == "web"
    assert answer["listen_pid"] == answer["pid"] == instance(client)["pid"]
    assert answer["arguments"] == ["--fd", "4", "fd://3"]
    assert answer["told"] == "3:4"
    # Those two, the selector's and the listing's own: nothing of ours has leaked.
    assert answer["descriptors"] == [0, 1, 2, 3, 4, 5, 6]
    assert client.call("supervisor.info")["sockets"]["web"] == {
        "listen": f"tcp://127.0.0.1:{web[1]}",
        "bound": True,
    }


def test_nobody_is_refused_while_the_program_is_away(serve: Serve, clients: Clients) -> None:
    address, table = tcp()
    client = clients.start(table + target())
    wait_ready(client)
    before = ask(address)["pid"]
    client.call("stop", {"names": ["web"]})
    with connect(address) as waiting:
        client.call("start", {"names": ["web"], "wait": True})
        after = asked(waiting)["pid"]
    assert after != before
    with contextlib.suppress(OSError, json.JSONDecodeError):
        ask(address, b"crash")
    assert ask(address)["pid"] not in {before, after}


@pytest.mark.parametrize("alone", [False, True], ids=["keeper", "no keeper"])
def test_a_socket_outlives_the_supervisor_and_its_keeper(serve: Serve, clients: Clients, alone: bool) -> None:
    serve.alone = alone
    address, table = tcp()
    client = clients.start(table + target())
    wait_ready(client)
    pid = ask(address)["pid"]
    serve.kill()
    assert ask(address)["pid"] == pid
    # Only the program has the socket, and is stopped: what comes now waits in it.
    os.kill(pid, signal.SIGSTOP)
    with connect(address) as waiting:
        client = clients.start()
        assert client.call("supervisor.info")["sockets"]["web"]["bound"]
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        assert asked(waiting)["pid"] != pid


def test_a_socket_outlives_the_supervisor_while_no_program_has_it(serve: Serve, clients: Clients) -> None:
    address, table = tcp()
    client = clients.start(table + target(more="autostart = false"))
    with connect(address) as waiting:
        serve.kill_supervisor()
        client = clients.again()
        client.call("start", {"names": ["web"], "wait": True})
        first = asked(waiting)["pid"]
    client.call("stop", {"names": ["web"]})
    with connect(address) as waiting:
        before = client.call("supervisor.info")["started"]
        client.call("supervisor.reexec")
        client = clients.next(before)
        client.call("start", {"names": ["web"], "wait": True})
        assert asked(waiting)["pid"] != first


def test_a_unix_socket_has_its_mode_and_owner_and_its_path_is_removed_at_the_end(
    serve: Serve, clients: Clients
) -> None:
    path = serve.folder / "web.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))  # nobody listens to it: left by a process that has ended
    client = clients.start(
        '[socket.web]\nlisten = "unix://web.sock"\nmode = "0660"\nuser = "nobody"\ngroup = "0"\n' + target()
    )
    wait_ready(client)
    assert ask(str(path))["name"] == "web"
    status = path.stat()
    assert stat.S_IMODE(status.st_mode) == 0o660
    assert (status.st_uid, status.st_gid) == (65534, 0)
    assert serve.stop() == 0
    assert not path.exists()


@pytest.mark.parametrize("scheme", ["udp", "unixgram"])
def test_datagrams(serve: Serve, clients: Clients, scheme: str) -> None:
    if scheme == "udp":
        address: Any = ("127.0.0.1", free_port(kind=socket.SOCK_DGRAM))
        listen = f"udp://127.0.0.1:{address[1]}"
        family = socket.AF_INET
    else:
        address, listen, family = f"{serve.folder}/dgram.sock", "unixgram://dgram.sock", socket.AF_UNIX
    client = clients.start(f'[socket.web]\nlisten = "{listen}"\n' + target(more="autostart = false"))
    with socket.socket(family, socket.SOCK_DGRAM) as peer:
        peer.settimeout(PATIENCE)
        peer.bind(("127.0.0.1", 0) if scheme == "udp" else f"{serve.folder}/peer.sock")
        peer.sendto(b"before anybody was there", address)
        client.call("start", {"names": ["web"], "wait": True})
        assert json.loads(peer.recv(65536))["name"] == "web"


@pytest.mark.parametrize(
    ("host", "reached_at"),
    [("*", ["127.0.0.1", "::1"]), ("[::1]", ["::1"]), ("127.0.0.1", ["127.0.0.1"])],
)
def test_both_families(serve: Serve, clients: Clients, host: str, reached_at: list[str]) -> None:
    port = free_port(host="::1")
    client = clients.start(f'[socket.web]\nlisten = "tcp://{host}:{port}"\n' + target())
    wait_ready(client)
    for each in ("127.0.0.1", "::1"):
        if each in reached_at:
            assert ask((each, port))["name"] == "web"
        else:
            with pytest.raises(ConnectionRefusedError):
                connect((each, port))


def test_an_address_that_somebody_else_has_is_named_and_tried_again(serve: Serve, clients: Clients) -> None:
    address, table = tcp()
    with socket.create_server(address):
        patient = 'restart_max_delay = "100ms"\nstart_limit_burst = 1000000'
        client = clients.start(table + target(more=patient))
        wait_for(lambda: instance(client)["state"] == "backoff", "a first failure")
        assert "Address already in use" in instance(client)["detail"]
        assert "socket web" in serve.errors()
        assert not client.call("supervisor.info")["sockets"]["web"]["bound"]
    wait_for(lambda: instance(client)["ready"], "the address to be free")
    assert ask(address)["name"] == "web"


def test_several_targets_and_instances_share_a_socket(serve: Serve, clients: Clients) -> None:
    address, table = tcp()
    client = clients.start(table + target(more="instances = 2") + target("other"))
    wait_ready(client)
    pids = {i["pid"] for t in client.call("status")["targets"] for i in t["instances"]}
    assert len(pids) == 3
    for name in ("web:0", "web:1"):
        client.call("stop", {"names": [name]})
    assert ask(address)["pid"] in pids


SLOW_TO_LISTEN = """
import os, select, socket, sys, time
given = socket.socket(fileno=3)
while not os.path.exists("go"):
    time.sleep(0.01)
match sys.argv[1]:
    case "accept":
        given.accept()
    case "epoll":
        with select.epoll() as epoll:
            epoll.register(given, select.EPOLLIN)
            epoll.poll()
    case "select":
        select.select([given], [], [])
"""


@pytest.mark.parametrize("how", ["accept", "epoll", "select"])
def test_who_waits_for_connections_is_seen_from_outside(serve: Serve, clients: Clients, how: str) -> None:
    _, table = tcp()
    command = json.dumps([sys.executable, "-S", "-c", SLOW_TO_LISTEN, how])
    timeout = "60s"
    if how == "select":
        timeout = "5s"
        (serve.folder / "go").touch()
    client = clients.start(
        f'{table}[target.web]\ncommand = {command}\nsockets = ["web"]\nready.accepts = true\n'
        f'ready.interval = "20ms"\nstart_timeout = "{timeout}"\nrestart = "never"\n'
    )
    if how != "select":
        wait_for(lambda: instance(client)["pid"], "the process")
        assert not instance(client)["ready"]
        (serve.folder / "go").touch()
        wait_ready(client)
        return
    # It cannot be seen, which is better than to take for ready what is not.
    wait_for(lambda: instance(client)["state"] == "failed", "the time-out")
    assert "nobody waits for connections yet" in instance(client)["exit"]["reason"]


# --- on demand ----------------------------------------------------------------------------------------------


def test_the_first_connection_starts_an_on_demand_target_and_the_next_one_after_its_end(
    serve: Serve, clients: Clients
) -> None:
    address, table = tcp()
    client = clients.start(table + target(more='autostart = "on-demand"'))
    assert instance(client)["state"] == "stopped"
    first = ask(address)["pid"]
    ask(address, b"end")
    wait_for(lambda: instance(client)["state"] == "exited", "its end")
    second = ask(address)["pid"]
    assert second != first
    client.call("stop", {"names": ["web"]})
    with connect(address) as waiting:
        # A manual stop stays stopped.
        client.call("supervisor.info")
        assert instance(client)["state"] == "stopped"
        client.call("start", {"names": ["web"], "wait": True})
        assert asked(waiting)["pid"] not in {first, second}


def test_an_on_demand_target_is_adopted_and_looked_after_by_the_next_supervisor(
    serve: Serve, clients: Clients
) -> None:
    address, table = tcp()
    client = clients.start(table + target(more='autostart = "on-demand"'))
    serve.kill_supervisor()
    client = clients.again()
    first = ask(address)["pid"]
    serve.kill_supervisor()
    client = clients.again()
    assert ask(address, b"end")["pid"] == first
    wait_for(lambda: instance(client)["state"] == "exited", "its end")
    assert ask(address)["pid"] != first


def test_what_rests_is_started_by_a_connection_to_the_address_it_has_by_now(
    serve: Serve, clients: Clients
) -> None:
    old, table = tcp()
    on_demand = target(more='autostart = "on-demand"')
    client = clients.start(table + on_demand)
    new, table = tcp()
    serve.write(table + on_demand)
    client.call("config.apply", {"wait": True})
    assert instance(client)["state"] == "stopped"
    assert ask(new)["pid"] == instance(client)["pid"]
    wait_for(lambda: is_refused(old), "the old address to be free")


def test_a_program_that_takes_no_connection_is_not_started_for_it_for_ever(
    serve: Serve, clients: Clients
) -> None:
    address, table = tcp()
    client = clients.start(
        f"""{table}[target.web]\ncommand = ["sh", "-c", "echo again >> starts"]\nsockets = ["web"]
        autostart = "on-demand"\nrestart = "on-failure"\nrestart_delay = "20ms"\nmin_uptime = "1h"
        start_limit_burst = 2\n"""
    )
    starts = serve.folder / "starts"
    with connect(address):
        wait_for(lambda: instance(client)["state"] == "failed", "it to be given up")
        assert starts.read_text().count("again") == 1 + 2
        assert "gave up after 2 restarts" in instance(client)["detail"]
        assert instance(client)["exit"]["status"] == 0
        client.call("start", {"names": ["web"]})
        wait_for(lambda: starts.read_text().count("again") > 1 + 2, "what an operator starts")


def test_an_on_demand_target_is_not_started_again_while_everything_ends(
    serve: Serve, clients: Clients
) -> None:
    address, table = tcp()
    client = clients.start(
        table + target(more='autostart = "on-demand"') + '[target.slow]\ncommand = ["sh", "-c", '
        '"trap \'\' TERM; echo up; sleep 600"]\nstop_timeout = "1s"\nready.log = "up"\n'
    )
    client.call("wait", {"names": ["slow"], "for": "ready", "timeout": PATIENCE})
    client.call("shutdown")
    with contextlib.suppress(OSError), connect(address):
        assert serve.process is not None
        assert serve.process.wait(PATIENCE) == 0
    assert "a connection" not in serve.errors()


# --- other configurations -----------------------------------------------------------------------------------


def test_an_address_can_be_changed_and_a_socket_removed_while_others_stay(
    serve: Serve, clients: Clients
) -> None:
    web, web_table = tcp()
    api, api_table = tcp("api")
    client = clients.start(web_table + api_table + target() + target("api", sockets='["api"]'))
    wait_ready(client)
    before = {name: ask(address)["pid"] for name, address in (("web", web), ("api", api))}
    moved, moved_table = tcp()
    serve.write(moved_table + api_table + target() + target("api", sockets='["api"]'))
    plan = client.call("config.plan")
    assert plan["restarted"] == {"web": ["socket.web.listen"]}
    assert plan["immediate"] == ["socket.web.listen"]
    client.call("config.apply", {"wait": True})
    assert ask(moved)["pid"] != before["web"]
    assert ask(api)["pid"] == before["api"]
    wait_for(lambda: is_refused(web), "the old address to be free")
    serve.write(api_table + target("api", sockets='["api"]'))
    client.call("config.apply", {"wait": True})
    wait_for(lambda: is_refused(moved), "the other address to be free")
    assert ask(api)["pid"] == before["api"]


def test_the_backlog_and_the_mode_are_changed_in_place(serve: Serve, clients: Clients) -> None:
    client = clients.start('[socket.web]\nlisten = "unix://web.sock"\n' + target())
    wait_ready(client)
    before = instance(client)["pid"]
    serve.write('[socket.web]\nlisten = "unix://web.sock"\nmode = "0666"\nbacklog = 7\n' + target())
    assert client.call("config.apply", {"wait": True})["restarted"] == {}
    assert stat.S_IMODE((serve.folder / "web.sock").stat().st_mode) == 0o666
    assert ask(f"{serve.folder}/web.sock")["pid"] == before


UNIX = '[socket.web]\nlisten = "unix://web.sock"\n'


def test_a_unix_socket_whose_path_was_removed_is_bound_anew(serve: Serve, clients: Clients) -> None:
    others = f"{target('gone', sockets='[]')}{target('kept', sockets='[]')}"
    client = clients.start(f"{UNIX}{target()}{others}")
    wait_ready(client)
    supervisor, path = serve.supervisor, serve.folder / "web.sock"
    before = {name: instance(client, name)["pid"] for name in ("web", "kept")}
    path.unlink()
    assert client.call("config.plan")["restarted"] == {"web": ["socket.web.listen"]}
    new = target("new", sockets="[]")
    serve.write(f'{UNIX}mode = "0666"\n{target()}{target("kept", sockets="[]")}{new}')
    os.kill(supervisor, signal.SIGHUP)
    wait_for(path.exists, "the path")
    client.call("supervisor.info")  # in the turn in which it was bound it is listened to as well
    assert ask(str(path))["pid"] != before["web"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o666

    def names() -> set[str]:
        return {t["name"] for t in client.call("status")["targets"]}

    wait_for(lambda: names() == {"web", "kept", "new"}, "the other changes")
    wait_ready(client)
    assert serve.supervisor == supervisor
    assert instance(client, "kept")["pid"] == before["kept"]
    plan = client.call("config.plan")
    assert (plan["restarted"], plan["immediate"]) == ({}, [])


def test_a_socket_that_cannot_be_changed_is_told_and_tried_again(serve: Serve, clients: Clients) -> None:
    client = clients.start(UNIX + target() + target("other", sockets="[]"))
    wait_ready(client)
    path, before = serve.folder / "web.sock", instance(client)["pid"]
    path.unlink()
    path.touch()
    serve.write(f'{UNIX}mode = "0666"\n' + target() + target("other", sockets="[]", more="umask = '077'"))
    result = client.call("config.apply", {"wait": True})
    assert result["restarted"] == {"other": ["umask"]}
    assert set(result["failed"]) == {"socket.web"}
    assert result["failed"]["socket.web"]["code"] == "socket.failed"
    assert "is something else by now" in result["failed"]["socket.web"]["message"]
    assert instance(client)["pid"] == before
    plan = client.call("config.plan")
    assert (plan["restarted"], plan["immediate"]) == ({}, ["socket.web.mode"]), "it is yet to be done"
    command = [sys.executable, "-m", "asyncsup", "-c", str(serve.config), "config", "apply"]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    assert shown.returncode == 1
    assert "  failed: socket web (unix://" in shown.stdout
    path.unlink()
    assert client.call("config.apply", {"wait": True})["failed"] == {}
    assert stat.S_IMODE(path.stat().st_mode) == 0o666
    assert ask(str(path))["pid"] != before


def test_an_address_that_cannot_be_had_is_told_by_apply_and_had_later(serve: Serve, clients: Clients) -> None:
    _, table = tcp()
    client = clients.start(table + target(more='autostart = "on-demand"'))
    taken, taken_table = tcp()
    with socket.create_server(taken):
        serve.write(taken_table + target(more='autostart = "on-demand"'))
        failed = client.call("config.apply", {"wait": True})["failed"]
        assert failed["socket.web"]["code"] == "socket.failed"
    assert client.call("config.apply", {"wait": True})["failed"] == {}
    assert client.call("supervisor.info")["sockets"]["web"]["bound"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (target(), 'there is no socket "web"'),
        ("[socket.web]\n" + target(), "socket.web.listen"),
        ('[socket.web]\nlisten = "tcp://localhost:80"\n' + target(), "not an address to bind a socket to"),
        ('[socket.web]\nlisten = "tcp://127.0.0.1:0"\n' + target(), "from 1 to 65535"),
        ('[socket.web]\nlisten = "tcp://999.1.1.1:80"\n' + target(), "999.1.1.1 is not an IP address"),
        ('[socket.web]\nlisten = "unix://' + "x" * 120 + '"\n' + target(), "at most 107 bytes"),
        ('[socket.web]\nlisten = "tcp://127.0.0.1:80"\nmode = "0660"\n' + target(), "only for unix://"),
        ('[socket.web]\nlisten = "udp://127.0.0.1:80"\nbacklog = 7\n' + target(), "nothing connects to it"),
        (
            '[socket.a]\nlisten = "tcp://127.0.0.1:80"\n[socket.b]\nlisten = "tcp://127.0.0.1:80"\n'
            + target(sockets='["a"]'),
            "a and b have the same address",
        ),
        (
            '[socket.web]\nlisten = "tcp://127.0.0.1:80"\n[target.web]\ncommand = "x $(socket.wep)"\n'
            "sockets = ['web']\n",
            "$(socket.wep) is not among the sockets",
        ),
        ('[target.web]\ncommand = "true"\nautostart = "on-demand"\n', "it has none"),
        ('[target.web]\ncommand = "true"\nready.accepts = true\n', "only for a target with sockets"),
        (
            '[socket.web]\nlisten = "tcp://127.0.0.1:80"\n'
            '[target.web]\ncommand = "true"\nsockets = ["web"]\nready.fd = 3\n',
            "is the number of a socket",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(short_tmp: Path, text: str, says: str) -> None:
    (short_tmp / "asyncsup.toml").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "asyncsup", "-c", str(short_tmp / "asyncsup.toml"), "config", "check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert says in done.stdout + done.stderr
