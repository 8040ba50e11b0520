"""Sockets by LISTEN_FDS, in real processes that inherit real descriptors."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

# Puts the descriptors at 3, 4, ... and itself into LISTEN_PID, as whoever passes sockets does.
PASS_ON = """
import os, sys
descriptors, names, pid, code = sys.argv[1:5]
numbers = [int(number) for number in descriptors.split(",") if number]
for place, number in enumerate(numbers, 3):
    os.dup2(number, place)
os.environ["LISTEN_PID"] = pid or str(os.getpid())
os.environ["LISTEN_FDS"] = str(len(numbers))
if names != "-":
    os.environ["LISTEN_FDNAMES"] = names
os.execv(sys.executable, [sys.executable, "-W", "error", "-c", code])
"""

DESCRIBE = """
import json, os
from target_sdk import ListenError, sockets
def attempt(call):
    try:
        return call()
    except ListenError as error:
        return f"ListenError: {error}"
"""


def run(given: Sequence[int], names: str, code: str, *, pid: str = "") -> Any:
    """Run code that prints one JSON value, with these descriptors passed on."""
    done = subprocess.run(
        [sys.executable, "-c", PASS_ON, ",".join(map(str, given)), names, pid, DESCRIBE + code],
        pass_fds=given,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=REPOSITORY,
        timeout=30,
    )
    return json.loads(done.stdout)


@pytest.fixture
def high(tmp_path: Path) -> Iterator[list[int]]:
    """Descriptors above those that are going to be used: TCP, UDP, UNIX, IPv6, and a pipe's end."""
    reader, writer = os.pipe()
    opened = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)]
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(str(tmp_path / "s"))
    unix.listen()
    opened += [unix, socket.create_server(("::1", 0), family=socket.AF_INET6)]
    numbers = [os.dup2(one.fileno(), 50 + index) for index, one in enumerate(opened)] + [os.dup2(reader, 60)]
    yield numbers
    for number in (*numbers, reader, writer):
        os.close(number)
    for one in opened:
        one.close()


def test_names_families_and_types_are_those_of_the_sockets(high: list[int]) -> None:
    found = run(
        high[:4],
        "web:metrics:admin:web6",
        "def told(s): return [s.fileno(), s.family.name, s.type.name, s.get_inheritable(), s.gettimeout()]\n"
        "print(json.dumps({name: told(s) for name, s in sockets().items()}))",
    )
    assert found == {
        "web": [3, "AF_INET", "SOCK_STREAM", False, None],
        "metrics": [4, "AF_INET", "SOCK_DGRAM", False, None],
        "admin": [5, "AF_UNIX", "SOCK_STREAM", False, None],
        "web6": [6, "AF_INET6", "SOCK_STREAM", False, None],
    }


def test_a_connection_is_accepted(high: list[int]) -> None:
    with socket.socket(fileno=os.dup(high[0])) as listening:
        client = socket.create_connection(listening.getsockname())
    with client:
        code = "c, _ = sockets()['web'].accept(); c.sendall(b'hello'); c.close(); print(1)"
        assert run(high[:1], "web", code) == 1
        assert client.recv(100) == b"hello"


def test_one_that_its_sender_made_non_blocking_says_so(high: list[int]) -> None:
    os.set_blocking(high[0], False)
    assert run(high[:1], "web", "print(sockets()['web'].gettimeout())") == 0.0


def test_a_name_may_occur_more_than_once(high: list[int]) -> None:
    code = (
        "print(json.dumps([[s.fileno() for s in sockets().all('web')], attempt(lambda: sockets()['web']),"
        " list(sockets())]))"
    )
    assert run(high[:3], "web:other:web", code) == [
        [3, 5],
        "ListenError: there are 2 sockets named 'web': take them by .all('web')",
        ["web", "other"],
    ]


def test_a_missing_name_is_told_with_those_there_are(high: list[int]) -> None:
    code = "print(json.dumps([attempt(lambda: sockets()['wed']), 'wed' in sockets(), sockets().get('wed')]))"
    assert run(high[:2], "web:admin", code) == [
        "ListenError: no socket named 'wed' was passed to this process; there are: admin, web",
        False,
        None,
    ]


def test_without_names_they_are_called_unknown_as_with_systemd(high: list[int]) -> None:
    assert run(high[:2], "-", "print(json.dumps([s.fileno() for s in sockets().all('unknown')]))") == [3, 4]


def test_those_of_another_process_are_not_ours(high: list[int]) -> None:
    code = "print(json.dumps([len(sockets()), attempt(lambda: sockets()['web'])]))"
    count, message = run(high[:1], "web", code, pid="1")
    assert count == 0
    assert "were for process 1 (LISTEN_PID)" in message


def test_what_is_no_socket_is_left_alone_and_not_inherited(high: list[int]) -> None:
    code = "print(json.dumps([list(sockets()), os.get_inheritable(3)]))"
    assert run([high[4], high[0]], "pipe:web", code) == [["web"], False]


def test_the_variables_go_on_request_and_the_sockets_stay(high: list[int]) -> None:
    code = (
        "def left(): return [n for n in ('LISTEN_PID', 'LISTEN_FDS', 'LISTEN_FDNAMES') if n in os.environ]\n"
        "first = sockets(); before = left(); second = sockets(unset_environment=True)\n"
        "print(json.dumps([len(before), left(), first is second is sockets(), sockets()['web'].fileno()]))"
    )
    assert run(high[:1], "web", code) == [3, [], True, 3]


@pytest.mark.parametrize(
    ("names", "more", "message"),
    [
        ("web:two", "", "LISTEN_FDS is 1, but LISTEN_FDNAMES has 2 names: 'web:two'"),
        ("web", "os.environ['LISTEN_FDS'] = 'one'", "LISTEN_FDS must be a number, got 'one'"),
        ("web", "os.environ['LISTEN_PID'] = '-1'", "LISTEN_PID must be a number, got '-1'"),
        ("web", "os.close(3)", "LISTEN_FDS promises descriptor 3, but it is not open"),
    ],
)
def test_variables_that_contradict_themselves_are_an_error(
    high: list[int], names: str, more: str, message: str
) -> None:
    assert run(high[:1], names, f"{more}\nprint(json.dumps(attempt(sockets)))") == f"ListenError: {message}"


def test_without_anybody_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        monkeypatch.delenv(name, raising=False)
    code = DESCRIBE + "print(json.dumps([dict(sockets()), attempt(lambda: sockets()['web'])]))"
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, check=True, cwd=REPOSITORY, timeout=30
    )
    none, message = json.loads(done.stdout)
    assert none == {}
    assert message.endswith("passed any (LISTEN_FDS and LISTEN_PID are not set)")
