"""Prefill in chunks by the compiled step's own operations: what streamed prefill is held to."""

from __future__ import annotations

import jax
import numpy as np
from flax import nnx

from jaxmoe.decode.batch import BlockTables, StepRow, pack_step
from jaxmoe.ffi.native_ops import NativeOps
from jaxmoe.kv_cache import store
from jaxmoe.models.decoder import cache_spec


class PlainPrefill:
    """One sequence at a time, `chunk` tokens a step; `ops` as a prefill's by default."""

    def __init__(
        self, loaded, config, runtime, max_tokens, *, dtype, chunk=128, page_size=16, ops=None
    ):
        self._ops = ops or NativeOps(runtime, loaded.host_store, "matrix")
        self._spec, self._chunk, self._page_size = cache_spec(config, dtype), chunk, page_size
        self._pages = -(-max_tokens // page_size)
        self._state, self.caches = loaded.state, []

        def step(state, inputs, caches, last):
            model = nnx.merge(loaded.graphdef, state)
            return model(inputs, caches, self._ops, last)

        self._step = jax.jit(step, donate_argnums=2)
        self.reset()

    def reset(self) -> None:
        self.caches = store.allocate(self._spec, self._pages, self._page_size)

    def run(self, row: StepRow) -> np.ndarray:
        """Computes the row's tokens; the last one's logits `[V]`."""
        logits = None
        for begin in range(0, len(row.token_ids), self._chunk):
            tokens = row.token_ids[begin : begin + self._chunk]
            part = StepRow(tokens, row.start + begin, row.pages, 0, None)
            tables = BlockTables(1, self._pages)
            inputs = pack_step([part], tables, self._chunk, 1, self._page_size)
            last = np.array([len(tokens) - 1], np.int32)
            logits, self.caches = self._step(self._state, inputs, self.caches, last)
        return np.asarray(logits)[0]


def cached(caches, row: StepRow, layer: int) -> list[np.ndarray]:
    """What the pages hold of the row's tokens and of what came before them."""
    count, pages = row.start + len(row.token_ids), np.asarray(row.pages)
    return [np.asarray(a)[pages].reshape(-1, *a.shape[2:])[:count] for a in caches[layer]]
