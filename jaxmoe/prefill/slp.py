"""Stream-loading prefill of one prompt on one device (paper section 3.1, Figure 5).

Every layer is two kinds of programs. *chunk*: attention, router, dense MLP or shared experts of
some thousand tokens, as many times as the prompt is long; the routed experts are left out, and what
they need is put aside. *experts*: the routed experts of all tokens, group by group as their weights
arrive in the ring, so that weights are streamed once for the whole prompt. The calling thread is
the model thread: it launches, and waits between layers only. The loader is the ring's own thread;
it runs ahead into the next layers as far as slots are free. The KV cache is written where decode
reads it, so nothing is unloaded.

What a layer has beside its experts is on the device, or comes through slots of the same ring: then
two small programs around the layer's chunks wait for it and give it back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmoe.decode.batch import BlockTables, StepRow, pack_step
from jaxmoe.ffi.device_driver import Device
from jaxmoe.ffi.ops import Ops, StepInputs
from jaxmoe.kernels.experts import ExpertGroup
from jaxmoe.models.decoder import Decoder
from jaxmoe.moe.deferred import DeferredOps
from jaxmoe.moe.experts_streamed import GroupExperts, Ring, StreamedExperts
from jaxmoe.moe.moe_block import MoeBlock
from jaxmoe.prefill.layer_weights import WeightSlots, split_layers
from jaxmoe.prefill.plan import LADDER, SlpPlan

# Contexts are compiled for in multiples of this many positions, those of the ladder.
_CONTEXT_STEP = 4096


# The residual stream [T, D], the experts' input [T, D], and expert ids and weights [T, A].
Buffers = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


class LoadingRing(Ring, Protocol):
    """A ring as this module drives it (prefill/ring.py)."""

    @property
    def groups(self) -> Sequence[ExpertGroup]: ...
    @property
    def weights(self) -> WeightSlots | None: ...
    def start(self) -> None: ...
    def finish(self) -> None: ...
    def abort(self, cause: str) -> None: ...
    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True, eq=False)  # hashing a graphdef takes milliseconds a call
class _Kind:
    """Layers that share their programs: the same modules, whatever the weights."""

    graphdef: Any
    treedef: Any
    is_moe: bool
    has_biases: bool  # that the experts program reads


class SlpPrefill:
    """Owns the programs; the weights stay the caller's.

    Args:
        graphdef, state: the split model, its arrays on the device; where the ring streams them too,
            on the CPU.
        ops: the device's operations for a chunk of one sequence that attends at most so many
            positions.
        ring: of the experts.
        plan: what the ring and the buffers were sized by.
        page_size, pages_per_sequence: of the cache.
        groups: how a group's experts are computed.

    on_compile: may be set; called with True before programs are compiled, and with False after.
    """

    def __init__(
        self,
        graphdef: Any,
        state: Any,
        ops: Callable[[int], Ops],
        ring: LoadingRing,
        plan: SlpPlan,
        *,
        page_size: int,
        pages_per_sequence: int,
        groups: GroupExperts,
        device: Device,
    ) -> None:
        model = nnx.merge(graphdef, state)
        assert isinstance(model, Decoder)
        self._plan, self._ring, self._device = plan, ring, device
        self.on_compile: Callable[[bool], None] = lambda begins: None
        self._compiled: dict[tuple[Any, ...], Any] = {}
        self._page_size, self._pages = page_size, pages_per_sequence
        self._dtype = model.compute_dtype
        self._hidden = model.config.hidden_size
        self._router = model.config.moe.router
        self._layers: list[tuple[_Kind, list[jax.Array]]] = []
        weights = ring.weights
        # Of each layer the slot its other weights come through, None where they are there.
        self._weight_slots: list[int | None] = []
        kinds: dict[Any, _Kind] = {}
        for i, (layer, parts) in enumerate(zip(model.layers, split_layers(model), strict=True)):
            mlp = layer.mlp
            has_biases = isinstance(mlp, MoeBlock) and mlp.expert_bias is not None
            kind = _Kind(parts.graphdef, parts.treedef, parts.is_moe, has_biases)
            kind = kinds.setdefault((parts.graphdef, parts.treedef), kind)
            leaves = parts.leaves if weights is None else list(weights.of(i))
            self._layers.append((kind, leaves))
            self._weight_slots.append(None if weights is None else weights.slots[i])
        # The embedding of a prompt's tokens is little to copy, all of it is not.
        self._embed_device = device
        if weights is not None:
            self._embed_device = jax.local_devices(backend="cpu")[0]
        embed_graphdef, embed_state = nnx.split(model.embedding)
        self._embed_leaves, embed_treedef = jax.tree.flatten(embed_state)

        def embed(leaves, token_ids):
            return nnx.merge(embed_graphdef, jax.tree.unflatten(embed_treedef, leaves))(token_ids)

        def take(h, begin):
            return jax.lax.dynamic_slice_in_dim(h, begin, plan.chunk_tokens)

        def chunk(kind, context, leaves, part, cache, step):
            layer = nnx.merge(kind.graphdef, jax.tree.unflatten(kind.treedef, leaves))
            base = ops(context)
            part, cache, _ = layer.attend(part, cache, step, base, self._dtype)
            deferred = DeferredOps(base)
            part = layer.feed_forward(part, step.token_rows >= 0, deferred, self._dtype)
            return part, deferred.taken, cache

        def put(buffers, begin, part, taken):
            h, *rest = buffers
            update = partial(jax.lax.dynamic_update_slice_in_dim, start_index=begin, axis=0)
            if taken:
                pairs = zip(rest, taken, strict=True)
                rest = [update(old, new.astype(old.dtype)) for old, new in pairs]
            return (update(h, part), *rest)

        activation = model.config.moe.activation

        def experts(kind, leaves, buffers, slots):
            """leaves: of the layer, where its experts have biases."""
            bias = None
            if kind.has_biases:
                layer = nnx.merge(kind.graphdef, jax.tree.unflatten(kind.treedef, leaves))
                bias = layer.mlp.expert_bias
            h, x, ids, weights = buffers
            streamed = StreamedExperts(slots, self._router.num_experts, groups, ring)
            h, x = streamed.add_to(
                h,
                x,
                ids,
                weights,
                activation=activation,
                biases=None if bias is None else (bias.gate[...], bias.up[...]),
            )
            return h, x, ids, weights

        def hold(slot, buffers):
            return ring.acquire(slot, *buffers)

        def let_go(slot, buffers):
            return ring.release(slot, *buffers)

        self._embed = jax.jit(embed)
        self._hold = jax.jit(hold, static_argnums=0, donate_argnums=1)
        self._let_go = jax.jit(let_go, static_argnums=0, donate_argnums=1)
        # Apart from the buffers, whose size varies, so that the large programs are compiled once.
        self._take = jax.jit(take)
        self._put = jax.jit(put, donate_argnums=0)
        self._chunk = jax.jit(chunk, static_argnums=(0, 1), donate_argnums=(3, 4))
        self._experts = jax.jit(experts, static_argnums=0, donate_argnums=2)

    @property
    def max_tokens(self) -> int:
        """Of a prompt, in one pass over the weights."""
        return self._plan.max_tokens

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def close(self) -> None:
        """Drops the weights, the compiled programs that name the ring, and the ring."""
        programs: tuple[Any, ...] = (self._embed, self._take, self._put)
        for program in programs:
            program.clear_cache()
        self._compiled.clear()
        self._layers.clear()
        self._embed_leaves.clear()
        self._ring.close()

    def layers(
        self, row: StepRow, caches: Callable[[], list[tuple[jax.Array, ...]]]
    ) -> Generator[int, None, jax.Array]:
        """Computes all tokens of `row`, at most `plan.max_tokens`, a layer at each `next`.

        Closing the generator early ends the run: the loader stops, memory is given back.

        Args:
            caches: the page arrays of every layer as they are now; a layer's are replaced in the
                list when it is computed. Between two layers other programs may use and replace
                them.

        Yields how many layers are done; returns the residual stream of the last token, `[1, D]`.

        Raises: ffi.registry.NATIVE_ERRORS where loading failed. The caches are whole then.
        """
        plan, num_tokens = self._plan, len(row.token_ids)
        assert 0 < num_tokens <= plan.max_tokens, (num_tokens, plan.max_tokens)
        size = plan.buffer_tokens(num_tokens)
        tokens = np.zeros(size, np.int32)
        tokens[:num_tokens] = row.token_ids
        steps = self._steps(row)
        slots = tuple(self._ring.groups)
        # Before weights are on their way: a ring that waits for a compiler looks stuck.
        self._prepare(size, steps, slots, caches())
        self._ring.start()
        try:
            buffers = self._buffers(tokens)
            for i, (kind, leaves) in enumerate(self._layers):
                slot = self._weight_slots[i]
                if slot is not None:
                    buffers = self._compiled["hold", slot, size](buffers)
                for begin, context, step in steps:
                    part = self._take(buffers[0], begin)
                    program = self._compiled[kind, context]
                    part, taken, cache = program(leaves, part, caches()[i], step)
                    caches()[i] = cache
                    buffers = self._put(buffers, begin, part, taken)
                if slot is not None and not kind.has_biases:
                    buffers = self._compiled["let go", slot, size](buffers)
                if kind.is_moe:
                    biases = leaves if kind.has_biases else []
                    buffers = self._compiled[kind, "experts", size](biases, buffers, slots)
                if slot is not None and kind.has_biases:
                    buffers = self._compiled["let go", slot, size](buffers)
                # Here a failed load shows, before the next layer's cache depends on it.
                jax.block_until_ready(buffers)
                yield i + 1
            last = buffers[0][num_tokens - 1 : num_tokens]
            self._ring.finish()
        except BaseException as error:
            self._ring.abort(f"{type(error).__name__}: {error}")
            raise
        return last

    def prefill(self, row: StepRow, caches: Callable[[], list[tuple[jax.Array, ...]]]) -> jax.Array:
        """All layers at once."""
        run = self.layers(row, caches)
        while True:
            try:
                next(run)
            except StopIteration as end:
                return end.value

    def _prepare(
        self,
        size: int,
        steps: Sequence[tuple[np.int32, int, StepInputs]],
        slots: tuple[ExpertGroup, ...],
        caches: Sequence[tuple[jax.Array, ...]],
    ) -> None:
        """Compiles what a prompt in buffers of `size` tokens needs and was not compiled yet."""
        sharding = jax.sharding.SingleDeviceSharding(self._device)

        def like(rows: int, columns: int, dtype: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((rows, columns), dtype, sharding=sharding)

        per_token = self._router.experts_per_token
        part = like(self._plan.chunk_tokens, self._hidden, jnp.float32)
        buffers = (
            like(size, self._hidden, jnp.float32),
            like(size, self._hidden, self._dtype),
            like(size, per_token, jnp.int32),
            like(size, per_token, jnp.float32),
        )
        missing: dict[tuple[Any, ...], Any] = {}
        for (kind, leaves), cache in zip(self._layers, caches, strict=True):
            for _, context, step in steps:
                missing[kind, context] = partial(
                    self._chunk.lower, kind, context, leaves, part, cache, step
                )
            if kind.is_moe:
                biases = leaves if kind.has_biases else []
                missing[kind, "experts", size] = partial(
                    self._experts.lower, kind, biases, buffers, slots
                )
        for slot in {slot for slot in self._weight_slots if slot is not None}:
            missing["hold", slot, size] = partial(self._hold.lower, slot, buffers)
            missing["let go", slot, size] = partial(self._let_go.lower, slot, buffers)
        missing = {key: lower for key, lower in missing.items() if key not in self._compiled}
        if not missing:
            return
        self.on_compile(True)
        for key, lower in missing.items():
            self._compiled[key] = lower().compile()
        self.on_compile(False)

    def _buffers(self, tokens: np.ndarray) -> Buffers:
        """The embedded tokens, and room for what the experts need of them."""
        size, per_token = len(tokens), self._router.experts_per_token
        h = self._embed(self._embed_leaves, jax.device_put(tokens, self._embed_device))
        h = jax.device_put(h, self._device)
        with jax.default_device(self._device):
            return (
                h,
                jnp.zeros((size, self._hidden), self._dtype),
                jnp.full((size, per_token), -1, jnp.int32),
                jnp.zeros((size, per_token), jnp.float32),
            )

    def _steps(self, row: StepRow) -> list[tuple[np.int32, int, StepInputs]]:
        """(first token, context bucket, inputs) of every chunk."""
        out = []
        size = self._plan.chunk_tokens
        for begin in range(0, len(row.token_ids), size):
            tokens = row.token_ids[begin : begin + size]
            part = dataclasses.replace(row, token_ids=tokens, start=row.start + begin)
            tables = BlockTables(row.slot + 1, self._pages)
            tables.assign(row.slot)
            step = pack_step([part], tables, size, 1, self._page_size)
            end = part.start + len(tokens)
            steps = -(-end // _CONTEXT_STEP)
            context = next(n for n in LADDER if n >= steps) * _CONTEXT_STEP
            context = min(context, self._pages * self._page_size)
            out.append((np.int32(begin), context, jax.device_put(step, self._device)))
        return out
