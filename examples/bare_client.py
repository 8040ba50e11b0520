"""Drives a supervisor with nothing but pyzmq and json: what a client in any language has to do.

    python bare_client.py ipc:///run/asyncsup/control.sock [TARGET...]

Prints what runs, restarts the targets that are named, and prints what happens until the supervisor ends.
The protocol is in docs/protocol.md. A program in Python is better off with `asyncsup.client`, which notices
when the supervisor goes away and fetches events that got lost.
"""

from __future__ import annotations

import json
import sys

import zmq


def call(socket: zmq.Socket[bytes], request_id: int, method: str, **params: object) -> dict[str, object]:
    """One JSON-RPC 2.0 request, one answer; a REQ socket keeps the two together by itself."""
    request = {"jsonrpc": "2.0", "id": request_id, "method": method, "params": params}
    socket.send(json.dumps(request).encode())
    try:
        answer = json.loads(socket.recv())
    except zmq.Again:
        raise SystemExit(f"{method}: no answer") from None
    if "error" in answer:
        error = answer["error"]
        # `code` is for JSON-RPC libraries; `data.code` is asyncsup's own, and stable.
        raise SystemExit(f"{method}: {error['message']} [{error['data']['code']}]")
    result: dict[str, object] = answer["result"]
    return result


def main(endpoint: str, *restart: str) -> None:
    context = zmq.Context()
    control = context.socket(zmq.REQ)
    control.linger = 0
    control.rcvtimeo = 60_000  # ZeroMQ itself would wait for ever for a supervisor that is not there
    control.connect(endpoint)
    events = context.socket(zmq.SUB)
    events.linger = 0
    events.subscribe("instance.state")
    events.subscribe("supervisor.stopping")

    info = call(control, 1, "supervisor.info")
    print(f"asyncsup {info['version']}, pid {info['pid']}, region {info['region']}")
    events.connect(f"ipc://{info['runtime_dir']}/events.sock")

    status = call(control, 2, "status")
    for target in status["targets"]:  # type: ignore[attr-defined]
        print(f"{target['name']} is {target['state']} at build {target['build']}")
    if restart:
        call(control, 3, "restart", names=list(restart), wait=True)
        print(f"restarted {', '.join(restart)}")

    while True:
        topic, frame = events.recv_multipart()
        event = json.loads(frame)["params"]
        if topic == b"supervisor.stopping":
            break
        print(f"#{event['seq']} {event['instance']}: {event['from']} -> {event['to']}", flush=True)
    control.close()
    events.close()
    context.term()


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
