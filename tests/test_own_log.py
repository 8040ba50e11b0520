"""The supervisor's own log: whatever programs, files and clients say, each message is one line of ours."""

from __future__ import annotations

import io
import logging
import re
import signal
import sys

import pytest
from conftest import Serve, wait_for
from test_supervisor import QUICK, reached

from asyncsup.own_log import FORMAT, OneLineFormatter

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (INFO|WARNING|ERROR) .*")
FORGED = "oops\n2026-11-28 10:00:00,000 INFO    db:0: running -> stopped\x1b]0;owned\x07\r\x85\u2028\u202e"


@pytest.fixture
def shown() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def logger(shown: io.StringIO) -> logging.Logger:
    logger = logging.Logger("own", logging.INFO)
    handler = logging.StreamHandler(shown)
    handler.setFormatter(OneLineFormatter(FORMAT))
    logger.addHandler(handler)
    return logger


def test_a_message_is_one_line_whatever_is_in_it(logger: logging.Logger, shown: io.StringIO) -> None:
    logger.warning("web:0: %s", FORGED + "\udcff")
    line, rest = shown.getvalue().split("\n")
    assert rest == ""
    assert line.isprintable()
    assert LINE.fullmatch(line)
    assert r"oops\n2026-11-28" in line
    assert line.endswith(r"\x1b]0;owned\x07\r\x85\u2028\u202e\udcff")


def test_no_line_of_a_traceback_looks_like_a_message(logger: logging.Logger, shown: io.StringIO) -> None:
    def fail() -> None:
        raise ValueError(FORGED)

    try:
        fail()
    except ValueError:
        logger.exception("it failed: %s", FORGED)
    first, *lines = shown.getvalue().removesuffix("\n").split("\n")
    assert LINE.fullmatch(first)
    assert lines[0] == "  Traceback (most recent call last):"
    assert all(line.isprintable() and line.startswith("  ") for line in lines)
    assert any(line.startswith("  2026-11-28 10:00:00,000 INFO") for line in lines)


def test_what_is_not_odd_is_left_as_it_is(logger: logging.Logger, shown: io.StringIO) -> None:
    logger.info(r"C:\new über 東京 'q' ")
    assert shown.getvalue().endswith("INFO    C:\\new über 東京 'q' \n")


def test_nobody_writes_a_line_of_their_own_into_it(serve: Serve) -> None:
    (serve.folder / "speak.py").write_text(
        "import asyncio\nfrom target_sdk import Target\n"
        f"FORGED = {FORGED!r}\n"
        "async def main():\n    async with Target() as target:\n        target.ready()\n"
        "        target.status(FORGED)\n        target.failed(FORGED)\n"
        "        await asyncio.sleep(3600)\n"
        "asyncio.run(main())\n"
    )
    client = serve.start(
        f'{QUICK}[target.web]\ncommand = ["{sys.executable}", "speak.py"]\n'
        'protocol = "sdk"\nhooks.post_start = ["sh", "-c", "exit 3"]\n'
    )
    reached(client, "web", "running")
    wait_for(lambda: "web:0 says that it has failed: oops" in serve.errors(), "its failure")
    with serve.config.open("a") as config:
        config.write('["\\u001b[31m\\n"]\nx = 1\n["\\r"]\n')
    assert serve.process is not None
    serve.process.send_signal(signal.SIGHUP)
    wait_for(lambda: "SIGHUP: nothing was changed" in serve.errors(), "the refusal")
    client.call("stop", names=["web"])
    client.close()
    serve.stop()
    text = serve.stderr.read_bytes().decode()
    assert text.endswith("\n")
    for line in text.removesuffix("\n").split("\n"):
        assert line.isprintable(), line
        assert LINE.fullmatch(line), line
    assert "INFO    db:0" not in re.sub(r"(?m)^.*says that it has failed.*$", "", text)
