"""When an instance counts as ready, and when as dead: every question that can be asked, of real programs."""

from __future__ import annotations

import asyncio
import http.client
import http.server
import os
import signal
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Serve, free_port, wait_for
from test_patching import FILES, Field
from test_supervisor import QUICK, SLEEPER, fails, instance, reached, target

from asyncsup.client import ControlClient
from asyncsup.patch.manifest import Kind
from asyncsup.probes import ask_http

SWITCHED = """
import http.server, os, sys, time
# Serves on a port of its own once the file "go" is there; answers 503 while the file "sick" is.
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503 if os.path.exists("sick") else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()
    def log_message(self, *args):
        pass
while not os.path.exists("go"):
    time.sleep(0.01)
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
print("serving", flush=True)
server.serve_forever()
"""


@pytest.fixture
def switched(serve: Serve) -> Iterator[tuple[Serve, str, int]]:
    """A server that becomes ready when told to: its command, its port."""
    (serve.folder / "switched.py").write_text(SWITCHED)
    port = free_port()
    yield serve, f'command = ["{sys.executable}", "-S", "switched.py", "{port}"]\n', port


def become_ready(serve: Serve, client: ControlClient, name: str = "web") -> Any:
    """It is not ready before the file is there, and is so soon after."""
    wait_for(lambda: instance(client, name)["pid"], "the process")
    assert instance(client, name)["state"] == "starting"
    (serve.folder / "go").touch()
    return reached(client, name, "running")


AGAIN_AND_AGAIN = f'{QUICK}restart_max_delay = "20ms"\nstart_limit_burst = 1000000\n'


def wait_for_reason(client: ControlClient, beginning: str) -> None:
    """Until one of its tries has come as far as it should within its short time, and failed of this."""
    wait_for(
        lambda: ((instance(client, "web")["exit"] or {}).get("reason") or "").startswith(beginning), beginning
    )


@pytest.mark.parametrize(
    "ready",
    [
        'http = "http://127.0.0.1:PORT/health"',
        'tcp = "127.0.0.1:PORT"',
        'exec = ["sh", "-c", "test -e go"]',
        'log = "^serv[a-z]+$"',
    ],
)
def test_what_is_asked_from_outside_decides(switched: tuple[Serve, str, int], ready: str) -> None:
    serve, command, port = switched
    ready = ready.replace("PORT", str(port))
    client = serve.start(f"{QUICK}[target.web]\n{command}[target.web.ready]\n{ready}\ninterval = '20ms'\n")
    found = become_ready(serve, client)
    assert found["detail"] in {"its readiness probe succeeded", "its output says so"}
    client.close()


class Well(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.mark.anyio
async def test_however_many_get_no_answer_over_http_the_others_are_asked() -> None:
    with (
        socket.create_server(("127.0.0.1", 0), backlog=200) as silent,
        socketserver.TCPServer(("127.0.0.1", 0), Well) as server,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        hung = [asyncio.create_task(ask_http(url, 120.0)) for _ in range(60)]
        silent.setblocking(False)
        async with asyncio.timeout(60):
            connections = [(await asyncio.get_running_loop().sock_accept(silent))[0] for _ in hung]
            assert await ask_http(f"http://127.0.0.1:{server.server_address[1]}/", 60.0) is None
        for task in hung:
            task.cancel()
        # Each of them ends the thread that waits, and with it the connection.
        async with asyncio.timeout(60):
            for connection in connections:
                with connection:
                    connection.setblocking(False)
                    while await asyncio.get_running_loop().sock_recv(connection, 1000):
                        pass
        server.shutdown()


@pytest.mark.parametrize("format_", ["raw", "prefix", "timestamp", "json"])
def test_a_line_is_matched_as_the_program_wrote_it(serve: Serve, format_: str) -> None:
    (serve.folder / "say.sh").write_text(
        "echo 'not listening on \"here\"'\nuntil [ -e go ]; do sleep 0.02; done\n"
        "echo 'listening on \"here\"'\nexec sleep 3600\n"
    )
    client = serve.start(
        f'{QUICK}log.format = "{format_}"\n[target.web]\ncommand = "sh say.sh"\n'
        "ready.log = '^listening on \"h[a-z]+\"$'\n"
    )
    assert become_ready(serve, client)["detail"] == "its output says so"
    client.close()


def test_a_status_of_500_is_not_ready_and_the_last_answer_is_told(switched: tuple[Serve, str, int]) -> None:
    serve, command, port = switched
    (serve.folder / "go").touch()
    (serve.folder / "sick").touch()
    client = serve.start(
        f'{AGAIN_AND_AGAIN}start_timeout = "2s"\n[target.web]\n{command}'
        f'[target.web.ready]\nhttp = "http://127.0.0.1:{port}/"\ninterval = "20ms"\n'
    )
    wait_for_reason(client, "not ready within 2 s (http://127.0.0.1:")
    client.close()


@pytest.mark.anyio
async def test_certificates_are_not_read_on_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """That takes as long as everything else it does in ten turns."""
    made_in: list[threading.Thread] = []

    make = http.client.HTTPSConnection.__init__

    def made(*args: Any, **options: Any) -> None:
        made_in.append(threading.current_thread())
        make(*args, **options)

    monkeypatch.setattr(http.client.HTTPSConnection, "__init__", made)
    assert "connection refused" in str(await ask_http(f"https://127.0.0.1:{free_port()}/", 60.0))
    assert threading.current_thread() not in made_in
    assert made_in


def test_a_newline_on_the_descriptor_means_ready(serve: Serve) -> None:
    script = serve.folder / "s6.sh"
    script.write_text("until [ -e go ]; do sleep 0.02; done\necho >&7\nexec 7>&-\nexec sleep 3600\n")
    client = serve.start(f'{QUICK}[target.web]\ncommand = "sh s6.sh"\nready.fd = 7\n')
    assert become_ready(serve, client)["detail"] == "wrote to descriptor 7"
    client.close()


def test_a_descriptor_that_is_closed_without_a_newline_is_told_at_the_time_out(serve: Serve) -> None:
    client = serve.start(
        f'{AGAIN_AND_AGAIN}start_timeout = "500ms"\n'
        '[target.web]\ncommand = ["sh", "-c", "exec 3>&-; exec sleep 3600"]\nready.fd = 3\n'
    )
    wait_for_reason(client, "not ready within 0.5 s (descriptor 3 was closed without a newline)")
    client.close()


def test_ready_notify_waits_for_the_word_whatever_the_protocol(serve: Serve) -> None:
    (serve.folder / "say.py").write_text(
        "import os, socket, time\n"
        "while not os.path.exists('go'): time.sleep(0.01)\n"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        "s.sendto(b'READY=1', os.environ['NOTIFY_SOCKET'])\ntime.sleep(3600)\n"
    )
    client = serve.start(
        f'{QUICK}[target.web]\ncommand = ["{sys.executable}", "-S", "say.py"]\nready.notify = true\n'
    )
    assert become_ready(serve, client)["detail"] == "said ready"
    client.close()


def test_a_start_can_be_stopped_while_its_probe_goes_on(serve: Serve) -> None:
    client = serve.start(f'{QUICK}[target.web]\n{SLEEPER}ready.exec = "sleep 3600"\nready.timeout = "1h"\n')
    wait_for(lambda: instance(client, "web")["pid"], "the process")
    client.call("stop", names=["web"])
    assert instance(client, "web")["state"] == "stopped"
    client.close()  # the probe's own process is gone too, or the end of the tests would find it


# --- liveness -----------------------------------------------------------------------------------------------


def test_a_program_that_does_not_answer_any_more_is_replaced(switched: tuple[Serve, str, int]) -> None:
    serve, command, port = switched
    (serve.folder / "go").touch()
    url = f'http = "http://127.0.0.1:{port}/"'
    client = serve.start(
        f"{QUICK}[target.web]\n{command}[target.web.ready]\n{url}\ninterval = '20ms'\n"
        f"[target.web.liveness]\n{url}\ninterval = '50ms'\ntimeout = '1m'\nfailure_threshold = 2\n"
    )
    before = reached(client, "web", "running")["pid"]
    (serve.folder / "sick").touch()
    found = wait_for(lambda: (i := instance(client, "web"))["pid"] != before and i["exit"] and i, "its end")
    assert found["exit"]["reason"].startswith("liveness failed 2 times in a row: http://127.0.0.1:")
    assert found["exit"]["reason"].endswith("status 503")
    (serve.folder / "sick").unlink()
    assert reached(client, "web", "running")["restarts"] >= 1
    client.close()


def test_a_liveness_that_fails_once_and_recovers_harms_nobody(serve: Serve) -> None:
    flaky = "test ! -e sick || { rm sick; exit 1; }; echo >> well"
    client = serve.start(
        f"{QUICK}[target.web]\n{SLEEPER}[target.web.liveness]\nexec = ['sh', '-c', '{flaky}']\n"
        "interval = '20ms'\ntimeout = '1m'\nfailure_threshold = 2\n"
    )
    pid = reached(client, "web", "running")["pid"]
    answers = serve.folder / "well"
    answers.touch()
    for _ in range(3):
        (serve.folder / "sick").touch()
        wait_for(lambda: not (serve.folder / "sick").exists(), "the failure")
        before = answers.stat().st_size
        wait_for(lambda: answers.stat().st_size > before, "a good answer")  # noqa: B023
    assert instance(client, "web")["pid"] == pid
    client.close()


WATCHED = """
import os, signal, socket, sys, time
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
say = lambda text: s.sendto(text.encode(), os.environ["NOTIFY_SOCKET"])
say("READY=1\\nSTATUS=watchdog " + os.environ["WATCHDOG_USEC"])
while not os.path.exists("hang"):
    say("WATCHDOG=1")
    time.sleep(0.05)
if os.path.exists("trigger"):
    say("WATCHDOG=trigger")
time.sleep(3600)
"""


@pytest.mark.parametrize("trigger", [False, True])
def test_a_program_that_stops_saying_that_it_is_alive_is_replaced(serve: Serve, trigger: bool) -> None:
    (serve.folder / "watched.py").write_text(WATCHED)
    timeout = "1h" if trigger else "5s"
    client = serve.start(
        f'{QUICK}restart = "never"\n[target.web]\nprotocol = "notify"\nwatchdog_timeout = "{timeout}"\n'
        f'command = ["{sys.executable}", "-S", "watched.py"]\nlimits.core = 0\n'
    )
    found = reached(client, "web", "running")
    assert found["status_text"] == f"watchdog {3600 if trigger else 5}000000"
    if not trigger:
        time.sleep(5.5)  # longer than the time-out: its words keep it alive
    assert instance(client, "web")["pid"] == found["pid"]
    if trigger:
        (serve.folder / "trigger").touch()
    (serve.folder / "hang").touch()
    found = reached(client, "web", "failed")
    why = "watchdog: triggered" if trigger else "watchdog: no sign of life"
    assert found["exit"]["reason"].startswith(why)
    client.close()


def test_an_sdk_program_that_hangs_altogether_is_replaced(serve: Serve) -> None:
    (serve.folder / "app.py").write_text(
        "import asyncio\nfrom target_sdk import Target\ntarget = Target()\n"
        "async def main():\n    async with target:\n        target.ready()\n"
        "        await asyncio.sleep(3600)\n"
        "asyncio.run(main())\n"
    )
    client = serve.start(
        f'{QUICK}[target.web]\ncommand = ["{sys.executable}", "app.py"]\nprotocol = "sdk"\n'
        'watchdog_timeout = "8s"\nstop_timeout = "100ms"\n'
    )
    before = reached(client, "web", "running")["pid"]
    os.kill(before, signal.SIGSTOP)
    wait_for(lambda: instance(client, "web")["pid"] not in {None, before}, "another process")
    assert "watchdog" in instance(client, "web")["exit"]["reason"]
    reached(client, "web", "running")
    client.close()


# --- oneshot, conditions, age, schedule ---------------------------------------------------------------------


def test_a_oneshot_is_done_when_it_has_ended_well(serve: Serve) -> None:
    job = "command = ['sh', '-c', 'until [ -e go ]; do sleep 0.02; done']\noneshot = true\n"
    client = serve.start(f"{QUICK}[target.job]\n{job}")
    wait_for(lambda: instance(client, "job")["pid"], "the process")
    assert target(client, "job")["state"] == "starting"
    (serve.folder / "go").touch()
    assert reached(client, "job", "exited")["exit"]["status"] == 0
    client.call("start", names=["job"])
    assert instance(client, "job")["state"] == "exited"
    client.close()


def test_a_oneshot_that_fails_is_tried_again_and_then_given_up(serve: Serve) -> None:
    client = serve.start(
        f"{QUICK}start_limit_burst = 2\n[target.job]\ncommand = ['sh', '-c', 'exit 3']\noneshot = true\n"
    )
    assert reached(client, "job", "failed")["restarts"] == 2
    assert fails(client, "start", names=["job"]).error_code == "target.start_failed"
    client.close()


def test_a_oneshot_may_not_run_for_longer_than_max_age(serve: Serve) -> None:
    client = serve.start(
        f'{QUICK}restart = "never"\n[target.job]\n{SLEEPER}oneshot = true\nmax_age = "200ms"\n'
    )
    assert reached(client, "job", "failed")["exit"]["reason"] == "not done within max_age (0.2 s)"
    client.close()


def test_each_condition_is_waited_for(serve: Serve) -> None:
    migrate = "command = ['sh', '-c', 'until [ -e migrated ]; do sleep 0.02; done']\noneshot = true\n"
    client = serve.start(
        f"{QUICK}[target.migrate]\n{migrate}"
        f"[target.db]\n{SLEEPER}ready.exec = ['sh', '-c', 'test -e up']\nready.interval = '20ms'\n"
        f"[target.early]\n{SLEEPER}depends_on = {{ db = 'started' }}\n"
        f"[target.web]\n{SLEEPER}depends_on = {{ db = 'ready', migrate = 'exited-ok' }}\n"
    )
    reached(client, "early", "running")
    assert instance(client, "db")["state"] == "starting"
    found = reached(client, "web", "waiting")
    assert found["detail"] == "waiting for db, migrate (exited-ok)"
    (serve.folder / "up").touch()
    reached(client, "db", "running")
    assert instance(client, "web")["state"] == "waiting"
    (serve.folder / "migrated").touch()
    reached(client, "web", "running")
    client.close()


def test_instances_that_are_too_old_are_replaced_one_at_a_time(serve: Serve) -> None:
    client = serve.start(f'{QUICK}[target.web]\n{SLEEPER}instances = 2\nmax_age = "2s"\n')
    client.call("wait", {"names": ["web"], "for": "ready", "timeout": 60})
    before = {i["pid"] for i in target(client, "web")["instances"]}
    with client.subscribe() as events:
        wait_for(lambda: before.isdisjoint(i["pid"] for i in target(client, "web")["instances"]), "new ones")
        down: set[str] = set()
        for event in events.arrived():
            if event.type == "instance.state":
                name = event.data["instance"]
                (down.discard if event.data["to"] == "running" else down.add)(name)
                assert len(down) <= 1, "both were down at once"
    assert all(i["restarts"] == 0 for i in target(client, "web")["instances"])
    client.close()


def test_a_schedule_starts_a_oneshot_again_and_again_until_it_is_stopped(serve: Serve) -> None:
    client = serve.start(
        f"{QUICK}[target.job]\ncommand = ['sh', '-c', 'echo run']\noneshot = true\nautostart = false\n"
        "schedule = '* * * * * *'\n"
    )
    wait_for(lambda: client.call("logs", name="job")["chunks"][0]["text"].count("run") >= 2, "two runs")
    client.call("stop", names=["job"])
    with client.subscribe() as events:
        due = wait_for(lambda: [e for e in events.arrived() if e.type == "target.due"], "the next time")
    assert due[0].data["skipped"] == "stopped by command"
    client.close()
    assert serve.stop() == 0
    client = serve.start()
    with client.subscribe() as events:
        due = wait_for(lambda: [e for e in events.arrived() if e.type == "target.due"], "the next time")
    assert due[0].data["skipped"] == "stopped by command", "it is stopped for good, not until the next start"
    client.close()


# --- hooks --------------------------------------------------------------------------------------------------

NOTE = "hooks.{0} = ['sh', '-c', 'echo {0} $ASYNCSUP_HOOK $ASYNCSUP_EXIT_STATUS >> notes']\n"


def notes(serve: Serve) -> list[str]:
    path = Path(serve.folder, "notes")
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


def test_every_hook_is_run_at_its_time(serve: Serve) -> None:
    hooks = "".join(NOTE.format(name) for name in ("pre_start", "post_start", "pre_stop", "post_stop"))
    program = "echo program >> notes; echo up; exec sleep 3600"
    settings = f"command = ['sh', '-c', '{program}']\nready.log = '^up$'\n"
    client = serve.start(f"{QUICK}[target.web]\n{settings}{hooks}")
    reached(client, "web", "running")
    wait_for(lambda: "post_start" in notes(serve), "post_start")
    assert notes(serve) == ["pre_start", "program", "post_start"]
    client.call("restart", names=["web"])
    wait_for(lambda: notes(serve).count("post_start") == 2, "post_start")
    order = [*notes(serve)[:3], "pre_stop", "post_stop", "pre_start", "program", "post_start"]
    assert notes(serve) == order
    os.kill(instance(client, "web")["pid"], signal.SIGKILL)
    wait_for(lambda: notes(serve).count("post_start") == 3, "post_start")
    assert notes(serve)[8:] == ["post_stop", "pre_start", "program", "post_start"]
    client.close()


def test_a_pre_start_hook_that_fails_is_a_failed_start(serve: Serve) -> None:
    client = serve.start(
        f"{QUICK}restart = 'never'\n[target.web]\n{SLEEPER}hooks.pre_start = ['sh', '-c', 'exit 9']\n"
    )
    assert reached(client, "web", "failed")["exit"]["reason"] == "pre_start: exit status 9"
    client.close()


@pytest.mark.parametrize("hook", ["pre_start", "post_start", "pre_stop", "post_stop"])
def test_a_hook_that_is_not_there_is_an_error_of_that_target_alone(serve: Serve, hook: str) -> None:
    client = serve.start(
        f"{QUICK}restart = 'never'\n[target.web]\n{SLEEPER}hooks.{hook} = 'no-such-hook'\n"
        f"[target.other]\n{SLEEPER}"
    )
    if hook == "pre_start":
        assert "no-such-hook: command not found" in reached(client, "web", "failed")["exit"]["reason"]
    else:
        client.call("wait", {"names": ["web"], "for": "ready", "timeout": 60})
        client.call("stop", names=["web"])
        assert instance(client, "web")["state"] == "stopped"
        said = f"web:0: hook {hook}: no-such-hook: command not found"
        wait_for(lambda: said in serve.errors(), "the log to name it")
    client.call("wait", {"names": ["other"], "for": "ready", "timeout": 60})
    client.close()


def test_a_hook_that_hangs_is_ended_at_its_time_out(serve: Serve) -> None:
    client = serve.start(
        f"{QUICK}restart = 'never'\n[target.web]\n{SLEEPER}hooks.pre_start = 'sleep 3600'\n"
        "hooks.timeout = '300ms'\n"
    )
    assert reached(client, "web", "failed")["exit"]["reason"] == "pre_start did not end within 0.3 s"
    client.close()


def test_a_stop_hook_cannot_keep_a_stop_from_happening(serve: Serve) -> None:
    client = serve.start(
        f"{QUICK}stop_timeout = '300ms'\n[target.web]\n{SLEEPER}hooks.pre_stop = 'sleep 3600'\n"
        "hooks.post_stop = 'sleep 3600'\nhooks.timeout = '500ms'\n".replace('stop_timeout = "5s"\n', "")
    )
    reached(client, "web", "running")
    client.call("stop", names=["web"])
    assert instance(client, "web")["state"] == "stopped"
    client.close()


def test_a_stop_during_the_pre_start_hook_means_no_start(serve: Serve) -> None:
    client = serve.start(
        f"{QUICK}[target.web]\ncommand = ['sh', '-c', 'touch started']\nhooks.pre_start = 'sleep 3600'\n"
    )
    wait_for(lambda: instance(client, "web")["pid"], "the hook")
    client.call("stop", names=["web"])
    assert instance(client, "web")["state"] == "stopped"
    assert not (serve.folder / "started").exists()
    client.close()


# --- hooks and patches --------------------------------------------------------------------------------------


FACTS = "$ASYNCSUP_PATCH_ACTION $ASYNCSUP_PATCH_KIND $ASYNCSUP_BUILD_BEFORE $ASYNCSUP_BUILD_AFTER"


def test_hooks_frame_a_patch_and_its_rollback(field: Field) -> None:
    hooks = "".join(
        f"hooks.{name} = ['sh', '-c', 'echo {name} {FACTS} >> notes']\n"
        for name in ("pre_patch", "post_patch")
    )
    field.start("web", each={"web": hooks})
    field.apply(field.package("web"))
    field.client.call("patch.rollback", target="web")
    lines = (field.folder / "web.work" / "notes").read_text().splitlines()
    assert lines == [
        "pre_patch apply warm 200 300", "post_patch apply warm 200 300",
        "pre_patch rollback warm 300 200", "post_patch rollback warm 300 200",
    ]  # fmt: skip


def test_a_pre_patch_hook_can_refuse(field: Field) -> None:
    field.start("web", each={"web": "hooks.pre_patch = 'false'\n"})
    error = field.refused(field.package("web"))
    assert (error.error_code, error.remote_exit_status) == ("patch.hook_refused", 22)
    assert error.message == "the pre_patch hook of web failed: exit status 1"
    assert FILES.items() <= field.content("web").items()
    assert field.instance("web")["restarts"] == 0


@pytest.mark.parametrize("kind", list(Kind))
def test_a_post_patch_hook_can_undo(field: Field, kind: Kind) -> None:
    field.start("web", each={"web": "hooks.post_patch = ['sh', '-c', 'exit 4']\n"})
    error = field.refused(field.package("web", kind=kind))
    assert (error.error_code, error.remote_exit_status) == ("patch.rolled_back", 23)
    assert "the post_patch hook of web failed: exit status 4" in error.message
    assert FILES.items() <= field.content("web").items()
    field.said("web", "old-a")


def test_a_failed_probe_in_probation_undoes_the_patch(field: Field) -> None:
    alive = "test $(cat ../web/a.txt) = old-a"
    liveness = f"exec = ['sh', '-c', '{alive}'], interval = '50ms', timeout = '1m', failure_threshold = 2"
    field.start("web", each={"web": f"liveness = {{ {liveness} }}\n"})
    error = field.refused(field.package("web", probation=30.0))
    assert error.error_code == "patch.rolled_back"
    assert "liveness failed 2 times in a row" in error.message
    assert FILES.items() <= field.content("web").items()
