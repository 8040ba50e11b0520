"""Start, crash to replacement, control round trips, memory, idle cost, command line."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import orjson
import zmq
from rig import answers, compile_floor, folder, median, row, supervisor, until

from asyncsup.client import ControlClient


def stamps(file: Path) -> list[float]:
    return [float(line) for line in file.read_text().splitlines()] if file.exists() else []


def wait_for_stamps(file: Path, count: int) -> None:
    until(lambda: len(stamps(file)) >= count)


def start(program: Path, home: Path, count: int) -> None:
    """Launch of the supervisor to the last child's own stamp."""
    floor = float(subprocess.check_output([program, "start", str(count), home / "floor"], text=True))
    file = home / "stamps"
    text = f'[target.t]\ncommand = ["{program}", "child", "{file}"]\ninstances = {count}\n'
    began = time.monotonic()
    with supervisor(home, text):
        until(lambda: file.exists() and file.stat().st_size >= 32 * count)
        row(f"start of {count} instances", max(stamps(file)) - began, "s", floor)


def crash(program: Path, home: Path, instances: int, rounds: int = 50) -> None:
    """SIGKILL to the replacement's own stamp."""
    floor = float(subprocess.check_output([program, "crash", str(rounds), home / "floor"], text=True)) / 1e3
    file = home / "stamps"
    text = (
        "[defaults]\nmin_uptime = 0\nstart_limit_burst = 1000000\n"
        f'[target.t]\ncommand = ["{program}", "child", "{file}"]\n'
        f'[target.others]\ncommand = ["{program}", "child", "{home}/others"]\ninstances = {instances - 1}\n'
    )
    with supervisor(home, text) as (client, _):
        client.call("wait", {"names": ["all"], "for": "ready", "timeout": 120})
        took = []
        for number in range(rounds):
            wait_for_stamps(file, number + 1)
            pid = client.call("status", names=["t"])["targets"][0]["instances"][0]["pid"]
            killed = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            wait_for_stamps(file, number + 2)
            took.append((stamps(file)[-1] - killed) * 1e3)
    row(f"crash to replacement, {instances} instances", median(took), "ms", floor)


def control(home: Path, seconds: float = 2.0) -> None:
    """`status` of one target over one connection, against a raw ROUTER that answers with as many bytes."""
    with supervisor(home, '[target.t]\ncommand = "sleep 3600"\n') as (client, _):
        reply = orjson.dumps({"jsonrpc": "2.0", "id": 1, "result": client.call("status", names=["t"])})
        ours = rounds_per_second(client, seconds)
    floor = raw_rounds_per_second(f"ipc://{home}/floor.sock", reply, seconds)
    row("control round trips", ours, "1/s", floor, higher_is_better=True)


def rounds_per_second(client: ControlClient, seconds: float) -> float:
    began, count = time.monotonic(), 0
    while time.monotonic() - began < seconds:
        client.call("status", names=["t"])
        count += 1
    return count / (time.monotonic() - began)


def raw_rounds_per_second(endpoint: str, reply: bytes, seconds: float) -> float:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    server = context.socket(zmq.ROUTER)
    server.bind(endpoint)

    def serve() -> None:
        while len(frames := server.recv_multipart()) > 1 and frames[-1] != b"end":
            server.send_multipart([*frames[:-1], reply])

    thread = threading.Thread(target=serve)
    thread.start()
    client = context.socket(zmq.REQ)
    client.connect(endpoint)
    request = orjson.dumps({"jsonrpc": "2.0", "id": 1, "method": "status", "params": {"names": ["t"]}})
    began, count = time.monotonic(), 0
    while time.monotonic() - began < seconds:
        client.send(request)
        client.recv()
        count += 1
    result = count / (time.monotonic() - began)
    client.send(b"end")
    thread.join()
    for socket in (client, server):
        socket.close(0)
    context.term()
    return result


def memory_and_idle(home: Path, count: int, seconds: float) -> None:
    text = f'[target.t]\ncommand = "sleep 3600"\ninstances = {count}\n' if count else ""
    with supervisor(home, text) as (client, pids):
        if count:
            client.call("wait", {"names": ["all"], "for": "ready", "timeout": 300})
        row(f"memory (PSS), {count} instances", sum(map(proportional_set, pids)), "MiB")
        row(f"memory (PSS), {count} instances, the keeper's", proportional_set(pids[-1]), "MiB")
        before = switches(pids)
        time.sleep(seconds)
        row(f"idle context switches, {count} instances", (switches(pids) - before) / seconds, "1/s")


def proportional_set(pid: int) -> float:
    """In MiB."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(re.findall(r"Pss:\s+(\d+)", rollup)[0]) / 1024


def switches(pids: list[int]) -> int:
    total = 0
    for task in (task for pid in pids for task in Path(f"/proc/{pid}/task").iterdir()):
        total += int(re.findall(r"voluntary_ctxt_switches:\s+(\d+)", (task / "status").read_text())[0])
    return total


def survival(home: Path, count: int) -> None:
    """SIGKILL to the supervisor, until another one answers and has everything back."""
    text = f'[target.t]\ncommand = "sleep 3600"\ninstances = {count}\nmin_uptime = 0\n'
    with supervisor(home, text) as (client, pids):
        client.call("wait", {"names": ["all"], "for": "ready", "timeout": 300})
        killed = time.monotonic()
        os.kill(pids[0], signal.SIGKILL)
        until(lambda: answers(client) and client.call("supervisor.info")["adopted"] == count)
        row(f"kill -9 to the next answer, {count} instances", time.monotonic() - killed, "s")
        found = re.findall(r"taken back in (\d+) ms", (home / "serve.err").read_text())
        row(f"kill -9: taken back, {count} instances", float(found[-1]), "ms")


def command_line(home: Path, rounds: int = 20) -> None:
    with supervisor(home, '[target.t]\ncommand = "sleep 3600"\n'):
        ours = timed([sys.executable, "-m", "asyncsup", "-c", str(home / "asyncsup.toml"), "status"], rounds)
    row("`asyncsup status`, whole process", ours, "ms", timed([sys.executable, "-c", "pass"], rounds))


def timed(command: list[str], rounds: int) -> float:
    took = []
    for _ in range(rounds):
        began = time.monotonic()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
        took.append((time.monotonic() - began) * 1e3)
    return median(took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--instances", type=int, default=1000)
    parser.add_argument("--idle", type=float, default=60.0, metavar="SECONDS")
    args = parser.parse_args()
    with folder() as tools:
        program = compile_floor(tools)
        for count in sorted({100, args.instances}):
            with folder() as home:
                start(program, home, count)
        for count in sorted({2, args.instances}):
            with folder() as home:
                crash(program, home, count)
        with folder() as home:
            control(home)
        for count in sorted({0, args.instances}):
            with folder() as home:
                memory_and_idle(home, count, args.idle)
        with folder() as home:
            survival(home, args.instances)
        with folder() as home:
            command_line(home)


if __name__ == "__main__":
    main()
