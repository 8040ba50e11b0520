"""Where a managed socket is bound: ``tcp://HOST:PORT``, ``udp://HOST:PORT``, ``unix://PATH``. Pure."""

from __future__ import annotations

import os
import re
from typing import Final, Literal, NamedTuple, Self, cast

from asyncsup.endpoint import MAX_SOCKET_PATH_BYTES

Scheme = Literal["tcp", "udp", "unix", "unixgram"]

EVERY: Final = "*"
"""As a host: all addresses, of IPv4 and, where the machine has it, IPv6."""

_INTERNET: Final = re.compile(r"(tcp|udp)://(\*|[0-9.]+|\[[0-9a-fA-F:.]+\]):([0-9]{1,5})")


class Address(NamedTuple):
    """Attributes:
    host: an IP address or `EVERY`; the path of a UNIX socket.
    """

    scheme: Scheme
    host: str
    port: int = 0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueError: it is no address, and why."""
        scheme, _, rest = text.partition("://")
        if scheme in {"unix", "unixgram"}:
            if not rest.startswith("/"):
                raise ValueError("not an absolute path")
            if (size := len(os.fsencode(rest))) > MAX_SOCKET_PATH_BYTES:
                raise ValueError(
                    f"a socket's path has at most {MAX_SOCKET_PATH_BYTES} bytes, this one has {size}"
                )
            return cls(cast(Scheme, scheme), rest)
        found = _INTERNET.fullmatch(text)
        if found is None:
            raise ValueError("not an address to bind a socket to")
        if not 1 <= int(found[3]) <= 65_535:
            raise ValueError("a port is a number from 1 to 65535")
        host = found[2].strip("[]")
        if host != EVERY:
            import ipaddress  # noqa: PLC0415 - few configurations have sockets

            try:
                ipaddress.ip_address(host)
            except ValueError:
                raise ValueError(f"{host} is not an IP address") from None
        return cls(cast(Scheme, found[1]), host, int(found[3]))

    @property
    def is_path(self) -> bool:
        return self.scheme in {"unix", "unixgram"}

    def __str__(self) -> str:
        if self.is_path:
            return f"{self.scheme}://{self.host}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"
