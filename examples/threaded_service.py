"""A threaded HTTP service of the standard library that is replaced without losing a request.

python threaded_service.py [PORT]       by hand
python threaded_service.py              asyncsup: sockets = ["web"]

GET /        an answer        GET /slow    one that takes half a second
"""

from __future__ import annotations

import http.server
import json
import os
import signal
import socket
import sys
import threading
import time

from target_sdk import Target, sockets
from target_sdk.threaded import DrainingHandler, DrainingServer

target = Target()
stop = threading.Event()


class Handler(DrainingHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:  # noqa: N802 - http.server's name
        if self.path == "/slow":
            time.sleep(0.5)
        body = json.dumps({"build": target.build, "pid": os.getpid()}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


class Server(DrainingServer, http.server.HTTPServer):
    pass


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    given = sockets()
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    listening = given["web"] if "web" in given else socket.create_server(("127.0.0.1", port))
    server = Server.on(listening, Handler)
    target.on_drain(server.drain)
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    with target:
        target.ready()
        while not stop.is_set():
            target.run_pending(timeout=0.5)
    server.shutdown()
    serving.join()
    server.server_close()


if __name__ == "__main__":
    main()
