"""Control over TCP: CURVE keys, roles, and everything that is refused."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import anyio
import pytest
import zmq
from conftest import Serve, free_port, wait_for

from asyncsup import control
from asyncsup.client import AsyncControlClient, ClientKeys, ControlClient, Event, EventStream
from asyncsup.errors import (
    KeysError,
    NotAllowedError,
    RemoteError,
    SupervisorUnreachableError,
    TimeoutExpiredError,
    UsageError,
)
from asyncsup.keys import ROLES, KeyStore, Role, generate, load_pair, public_key
from asyncsup.quick import ask

TARGET = '[target.sleeper]\ncommand = ["sleep", "1000"]\n'


@dataclass
class Site:
    """A supervisor that listens over TCP, and people who would like to talk to it."""

    serve: Serve
    port: int

    @property
    def endpoint(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    @property
    def store(self) -> KeyStore:
        return KeyStore(self.serve.folder / ".asyncsup" / "keys")

    def start(self, more: str = TARGET) -> ControlClient:
        if not self.store.secret_file.exists():
            generate(self.store.folder, KeyStore.SUPERVISOR)
        return self.serve.start(f'[supervisor]\nlisten = "{self.endpoint}"\n{more}')

    def keys_of(self, name: str) -> ClientKeys:
        secret = self.serve.folder / "people" / f"{name}.key_secret"
        if not secret.exists():
            generate(secret.parent, name)
        return ClientKeys(*load_pair(secret), self.store.own_pair().public)

    def allow(self, name: str, role: Role) -> ClientKeys:
        keys = self.keys_of(name)
        self.store.allow(name, role, keys.public.decode())
        return keys

    def client(self, name: str) -> ControlClient:
        return ControlClient(self.endpoint, keys=self.keys_of(name))


@pytest.fixture
def site(serve: Serve) -> Iterator[Site]:
    yield Site(serve, free_port(2))


def code_of(call: Callable[[], object]) -> str:
    with pytest.raises(RemoteError) as caught:
        call()
    assert caught.value.remote_exit_status == NotAllowedError.exit_status
    return caught.value.error_code


# --- roles --------------------------------------------------------------------------------------------------


def test_a_role_may_do_what_the_ones_before_it_may(site: Site) -> None:
    local = site.start()
    for role in ROLES:
        site.allow(role, role)
    asked = {"view": "status", "operate": "restart", "patch": "patch.prune"}
    for held in ROLES:
        with site.client(held) as client:
            for needed, method in asked.items():
                params = {"names": ["sleeper"]} if method == "restart" else {}
                if ROLES.index(held) >= ROLES.index(needed):
                    client.call(method, params, timeout=60)
                else:
                    assert code_of(partial(client.call, method, params, timeout=60)) == "not_allowed"
    assert local.call("supervisor.info")["counters"]["control.not_allowed"] == 3
    records = local.call("audit.list", limit=1000)["records"]
    refused = [record["line"] for record in records if '"control.refused"' in record["line"]]
    assert len(refused) == 3, "every refusal is written down"
    assert all('"key":"view"' in line or '"key":"operate"' in line for line in refused)
    local.close()


def test_no_role_may_name_the_program_that_replaces_the_supervisor(site: Site) -> None:
    local = site.start()
    site.allow("anna", "patch")
    pid = local.call("supervisor.info")["pid"]
    with site.client("anna") as client:
        call = partial(client.call, "supervisor.reexec", {"program": "/bin/true"}, timeout=60)
        assert code_of(call) == "not_allowed"
    info = local.call("supervisor.info")
    assert info["pid"] == pid
    assert info["counters"]["control.not_allowed"] == 1
    local.close()


def test_every_method_says_who_may_call_it() -> None:
    """Whoever adds one has to think of it: what changes nothing is for everybody, patches are for few."""
    for name, method in control.METHODS.items():
        if name.startswith(("patch.", "target.")):
            reads = name in {"patch.list", "patch.history", "patch.show", "patch.drift"}
            assert method.role == ("view" if reads else "patch"), name
        else:
            assert method.role in {"view", "operate"}, name


def test_the_page_says_who_may_call_what() -> None:
    page = (Path(__file__).parent.parent / "docs" / "remote.md").read_text()
    for role in ROLES:
        (row,) = re.findall(rf"^\| `{role}` \| .* \| (.*) \|$", page, re.MULTILINE)
        methods = [name for name, method in control.METHODS.items() if method.role == role]
        assert re.findall(r"`([^`]+)`", row) == sorted(methods), role


def test_who_asks_is_known_by_name(site: Site) -> None:
    local = site.start()
    site.allow("anna@laptop", "patch")
    with site.client("anna@laptop") as client:
        assert client.call("supervisor.info")["caller"] == "key anna@laptop from 127.0.0.1"
    local.close()


# --- the door -----------------------------------------------------------------------------------------------


def test_a_key_that_is_not_allowed_is_told_so(site: Site) -> None:
    local = site.start()
    with site.client("stranger") as client, pytest.raises(NotAllowedError, match="does not allow this key"):
        client.call("status", timeout=60)
    assert local.call("supervisor.info")["counters"]["control.unknown_keys"] >= 1
    public = site.keys_of("stranger").public.decode()
    assert f"refused a connection from 127.0.0.1: its key {public} is not allowed" in site.serve.errors()
    local.close()


def test_another_supervisors_key_is_no_key_of_this_one(site: Site) -> None:
    local = site.start()
    keys = site.allow("anna", "view")
    other, _ = zmq.curve_keypair()
    with (
        ControlClient(site.endpoint, keys=keys._replace(supervisor=other)) as client,
        pytest.raises((NotAllowedError, TimeoutExpiredError)),
    ):
        client.call("status", timeout=2)
    with site.client("anna") as client:
        client.call("status", timeout=60)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.linger = 0
    dealer.curve_publickey, dealer.curve_secretkey = zmq.curve_keypair()
    dealer.curve_serverkey = other
    dealer.connect(site.endpoint)  # again and again
    wait_for(lambda: failed_handshakes(local) >= 1, "the handshake to be counted")
    assert f"refused a connection to {site.endpoint}: it has another public key" in site.serve.errors()
    dealer.close()
    context.term()
    local.close()


def failed_handshakes(client: ControlClient) -> int:
    return int(client.call("supervisor.info")["counters"].get("control.failed_handshakes", 0))


def test_connections_without_a_key_are_counted_and_said_once(site: Site) -> None:
    local = site.start()
    # The greeting of ZMTP 3.0 for a connection without security, by somebody who stays to hear the answer.
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
    for port in [site.port] * 300 + [site.port + 1] * 10:
        with (
            contextlib.suppress(ConnectionResetError),
            socket.create_connection(("127.0.0.1", port), timeout=60) as plain,
        ):
            plain.sendall(greeting)
            while plain.recv(100):
                pass
    wait_for(lambda: failed_handshakes(local) == 310, "all handshakes to be counted")
    # Once a minute: how long this takes is the machine's business.
    assert 1 <= site.serve.errors().count("it has no key at all") < 100
    site.allow("anna", "view")
    with site.client("anna") as client:
        client.call("status", timeout=60)
    local.close()


def test_without_a_key_nobody_is_heard(site: Site) -> None:
    local = site.start()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.linger = 0
    dealer.connect(site.endpoint)
    dealer.send(b'{"jsonrpc":"2.0","id":1,"method":"shutdown","params":{}}')
    with socket.create_connection(("127.0.0.1", site.port)) as noise:
        noise.sendall(os.urandom(4096))
        with site.client("anna") as client:
            site.allow("anna", "view")
            assert client.call("status", timeout=60)["targets"][0]["name"] == "sleeper"
    assert not dealer.poll(200)
    dealer.close()
    context.term()
    assert local.call("status")["targets"][0]["name"] == "sleeper"
    local.close()


def test_a_revoked_key_does_nothing_more_on_a_connection_that_is_open(site: Site) -> None:
    local = site.start()
    site.allow("anna", "operate")
    site.allow("bert", "view")
    with site.client("anna") as anna, site.client("bert") as bert:
        anna.call("restart", names=["sleeper"], timeout=60)
        site.store.allow("anna", "view", site.keys_of("anna").public.decode())
        assert code_of(lambda: anna.call("restart", names=["sleeper"], timeout=60)) == "not_allowed"
        anna.call("status", timeout=60)
        heard = anna.subscribe()
        stays = bert.subscribe()
        local.call("restart", names=["sleeper"])
        for stream in (heard, stays):  # neither is still being let in when it is revoked
            wait_for(partial(stream.read, timeout=0.1), "an event")
        site.store.revoke("anna")
        assert code_of(lambda: anna.call("status", timeout=60)) == "not_allowed"
        # Its events end as well, while those of others go on, without a gap.
        local.call("restart", names=["sleeper"])
        mark = local.call("status")["seq"]
        seen = 0

        def heard_of_all() -> bool:
            nonlocal seen
            try:
                event = stays.read(timeout=0.1)
            except SupervisorUnreachableError:
                return False  # Everybody's connection is ended, and others come back.
            assert event is None or event.seq == seen + 1 or not seen
            seen = seen if event is None else event.seq
            return bool(seen >= mark)

        wait_for(heard_of_all, "all events to arrive")

        def turned_away() -> bool:
            try:
                heard.read(timeout=0.1)
            except (NotAllowedError, SupervisorUnreachableError, RemoteError):
                return True
            local.call("restart", names=["sleeper"])
            return False

        wait_for(turned_away, "the events to end")
    local.close()


def test_a_key_that_was_replaced_is_not_the_one_that_is_allowed_now(site: Site) -> None:
    """The name stays, the connection with the old key does not get what the new one may."""
    local = site.start()
    site.allow("anna", "view")
    with site.client("anna") as anna:
        anna.call("status", timeout=60)
        site.store.allow("anna", "patch", site.keys_of("anna2").public.decode())
        for method, params in (("restart", {"names": ["sleeper"]}), ("status", {})):
            assert code_of(partial(anna.call, method, params, timeout=60)) == "not_allowed"
    local.close()


def test_a_call_that_shows_events_goes_on_when_another_key_is_revoked(site: Site) -> None:
    local = site.start(f"{TARGET}[target.later]\ncommand = ['sleep', '1000']\nautostart = false\n")
    site.allow("anna", "operate")
    site.allow("bert", "view")
    heard: list[Event] = []

    def wait(client: ControlClient, events: EventStream) -> None:
        # For something that no restart of the other one makes true for a moment.
        client.call("wait", {"names": ["later"], "for": "ready"}, events=events, on_event=heard.append)

    with site.client("anna") as anna, anna.subscribe() as events:
        thread = threading.Thread(target=wait, args=(anna, events))
        thread.start()

        def has_heard_since(number: int) -> bool:
            local.call("restart", names=["sleeper"])
            return bool(heard) and heard[-1].seq > number

        wait_for(partial(has_heard_since, 0), "an event")
        site.store.revoke("bert")
        local.call("restart", names=["sleeper"])
        revoked = local.call("supervisor.info")["seq"]
        wait_for(partial(has_heard_since, revoked + 10), "more events after that")
        local.call("start", names=["later"])
        thread.join(60)
        assert not thread.is_alive()

        def is_complete() -> bool:
            # The answer, on another connection, may have overtaken the last of them.
            with contextlib.suppress(SupervisorUnreachableError):
                heard.extend(events.catch_up())
            return any((e.data.get("target"), e.data.get("to")) == ("later", "running") for e in heard)

        wait_for(is_complete, "the event that was waited for")
    numbers = [event.seq for event in heard]
    assert numbers == list(range(numbers[0], numbers[-1] + 1))
    local.close()


def test_events_come_over_tcp_as_well(site: Site) -> None:
    local = site.start()
    site.allow("anna", "operate")
    with site.client("anna") as client, client.subscribe() as events:
        client.call("restart", names=["sleeper"], timeout=60)
        for event in events:
            if event.data.get("to") == "running":
                break
    local.close()


def test_the_asynchronous_client_over_tcp(site: Site) -> None:
    local = site.start()
    keys = site.allow("anna", "operate")

    async def talk() -> None:
        async with AsyncControlClient(site.endpoint, keys=keys) as client:
            assert (await client.call("status", timeout=60))["targets"][0]["name"] == "sleeper"
            with await client.subscribe() as events:
                await client.call("restart", names=["sleeper"], timeout=60)
                with anyio.fail_after(60):
                    async for event in events:
                        if event.data.get("to") == "running":
                            break
        async with AsyncControlClient(site.endpoint, keys=site.keys_of("stranger")) as client:
            with pytest.raises(NotAllowedError):
                await client.call("status", timeout=60)

    anyio.run(talk)
    local.close()


def test_a_patch_is_sent_over(site: Site, tmp_path: Path) -> None:
    """A path would be one of the other machine's."""
    root = site.serve.folder / "app"
    root.mkdir()
    (root / "a.txt").write_text("one")
    local = site.start(
        '[patch]\ntrust = "none"\nprobation = "0s"\n'
        '[target.web]\ncommand = ["sleep", "1000"]\nroot = "app"\nbuild = 100\nreload_signal = "CONT"\n'
    )
    new = tmp_path / "new"
    new.mkdir()
    (new / "a.txt").write_text("two")
    package = tmp_path / "patch.zip"
    keys = site.allow("anna", "patch")
    environ = {
        **os.environ,
        "ASYNCSUP_KEY": str(site.serve.folder / "people" / "anna.key_secret"),
        "ASYNCSUP_SUPERVISOR_KEY": keys.supervisor.decode(),
        "ASYNCSUP_ENDPOINT": site.endpoint,
    }

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "asyncsup", *arguments]
        return subprocess.run(
            command, env=environ, cwd=tmp_path, text=True, capture_output=True, check=False, timeout=60
        )

    options = ("-t", "web", "-r", "local", "--name", "two", "--build", "101", "--warm")
    built = run("patch", "build", str(root), str(new), "-o", str(package), *options)
    assert built.returncode == 0, built.stderr
    applied = run("patch", "apply", str(package))
    assert applied.returncode == 0, applied.stderr
    assert (root / "a.txt").read_text() == "two"
    lines = [record["line"] for record in local.call("audit.list", limit=1000)["records"]]
    assert any('"key":"anna"' in line and '"address":"127.0.0.1"' in line for line in lines)
    local.close()


# --- mistakes -----------------------------------------------------------------------------------------------


def test_listening_needs_a_key_and_an_address_that_is_free(site: Site) -> None:
    def serve() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            site.serve.command(),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            stdin=subprocess.DEVNULL,
        )

    site.serve.write(f'[supervisor]\nlisten = "{site.endpoint}"\n')
    ended = serve()
    assert ended.returncode == KeysError.exit_status
    assert "make one with `asyncsup keys generate`" in ended.stderr
    secret = generate(site.store.folder, KeyStore.SUPERVISOR)
    for port in (site.port, site.port + 1):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", port))
            taken.listen()
            ended = serve()
        assert ended.returncode == 1
        assert f"cannot bind tcp://127.0.0.1:{port}" in ended.stderr
    secret.chmod(0o644)
    ended = serve()
    assert "others may read" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    "listen", ["127.0.0.1:7600", "tcp://127.0.0.1", "tcp://eth0:7600", "tcp://*:65535", "udp://*:1"]
)
def test_an_address_that_is_none(listen: str, serve: Serve) -> None:
    serve.write(f'[supervisor]\nlisten = "{listen}"\n')
    ended = subprocess.run(serve.command(), capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 5
    assert "not an address to listen at" in ended.stderr


def test_nobody_there() -> None:
    pair = zmq.curve_keypair()
    with (
        ControlClient(f"tcp://127.0.0.1:{free_port(2)}", keys=ClientKeys(*pair, pair[0])) as client,
        pytest.raises(SupervisorUnreachableError, match="refused"),
    ):
        client.call("status", timeout=60)
    with (
        ControlClient("tcp://nonsense", keys=ClientKeys(*pair, pair[0])) as client,
        pytest.raises(UsageError, match="no endpoint"),
    ):
        client.call("status")


def test_keys_are_asked_for_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for name in ("ASYNCSUP_KEY", "ASYNCSUP_SUPERVISOR_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(KeysError, match="set ASYNCSUP_KEY"):
        ControlClient("tcp://127.0.0.1:7600")
    folder = tmp_path / "asyncsup" / "keys"
    generate(folder, "client")
    with pytest.raises(KeysError, match="set ASYNCSUP_SUPERVISOR_KEY"):
        ControlClient("tcp://127.0.0.1:7600")
    generate(folder, "supervisor")
    ControlClient("tcp://127.0.0.1:7600").close()


# --- local users --------------------------------------------------------------------------------------------


def test_members_of_a_group_may_connect(serve: Serve) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can be somebody else")
    serve.folder.chmod(0o711)
    client = serve.start('[supervisor]\nsocket_mode = "0660"\nsocket_group = "nogroup"\n')
    for name in ("control.sock", "events.sock"):
        status = (serve.folder / ".asyncsup/run" / name).stat()
        assert (stat.S_IMODE(status.st_mode), status.st_gid) == (0o660, 65534), name
    (serve.folder / ".asyncsup").chmod(0o711)

    def caller(group: int) -> str:
        """What somebody else is told."""
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.setgroups([])
                os.setgid(group)
                os.setuid(12345)
                answer = ask(serve.endpoint, "supervisor.info", {}, timeout=60)["caller"]
            except NotAllowedError as error:
                answer = error.error_code
            os.write(writing, answer.encode())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as told:
            os.waitpid(child, 0)
            return told.read()

    assert re.fullmatch(r"uid 12345, pid \d+", caller(65534))
    assert caller(12345) == NotAllowedError.code
    client.close()


# --- the files ----------------------------------------------------------------------------------------------


@pytest.fixture
def keys(tmp_path: Path) -> KeyStore:
    return KeyStore(tmp_path / "keys")


def a_key() -> str:
    return zmq.curve_keypair()[0].decode()


def test_allowed_keys_are_one_line_each(keys: KeyStore) -> None:
    first, second = a_key(), a_key()
    keys.allow("anna", "view", first)
    keys.allow("bert", "patch", second)
    assert keys.file.read_text() == f"anna view {first}\nbert patch {second}\n"
    assert stat.S_IMODE(keys.folder.stat().st_mode) == 0o700
    with pytest.raises(KeysError, match="the key of anna"):
        keys.allow("clara", "view", first)
    keys.allow("anna", "operate", first)
    assert keys.allowed().keys[first].role == "operate"
    keys.revoke("anna")
    assert set(keys.allowed().keys) == {second}
    with pytest.raises(KeysError, match="there is bert"):
        keys.revoke("anna")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("anna view", "expected NAME ROLE PUBLIC_KEY"),
        ("an/na view KEY", "is no name"),
        ("anna root KEY", "is no role"),
        ("anna view short", "40 characters"),
        ("bert view KEY", "has a line already"),
        ("anna view BERT", "the key of bert"),
    ],
)
def test_a_line_that_is_wrong_allows_nobody_and_is_not_lost(keys: KeyStore, line: str, problem: str) -> None:
    key = a_key()
    keys.allow("bert", "view", key)
    text = f"# people\n\nbert view {key}\n{line.replace('KEY', a_key()).replace('BERT', key)}\n"
    keys.file.write_text(text)
    assert list(keys.allowed().keys) == [key]
    (told,) = keys.allowed().problems
    assert problem in told
    assert ":4:" in told
    with pytest.raises(KeysError, match="mend this first"):
        keys.allow("clara", "view", a_key())
    assert keys.file.read_text() == text


def test_a_file_of_keys_that_cannot_be_read_allows_nobody(keys: KeyStore) -> None:
    keys.allow("bert", "view", a_key())
    keys.file.write_bytes(b"\xff\xfe")
    assert keys.allowed().keys == {}
    assert keys.allowed().problems
    keys.file.unlink()
    assert keys.allowed() == ({}, ())


def test_a_key_is_not_replaced_by_accident(tmp_path: Path) -> None:
    secret = generate(tmp_path, "anna")
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    with pytest.raises(KeysError, match="is there already"):
        generate(tmp_path, "anna")
    with pytest.raises(KeysError, match="is no name"):
        generate(tmp_path, "../anna")
    assert public_key(str(secret.with_suffix(".key"))) == load_pair(secret).public.decode()
    with pytest.raises(KeysError, match="no secret key"):
        load_pair(secret.with_suffix(".key"))
    for wrong in ("nothing like it", str(Path(__file__))):
        with pytest.raises(KeysError):
            public_key(wrong)


def test_the_command_line_of_keys(tmp_path: Path) -> None:
    (tmp_path / "asyncsup.toml").write_text('[supervisor]\nlisten = "tcp://127.0.0.1:7600"\n')
    environ = {**os.environ, "XDG_CONFIG_HOME": str(tmp_path / "home")}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "asyncsup", "keys", *arguments],
            cwd=tmp_path, env=environ, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip

    assert "`asyncsup keys generate` makes one" in run("list").stdout
    assert "ASYNCSUP_SUPERVISOR_KEY=" in run("generate").stdout
    made = run("generate", "client").stdout
    command = re.search(r"asyncsup keys allow client --role operate '(.*)'", made)
    assert command is not None
    assert run("allow", "client", command[1], "--role", "operate").stdout == "client may operate\n"
    assert re.search(r"^client  operate  .{40}$", run("list").stdout, re.MULTILINE)
    assert run("revoke", "client").returncode == 0
    refused = run("revoke", "client")
    assert (refused.returncode, "Traceback" in refused.stderr) == (2, False)
    assert run("allow", "x", "no key").returncode == 2
