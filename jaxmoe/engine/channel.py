"""Messages over a stream socket: frames of a 4-byte little-endian length and so many bytes.

The socket is one end of a socketpair that both processes inherit; nothing else can reach it. What
it does not do: know what messages mean (codec.py).
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterable, Iterator

from jaxmoe.engine.codec import ChannelError, decode, encode
from jaxmoe.engine.messages import Event, Failed, Message
from jaxmoe.request import Delta

MAX_FRAME_BYTES = 1 << 28  # a context of 2**24 tokens takes less than half of it
_HEADER_BYTES = 4
READ_BYTES = 1 << 16


def frame(message: Message) -> bytes:
    data = encode(message)
    if len(data) > MAX_FRAME_BYTES:
        raise ChannelError(f"a message has {len(data)} bytes, wanted at most {MAX_FRAME_BYTES}")
    return len(data).to_bytes(_HEADER_BYTES, "little") + data


class FrameReader:
    """Bytes in, as they come; messages out, as they become whole."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes | memoryview) -> Iterator[Message]:
        """Raises ChannelError; what follows a broken frame cannot be read."""
        self._buffer += data
        start = 0
        try:
            while len(self._buffer) - start >= _HEADER_BYTES:
                size = int.from_bytes(self._buffer[start : start + _HEADER_BYTES], "little")
                if size > MAX_FRAME_BYTES:
                    raise ChannelError(f"a frame of {size} bytes, wanted at most {MAX_FRAME_BYTES}")
                end = start + _HEADER_BYTES + size
                if len(self._buffer) < end:
                    break
                begin, start = start + _HEADER_BYTES, end
                with memoryview(self._buffer) as whole, whole[begin:end] as body:
                    message = decode(body)
                yield message
        finally:
            del self._buffer[:start]


class Channel:
    """A blocking end, for the engine process: one thread receives, any may send."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._reader = FrameReader()
        self._sending = threading.Lock()

    def send(self, messages: Iterable[Message]) -> None:
        """Raises OSError when the other end is gone."""
        data = b"".join(map(frame, messages))
        with self._sending:
            self._socket.sendall(data)

    def send_events(self, events: Iterable[Event]) -> list[str]:
        """As `send`; an event that is too large becomes the refusal of its request, and nothing
        else suffers. Returns the ids of requests refused so that have not ended yet.
        """
        data, refused = [], []
        for event in events:
            try:
                data.append(frame(event))
            except ChannelError as error:
                words = f"the answer is too large: {error}; ask for less (logprobs, n, max_tokens)"
                data.append(frame(Failed(event.request_id, "request", words)))
                if not isinstance(event, Delta) or event.output is None:
                    refused.append(event.request_id)
        with self._sending:
            self._socket.sendall(b"".join(data))
        return refused

    def receive(self) -> Iterator[Message]:
        """Messages until the other end closes."""
        # One buffer for all: pieces of this size, cut to what came, leave the heap in holes.
        buffer = memoryview(bytearray(READ_BYTES))
        while size := self._socket.recv_into(buffer):
            yield from self._reader.feed(buffer[:size])
