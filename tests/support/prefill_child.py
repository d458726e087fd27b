"""A prefill process without a model, for tests of remote_prefill.py: layer i of position p of token
t is filled with 1000 i + t, as in tests/engine/test_prefill_worker.py. The first token may say what
goes wrong.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.engine import prefill_process
from jaxmoe.engine.channel import Channel
from jaxmoe.engine.messages import LayerDone, PrefillReady
from jaxmoe.kv_cache import store
from jaxmoe.kv_cache.shared_pages import SharedPages
from jaxmoe.models.decoder import PageArraySpec

LAYERS, SIZE, OWN_PAGES = 6, 4, 8
SPEC = [tuple(PageArraySpec(1, 2, np.dtype("float32")) for _ in range(2)) for _ in range(LAYERS)]
FAILS, DIES, IS_SLOW, IS_OUT_OF_ORDER, IS_WRONG = range(90, 95)


class Programs:
    max_tokens, num_layers = 100, LAYERS

    def __init__(self, channel: Channel, pages: SharedPages) -> None:
        self.channel, self.pages = channel, pages

    def layers(self, row, caches):
        how = row.token_ids[0]
        for layer in range(LAYERS):
            if layer == 3:
                if how == FAILS:
                    raise ValueError("copy 7 failed")
                if how == DIES:
                    os.kill(os.getpid(), signal.SIGKILL)
                if how == IS_OUT_OF_ORDER:
                    self.say(5, 0)
                if how == IS_WRONG:
                    self.say(2, 12345)
            if how == IS_SLOW:
                time.sleep(0.05)
            at = np.arange(row.start, row.start + len(row.token_ids))
            where = np.asarray(row.pages)[at // SIZE]
            values = 1000.0 * layer + jnp.asarray(row.token_ids)[:, None, None]
            caches()[layer] = tuple(a.at[where, at % SIZE].set(values) for a in caches()[layer])
            yield layer + 1

    def say(self, layer: int, checksum: int) -> None:
        """Of every prompt; those that are not under way are passed over."""
        self.channel.send([LayerDone(job, layer, checksum) for job in range(20)])

    def close(self) -> None: ...


def main(store_name: str, num_starts: str, level: str, socket_fd: str, pages_fd: str) -> None:
    """num_starts: a file that counts them; where it says so, the start fails."""
    with open(num_starts, "a+") as file:
        file.write("x")
        file.seek(0)
        if file.read().startswith("fail"):
            sys.exit(7)
    channel = Channel(socket.socket(fileno=int(socket_fd)))
    messages = channel.receive()
    next(messages)
    pages = SharedPages(int(pages_fd), SPEC, OWN_PAGES, SIZE)
    own = store.allocate(SPEC, OWN_PAGES, SIZE, device=jax.local_devices(backend="cpu")[0])
    prompts = prefill_process.Prompts(Programs(channel, pages), own, pages, channel, SIZE)
    channel.send([PrefillReady(store_name, 100, LAYERS, 10, 1.0, 1.0, 1.0, "", "")])
    parts = types.SimpleNamespace(rings=[(types.SimpleNamespace(set_pace=lambda pace: None), 1.0)])
    receiving = threading.Thread(
        target=prefill_process._receive, args=(messages, prompts, parts), daemon=True
    )
    receiving.start()
    prompts.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
