"""R8: slow clients beside healthy ones: a header or a body that drips, an answer that stays unread,
connections that say nothing.

Healthy requests are timed in turns with and without the slow ones, so that other work on the
machine meets both.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import statistics
import time

from reliability.client import CHAT, ask, chat, encode
from reliability.figures import Check, Goal, percentile
from reliability.server import Server, rss_bytes, running

DEADLINE_S = 3.0
_ROUNDS = 4
_ROUND_S = 3.0
# Everything a server may keep for one of them: buffers, the task, the prompt.
_EACH_BYTES = 1 << 20
_LONG = chat("word", max_tokens=1900, ignore_eos=True, stream=True, n=8)


def measure(count: int) -> list[Goal]:
    with running(
        "--quiet",
        f"--header_timeout_s={DEADLINE_S:g}",
        f"--body_timeout_s={DEADLINE_S:g}",
        f"--write_timeout_s={DEADLINE_S:g}",
    ) as server:
        quiet, busy, cut_s, grown = asyncio.run(_rounds(server, count))
        unread, unread_grown, unread_s = asyncio.run(_unread(server))
        settled = asyncio.run(server.settle())
    change = percentile(busy, 0.99) / percentile(quiet, 0.99) - 1
    middle = statistics.median(busy) / statistics.median(quiet) - 1
    return [
        Goal(
            "healthy requests beside them, p99",
            "less than 10 % slower",
            f"{100 * change:+.1f} % ({1e3 * percentile(quiet, 0.99):.0f} ms without, "
            f"{1e3 * percentile(busy, 0.99):.0f} ms with; median {100 * middle:+.1f} %; "
            f"{len(quiet)} and {len(busy)} requests)",
            change < 0.10,
        ),
        Goal(
            "all cut",
            f"by their deadline of {DEADLINE_S:g} s (and 1 s for the machine)",
            f"the last after {max(cut_s):.2f} s",
            max(cut_s) <= DEADLINE_S + 1.0,
        ),
        Goal(
            "memory for each",
            "at most 1 MiB",
            f"{grown / count / 2**20:.3f} MiB",
            grown <= count * _EACH_BYTES,
        ),
        Goal(
            "a client that leaves its answer unread",
            "cut, at most 1 MiB held for it by the front",
            f"cut {unread_s:.1f} s after the buffers were full; {unread_grown / 2**20:+.2f} MiB"
            + ("" if settled and unread else "; its work goes on"),
            unread and settled and unread_grown <= _EACH_BYTES,
        ),
    ]


async def _rounds(
    server: Server, count: int
) -> tuple[list[float], list[float], list[float], float]:
    quiet: list[float] = []
    busy: list[float] = []
    cut_s: list[float] = []
    await _healthy(server, [], 2.0)
    before, grown = server.rss_bytes(), 0.0
    for _ in range(_ROUNDS):
        await _healthy(server, quiet, _ROUND_S)
        slow = [asyncio.create_task(_slow(server.port, i)) for i in range(count)]
        await asyncio.sleep(0.3)
        await _healthy(server, busy, DEADLINE_S - 0.8)
        grown = max(grown, server.rss_bytes() - before)
        cut_s += await asyncio.gather(*slow)
    return quiet, busy, cut_s, grown


async def _healthy(server: Server, into: list[float], seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        answer = await ask(server.port, CHAT, chat("Who are you?", max_tokens=4))
        assert answer.status == 200
        into.append(answer.whole_s)


async def _slow(port: int, number: int) -> float:
    """Until the server cuts it."""
    start = time.monotonic()
    data = encode(CHAT, chat("x" * 2000))
    head, _, body = data.partition(b"\r\n\r\n")
    match number % 3:
        case 0:
            first, rest = head[:20], head[20:]
        case 1:
            first, rest = head + b"\r\n\r\n" + body[:5], body[5:]
        case _:
            first, rest = b"", b""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(first)

    async def drip() -> None:
        with contextlib.suppress(OSError):
            for byte in rest:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.5)

    task = asyncio.create_task(drip())
    with contextlib.suppress(OSError):
        async with asyncio.timeout(30):
            while await reader.read(1 << 16):
                pass
    seconds = time.monotonic() - start
    task.cancel()
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return seconds


async def _unread(server: Server) -> tuple[bool, float, float]:
    """A long answer that nobody reads: whether it was cut, memory, and how long that took."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, ("127.0.0.1", server.port))
    # What is compiled for it counts for nobody; and the engine's own part is the answer itself.
    await ask(server.port, CHAT, _LONG | {"max_tokens": 8})
    before = rss_bytes(server.pid)
    await loop.sock_sendall(sock, encode(CHAT, _LONG))
    grown, start, ended = 0, time.monotonic(), False
    while time.monotonic() - start < 60 and not ended:
        grown = max(grown, rss_bytes(server.pid) - before)
        await asyncio.sleep(0.2)
        ended = (await asyncio.to_thread(server.metrics))["http_requests_in_work"] == 0
    seconds = time.monotonic() - start
    got = b""
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(5):
            while piece := await loop.sock_recv(sock, 1 << 16):
                got += piece
    sock.close()
    return ended and bool(got) and b"[DONE]" not in got, grown, seconds


CHECK = Check("slow clients", {"short": 20, "ci": 200, "release": 1000}, "of them at once", measure)
