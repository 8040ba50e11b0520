"""The I/O thread: moves frames between a `Session` and the supervisor's socket, and sleeps in between."""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

import zmq

from target_sdk.protocol import (
    MAX_MESSAGE_BYTES,
    Failure,
    Hello,
    Params,
    Request,
    Result,
)
from target_sdk.session import CallKey, Phase, Session

RECONNECT_AFTER_MS: Final = 10
RECONNECT_MAX_MS: Final = 500
"""Attempts to reconnect slow down to this, so that a supervisor that stays away costs next to nothing."""

CLOSE_GRACE: Final = 0.25
"""Seconds that `close` waits for the last words to be acknowledged, while there is a connection."""

RECEIVE_BATCH: Final = 256

logger = logging.getLogger("target_sdk")

Serve = Callable[[CallKey, Request], Result | Failure | None]


class Connection:
    """One thread, one DEALER socket. Every method may be called from any thread and returns at once.

    Args:
        hello: who is speaking; called on the I/O thread.
        serve: takes a request of the supervisor, on the I/O thread, without blocking. It returns the answer,
            or None if it will call `answer` later.
        lost: the connection is gone (until the next one); on the I/O thread as well.
    """

    def __init__(
        self, endpoint: str, *, hello: Callable[[], Hello], serve: Serve, lost: Callable[[], None]
    ) -> None:
        self._endpoint = endpoint
        self._serve = serve
        self._lost = lost
        self._session = Session(hello)
        self._posted: deque[Callable[[float], None]] = deque()
        self._close_by: float | None = None
        self._lock = threading.RLock()  # reentrant: a signal handler may report, too
        self._closed = False
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_reader, False)
        os.set_blocking(self._wake_writer, False)
        self._thread = threading.Thread(target=self._run, name="target-sdk-io", daemon=True)
        self._thread.start()

    def report(self, method: str, params: Callable[[], Params], *, lasting: bool) -> None:
        """Tell the supervisor, see `Session.report`."""
        self._post(lambda now: self._session.report(method, params, lasting=lasting, now=now))

    def answer(self, key: CallKey, answer: Result | Failure) -> None:
        self._post(lambda _: self._session.answer(key, answer))

    def close(self) -> None:
        """Send what is left and end. Waits for that, for `CLOSE_GRACE` seconds at most."""

        def close(now: float) -> None:
            self._close_by = now + CLOSE_GRACE

        self._post(close)
        self._thread.join()
        with self._lock:  # nobody may write into a descriptor that somebody else has opened by then
            self._closed = True
            os.close(self._wake_reader)
            os.close(self._wake_writer)

    def _post(self, action: Callable[[float], None]) -> None:
        with self._lock:
            if self._closed or not self._thread.is_alive():
                return
            self._posted.append(action)
            with contextlib.suppress(BlockingIOError):  # enough wake-ups are unread already
                os.write(self._wake_writer, b"\0")

    def _run(self) -> None:
        # The sockets are locals of this frame and nothing else: after a fork the child has no such frame, so
        # nothing there can close, flush or use what belongs to the parent.
        context = zmq.Context[zmq.Socket[bytes]]()
        dealer = context.socket(zmq.DEALER)
        monitor = dealer.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        try:
            dealer.linger = 0
            dealer.set(zmq.RECONNECT_IVL, RECONNECT_AFTER_MS)
            dealer.set(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
            dealer.set(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
            # Nothing is queued inside libzmq while there is no connection, and what was queued on one that
            # broke is dropped: otherwise old messages would reach the next supervisor before `hello`.
            dealer.set(zmq.IMMEDIATE, 1)
            dealer.connect(self._endpoint)
            self._exchange(dealer, monitor)
        except zmq.ZMQError as error:
            logger.warning("cannot talk to the supervisor at %s: %s", self._endpoint, error)
        except Exception:
            logger.exception("the connection to the supervisor ended by a fault; running on without it")
        finally:
            dealer.disable_monitor()
            monitor.close(linger=0)
            dealer.close(linger=0)
            context.term()

    def _exchange(self, dealer: zmq.Socket[bytes], monitor: zmq.Socket[bytes]) -> None:
        session = self._session
        poller = zmq.Poller()
        poller.register(monitor, zmq.POLLIN)
        poller.register(self._wake_reader, zmq.POLLIN)
        while True:
            poller.register(dealer, zmq.POLLIN | zmq.POLLOUT if session.outgoing else zmq.POLLIN)
            poller.poll(self._until_next_due())
            self._clear_wake_ups()
            self._watch_connection(monitor)
            self._receive(dealer)
            while self._posted:
                self._posted.popleft()(time.monotonic())
            session.tick(time.monotonic())
            self._send(dealer)
            if self._close_by is not None and (session.settled or time.monotonic() >= self._close_by):
                return

    def _until_next_due(self) -> int | None:
        """Milliseconds; None while nothing but the sockets can wake us."""
        due = min((at for at in (self._session.next_due, self._close_by) if at is not None), default=None)
        return None if due is None else max(0, int((due - time.monotonic()) * 1000) + 1)

    def _clear_wake_ups(self) -> None:
        try:
            while len(os.read(self._wake_reader, 4096)) == 4096:
                pass
        except BlockingIOError:
            pass

    def _watch_connection(self, monitor: zmq.Socket[bytes]) -> None:
        while True:
            try:
                event = monitor.recv_multipart(zmq.NOBLOCK)[0]
            except zmq.Again:
                return
            # Read by hand (16 bit event, 32 bit value): zmq.utils.monitor would import asyncio.
            if struct.unpack("=Hi", event)[0] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._session.connected(time.monotonic())
            else:
                was_down = self._session.phase is Phase.DOWN
                self._session.disconnected()
                if not was_down:
                    logger.info("the supervisor went away; reconnecting when it is back")
                    self._lost()

    def _receive(self, dealer: zmq.Socket[bytes]) -> None:
        for _ in range(RECEIVE_BATCH):
            try:
                frames = dealer.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) != 1:
                logger.debug("dropped a message of %d frames", len(frames))
                continue
            call = self._session.receive(frames[0], time.monotonic())
            if call is None:
                continue
            answer = self._serve(*call)
            if answer is not None:
                self._session.answer(call[0], answer)

    def _send(self, dealer: zmq.Socket[bytes]) -> None:
        outgoing = self._session.outgoing
        # Asking for the events also makes libzmq take up a connection it has just been told about.
        while outgoing and dealer.poll(0, zmq.POLLOUT):
            dealer.send(outgoing.popleft(), zmq.NOBLOCK)
