"""An HTTP service whose prices come from a patched file. New prices reach it without a lost request.

    python price_service.py PORT [FOLDER]   FOLDER holds prices.json: {"apple": 1.2, "pear": 0.9}

    GET  /prices          all prices
    GET  /prices/NAME     one price
    POST /orders/NAME     places an order, which takes a moment, at the price with which it began

All requests read one reference, `prices`, and a reload replaces it by another one: each request sees one
build. Orders are paid for at the end, so a patch waits until none is in flight.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Mapping

from target_sdk import Patch, PrepareAnswer, Target, wait

ORDER_SECONDS = 0.5

target = Target(root=sys.argv[2] if len(sys.argv) > 2 else ".")
prices: Mapping[str, float] = {}
orders_in_flight = 0


def load_prices(build: int | None) -> None:
    global prices  # noqa: PLW0603 - the one reference that all requests read
    with target.snapshot() as files:
        loaded = files.json("prices.json")
    if not loaded or not all(isinstance(price, int | float) for price in loaded.values()):
        raise ValueError("prices.json holds no prices")  # the patch is undone, and this is the reason shown
    prices = loaded
    target.status(f"{len(prices)} prices, build {build}")


@target.on_prepare
def prepare(patch: Patch) -> PrepareAnswer | None:
    return wait(0.2, f"{orders_in_flight} orders in flight") if orders_in_flight else None


@target.on_reload
def reload(patch: Patch) -> None:
    load_prices(patch.build)


async def order(name: str) -> dict[str, object]:
    global orders_in_flight  # noqa: PLW0603
    orders_in_flight += 1
    try:
        price = prices[name]
        await asyncio.sleep(ORDER_SECONDS)
        return {"name": name, "paid": price}
    finally:
        orders_in_flight -= 1


async def respond(method: str, path: str) -> tuple[str, object]:
    """Return the status line's end and what goes into the body."""
    parts = path.strip("/").split("/")
    try:
        match method, parts:
            case "GET", ["prices"]:
                return "200 OK", prices
            case "GET", ["prices", name]:
                return "200 OK", {"name": name, "price": prices[name]}
            case "POST", ["orders", name]:
                return "200 OK", await order(name)
    except KeyError as error:
        return "404 Not Found", {"error": f"no price for {error}"}
    return "404 Not Found", {"error": "GET /prices, GET /prices/NAME, POST /orders/NAME"}


async def serve_client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        method, path, *_ = [*head.split("\r\n", 1)[0].split(" "), "", ""]
        status, value = await respond(method, path)
        body = json.dumps(value).encode()
        writer.write(
            f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
            + body
        )
        await writer.drain()
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
        pass  # the client went away, or sent no HTTP
    finally:
        writer.close()


async def main(port: int) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    load_prices(target.build)
    server = await asyncio.start_server(serve_client, "127.0.0.1", port)
    async with target, server:
        host, bound, *_ = server.sockets[0].getsockname()
        print(f"serving on http://{host}:{bound}/prices", flush=True)
        target.ready()
        await stop.wait()


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    asyncio.run(main(int(sys.argv[1])))
