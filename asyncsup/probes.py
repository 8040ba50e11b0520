"""Questions that are asked of a program from outside: does it answer over HTTP, TCP, or to a command?

A probe is a coroutine function that returns why it failed, or None. `Probes` asks again and again on behalf
of one process, first until it is ready and then whether it is still alive; it decides nothing: what follows
is the instance's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import anyio
import anyio.to_thread

from asyncsup.config.settings import LivenessConfig, ProbeConfig
from asyncsup.logreader import Cursor
from asyncsup.logs import LONGEST_LINE, OutputStream

if TYPE_CHECKING:
    from http.client import HTTPConnection

Probe = Callable[[], Awaitable[str | None]]
"""Why the program is not well, in a few words; None when it is."""

RunCommand = Callable[[tuple[str, ...], float], Awaitable[str | None]]
"""Runs a command as the instance, with a deadline in seconds; why it failed, or None."""

USER_AGENT: Final = "asyncsup"
LONGEST_TAIL: Final = 64 << 10
"""Of an unfinished line this much is kept to look for the pattern in."""
LONGEST_FORMATTED: Final = 8 * LONGEST_LINE
"""No line of the formats is longer, whatever is escaped in it."""


def probe_of(config: ProbeConfig, run_command: RunCommand, expand: Callable[[str], str]) -> Probe | None:
    """The question a table of the configuration asks; None when it asks none from outside.

    Args:
        expand: puts in what differs from instance to instance.
    """
    if config.http is not None:
        return partial(ask_http, expand(config.http), config.timeout)
    if config.tcp is not None:
        return partial(ask_tcp, expand(config.tcp), config.timeout)
    if config.exec is not None:
        return partial(run_command, config.exec, config.timeout)
    return None


async def ask_http(url: str, timeout: float) -> str | None:
    """GET a URL; an answer from 200 to 399 is a good one, and redirects are not followed."""
    import http.client  # noqa: PLC0415 - with a parser of mail; most configurations have no such probe

    parts = urlsplit(url)
    host = parts.hostname
    assert host is not None, "the configuration was checked"
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    path = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
    # A thread of its own: among the few of all others it would wait for those that get no answer.
    own = anyio.CapacityLimiter(1)
    made: list[HTTPConnection] = []

    def get() -> int:
        # In the thread as well: for https it reads the certificates of all authorities.
        made.append(kind(host, parts.port, timeout=timeout))
        return _get(made[0], path)

    try:
        with anyio.fail_after(timeout):
            status = await anyio.to_thread.run_sync(get, abandon_on_cancel=True, limiter=own)
    except TimeoutError:
        return f"{url}: no answer within {timeout:g} s"
    except (OSError, http.client.HTTPException) as error:
        return f"{url}: {_words(error)}"
    except RuntimeError as error:  # no more threads
        return f"{url}: not asked: {error}"
    finally:
        # However slowly the answer comes, the thread ends here.
        for connection in made:
            with contextlib.suppress(OSError, AttributeError):
                connection.sock.shutdown(socket.SHUT_RDWR)
    return None if 200 <= status < 400 else f"{url}: status {status}"


def _get(connection: HTTPConnection, path: str) -> int:
    try:
        connection.request("GET", path, headers={"User-Agent": USER_AGENT, "Connection": "close"})
        return connection.getresponse().status
    finally:
        connection.close()


async def ask_tcp(address: str, timeout: float) -> str | None:
    """Connect to ``HOST:PORT``; that it accepts is enough."""
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(timeout):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except TimeoutError:
        return f"{address}: no connection within {timeout:g} s"
    except OSError as error:
        return f"{address}: {_words(error)}"
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return None


def _words(error: Exception) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, socket.gaierror):
        return "the host's name is not known"
    return str(error) or type(error).__name__


async def until_ready(probe: Probe, interval: float, on_failure: Callable[[str], None]) -> None:
    """Return as soon as the answer is a good one."""
    while (failure := await probe()) is not None:
        on_failure(failure)
        await asyncio.sleep(interval)


async def until_dead(probe: Probe, config: LivenessConfig) -> str:
    """Return why, once ``failure_threshold`` answers in a row were bad ones."""
    failures = 0
    while True:
        await asyncio.sleep(config.interval)
        failure = await probe()
        failures = 0 if failure is None else failures + 1
        if failure is not None and failures >= config.failure_threshold:
            times = f"{failures} times in a row" if failures > 1 else "once"
            return f"liveness failed {times}: {failure}"


async def until_line(stream: OutputStream, begin: Cursor, pattern: str) -> None:
    """Return once a line of the output, from ``begin`` on, has the pattern in it, as the program wrote it."""
    wanted, cursor, tail = re.compile(pattern), begin, ""
    while True:
        growth = stream.growth()
        try:
            piece = stream.reader.read(cursor)
            cursor = piece.cursor
            if not piece.text:
                await growth
                continue
        finally:
            growth.cancel()
        *lines, tail = (tail + piece.text).split("\n")
        if any(wanted.search(stream.as_written(line)) for line in lines):
            return
        if stream.format != "raw":
            tail = tail[-LONGEST_FORMATTED:]  # nothing yet that the program wrote
            continue
        if wanted.search(tail):
            return
        tail = tail[-LONGEST_TAIL:]
