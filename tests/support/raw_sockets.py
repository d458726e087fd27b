"""Plain connections to a server under test."""

from __future__ import annotations

import asyncio
import contextlib


@contextlib.asynccontextmanager
async def connected(f, count=1):
    """Raw connections."""
    made = [await asyncio.open_connection("127.0.0.1", f.http.port) for _ in range(count)]
    try:
        yield made[0] if count == 1 else made
    finally:
        for _, writer in made:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


async def until_closed(reader, timeout_s):
    """What still came until the other side closed."""
    data = b""
    async with asyncio.timeout(timeout_s):
        while piece := await reader.read(65536):
            data += piece
    return data
