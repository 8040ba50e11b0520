"""Servers of the standard library (socketserver, http.server, wsgiref) that lose no request when replaced."""

from __future__ import annotations

import contextlib
import http.server
import os
import socket
import socketserver
import threading
import time
from typing import Any, Final, Self

IDLE_GRACE: Final = 5.0


class DrainingServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """A server with a thread for each connection that can be drained. Put it before a server of your own::

    class Server(DrainingServer, http.server.HTTPServer): ...

    server = Server.on(target_sdk.sockets()["web"], Handler)
    target.on_drain(server.drain)
    """

    idle_grace = IDLE_GRACE
    """For how long (seconds) idle keep-alive connections are left open in a drain."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        self.draining = False
        self._idle: dict[socket.socket, bool] = {}
        """Every open connection, and whether it waits for its next request."""
        self._changed = threading.Condition()
        super().__init__(*arguments, **more)

    @classmethod
    def on(cls, listening: socket.socket, handler: type[socketserver.BaseRequestHandler]) -> Self:
        """A server on a socket that listens already."""
        server = cls(listening.getsockname(), handler, bind_and_activate=False)
        server.socket.close()
        # Several processes are told of one connection, and all but one of them would wait in accept.
        listening.setblocking(False)
        server.socket = listening
        if isinstance(server, http.server.HTTPServer):
            host, server.server_port = listening.getsockname()[:2]
            server.server_name = socket.getfqdn(host)
        if hasattr(server, "setup_environ"):  # wsgiref's
            server.setup_environ()
        return server

    def drain(self, seconds: float) -> None:
        """Accept no more and wait until the last connection is closed; blocks.

        Raises:
            TimeoutError: requests are being answered when the time (seconds) is over.
        """
        deadline = time.monotonic() + seconds
        with self._changed:
            if not self.draining:
                self.draining = True
                self._stop_accepting()
            self._wait_closed(min(time.monotonic() + self.idle_grace, deadline))
            for connection, idle in self._idle.items():
                if idle:
                    self._let_go(connection)
            if not self._wait_closed(deadline):
                raise TimeoutError(f"{len(self._idle)} connections are still busy after {seconds:g} s")

    def set_idle(self, connection: socket.socket, idle: bool) -> None:
        """For handlers: this connection waits for its next request, or has one."""
        with self._changed:
            if connection in self._idle:
                self._idle[connection] = idle

    def get_request(self) -> tuple[socket.socket, Any]:
        with self._changed:  # so that none is accepted that `drain` has not seen
            if self.draining:
                raise BlockingIOError
            connection, address = super().get_request()
            self._idle[connection] = False
            return connection, address

    def shutdown_request(self, request: Any) -> None:
        try:
            super().shutdown_request(request)
        finally:
            with self._changed:
                self._idle.pop(request, None)
                self._changed.notify_all()

    def _stop_accepting(self) -> None:
        """Give `serve_forever`, which goes on, something to wait for in which nothing ever comes.

        That closes this process's copy of the listening socket, and leaves the socket to the successor.
        """
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as silent:
            os.dup2(silent.fileno(), self.fileno(), inheritable=False)

    def _wait_closed(self, deadline: float) -> bool:
        return self._changed.wait_for(lambda: not self._idle, max(0.0, deadline - time.monotonic()))

    def _let_go(self, connection: socket.socket) -> None:
        """Its thread reads the end; a request that has arrived before is read first, and answered."""
        with contextlib.suppress(OSError):  # the client was faster
            connection.shutdown(socket.SHUT_RD)


class DrainingHandler(http.server.BaseHTTPRequestHandler):
    """The handler that goes with it; yours is derived from it and sets ``protocol_version = "HTTP/1.1"``.

    While the server drains, every answer says ``Connection: close`` and is the last one of its connection.
    """

    server: DrainingServer
    _status = 0

    def handle_one_request(self) -> None:
        self.server.set_idle(self.connection, True)
        super().handle_one_request()

    def parse_request(self) -> bool:
        self.server.set_idle(self.connection, False)
        return super().parse_request()

    def send_response_only(self, code: int, message: str | None = None) -> None:
        self._status = code
        super().send_response_only(code, message)

    def end_headers(self) -> None:
        if self.server.draining and self._status >= 200:
            self.send_header("Connection", "close")
        super().end_headers()
