"""The way in over TCP: a CURVE key for everybody, and a role for every key.

Two ports: requests at the one that is configured, events at the next one. libzmq does the handshake
(https://rfc.zeromq.org/spec/26/) and asks here, over ZAP (https://rfc.zeromq.org/spec/27/), whether it knows
the key; from then on it says with every message whose it is. What a key may do is looked up at every
request, so that one that is revoked does nothing more, open connections included.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

import zmq
from zmq.utils import z85

from asyncsup.endpoint import events_port
from asyncsup.errors import KeysError, StateError
from asyncsup.ipc import Curve, Origin, Publisher, Router
from asyncsup.keys import AllowedKey, KeyStore

log = logging.getLogger("asyncsup.control")

DOMAIN: Final = b"asyncsup"
ZAP_ENDPOINT: Final = "inproc://zeromq.zap.01"
ZAP_FRAMES: Final = 9
"""Identity, delimiter, version, request id, domain, address, identity, mechanism, key."""

FAILURE_SECONDS: Final = 60.0
"""So often a failed handshake is said at most."""
REBIND_SECONDS: Final = 0.05
"""libzmq closes a socket in a thread of its own; until it has, its port is taken."""


class RemoteAccess:
    """Everything there is for clients that come over TCP.

    Args:
        endpoint: ``tcp://HOST:PORT``, as libzmq binds it.
        counters: of the supervisor.

    Raises:
        KeysError: the supervisor has no key of its own, or one that others may read.
        StateError: an address is taken.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        keys: KeyStore,
        counters: Counter[str],
    ) -> None:
        if not keys.secret_file.exists():
            raise KeysError(
                f"supervisor.listen needs a key of the supervisor's own in {keys.folder}: "
                "make one with `asyncsup keys generate`",
                code="keys.missing",
            )
        self._context = context
        self._endpoint = endpoint
        self._keys = keys
        self._counters = counters
        self._loop = asyncio.get_running_loop()
        self._curve = Curve(keys.own_pair().secret, DOMAIN, self._on_failure)
        self._said_failure = -math.inf
        self._subscribers_keys = frozenset(keys.allowed().keys)
        self._rebinding: asyncio.TimerHandle | None = None
        for problem in keys.allowed().problems:
            log.error("%s", problem)
        self._zap = Router(context, ZAP_ENDPOINT, self._on_zap, most_frames=ZAP_FRAMES)
        self._publisher: Publisher | None = None
        try:
            self._publisher = Publisher(context, events_port(endpoint), curve=self._curve)
        except StateError:
            self._zap.close()
            raise

    def close(self) -> None:
        if self._rebinding is not None:
            self._rebinding.cancel()
        if self._publisher is not None:
            self._publisher.close()
        self._zap.close()

    def bind(self, on_message: Callable[[bytes, Sequence[bytes], Origin], None]) -> Router:
        """The socket for requests."""
        return Router(self._context, self._endpoint, on_message, curve=self._curve)

    def key_of(self, origin: Origin) -> tuple[str, AllowedKey | None]:
        """Whose request it is, and what the key of that connection may at this moment."""
        name, _, public = origin.user.partition(" ")
        key = self._keys.allowed().keys.get(public)
        return name, key if key is not None and key.name == name else None

    # --- the handshake --------------------------------------------------------------------------------------

    def _on_zap(self, peer: bytes, frames: Sequence[bytes], origin: Origin) -> None:
        if len(frames) != ZAP_FRAMES - 1:
            log.error("libzmq asks in a way that is not known: %d frames", len(frames))
            return
        version, request, domain, address, _, mechanism, credentials = frames[1:]
        found = None
        if (version, domain, mechanism) == (b"1.0", DOMAIN, b"CURVE"):
            found = self._keys.allowed().keys.get(z85.encode(credentials).decode())
        if found is None:
            self._counters["control.unknown_keys"] += 1
            log.warning(
                "refused a connection from %s: its key %s is not allowed",
                address.decode("ascii", "replace"),
                z85.encode(credentials).decode() if len(credentials) == 32 else "?",
            )
            status, text, user = b"400", b"this key is not allowed", b""
        else:
            log.info("%s (%s) has connected from %s", found.name, found.role, address.decode())
            # With the key: the name may be given another one, which this connection does not have.
            status, text, user = b"200", b"", f"{found.name} {found.public}".encode()
        self._zap.send(peer, b"", version, request, status, text, user, b"")

    def _on_failure(self, reason: str) -> None:
        """A handshake that did not come as far as a key to be asked about."""
        self._counters["control.failed_handshakes"] += 1
        now = self._loop.time()
        if now - self._said_failure > FAILURE_SECONDS:
            self._said_failure = now
            log.warning(
                "refused a connection to %s: %s (whose it is libzmq does not say; more of them within a "
                "minute are counted only)",
                self._endpoint,
                reason,
            )

    # --- events ---------------------------------------------------------------------------------------------

    def publish(self, topic: bytes, frame: bytes) -> None:
        """To all subscribers; those whose key is gone are no subscribers any more."""
        keys = self._keys.allowed().keys.keys()
        if not self._subscribers_keys <= keys:
            self._start_anew()
        self._subscribers_keys = frozenset(keys)
        if self._publisher is not None:
            self._publisher.send(topic, frame)

    def _start_anew(self) -> None:
        """Let go of all subscribers: libzmq knows no other way to be rid of one. The others come back by
        themselves, and fetch what they have missed."""
        if self._publisher is not None:
            self._publisher.close()
            self._publisher = None
            self._rebind()

    def _rebind(self) -> None:
        try:
            self._publisher = Publisher(self._context, events_port(self._endpoint), curve=self._curve)
            self._rebinding = None
        except StateError:
            self._rebinding = self._loop.call_later(REBIND_SECONDS, self._rebind)
