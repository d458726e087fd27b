"""Stream-loading prefill of one prompt on R devices of a host (paper section 3.2).

As prefill/slp.py, with every rank holding a part of the tokens and streaming a part of the experts.
A layer is: *keys* of all tokens, chunk by chunk; *chunk*: attention, whose keys go round the ring
(attention/zigzag.py), router, dense MLP or shared experts; then the routed experts between the two
halves of an exchange (moe/small_ep.py). Weights beside the routed experts are on all devices.

No program that may fail on one rank has a collective in it: one whose weights could not be loaded
would leave the others waiting for it, on a GPU for ever. So the experts are a program of their own,
whose end on all ranks is awaited before the sums are exchanged; the loaders run on meanwhile.

New keys go to the decode device's pages layer by layer, while later layers are computed; what of
the prompt was cached there already comes from it, a share for each rank.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxmoe.attention.zigzag import Cut, Held, KeysOps, Parts, RingOps, chunk_length, deal
from jaxmoe.decode.batch import StepRow
from jaxmoe.ffi.device_driver import Device
from jaxmoe.ffi.ops import Ops, StepInputs
from jaxmoe.ffi.reference import kv_write
from jaxmoe.ffi.registry import NATIVE_ERRORS
from jaxmoe.kernels.experts import ExpertGroup
from jaxmoe.models.decoder import Decoder
from jaxmoe.moe.deferred import DeferredOps
from jaxmoe.moe.experts_streamed import GroupExperts, Ring, StreamedExperts
from jaxmoe.moe.moe_block import MoeBlock
from jaxmoe.moe.small_ep import Exchange, most_experts
from jaxmoe.prefill.dslp_plan import DslpPlan
from jaxmoe.prefill.layer_kinds import LayerKind, layers_by_kind
from jaxmoe.prefill.plan import LADDER

# Prefixes are compiled for in multiples of this many positions, those of the ladder.
_PREFIX_STEP = 1024

Cache = tuple[jax.Array, ...]


class LoadingRings(Ring, Protocol):
    """The devices' rings as this module drives them (prefill/rank_rings.py)."""

    @property
    def groups(self) -> Sequence[ExpertGroup]: ...
    def start(self) -> None: ...
    def finish(self) -> None: ...
    def abort(self, cause: str) -> None: ...
    def close(self) -> None: ...


@dataclasses.dataclass
class _Prompt:
    """A prompt as it lies on the ranks.

    where: `[R rows]` position of each row's token, -1 for padding, sharded; begins: first rows of
    the chunks that have tokens. slots: of each rank, where its rows go in the cache, -1 for
    padding. pages: of the prefix, None without one. last: (rank, row) of the last token.
    """

    rows: int
    tokens: jax.Array
    where: jax.Array
    cut: Cut
    begins: list[np.int32]
    slots: list[jax.Array]
    pages: jax.Array | None
    last: tuple[int, int]


class DslpPrefill:
    """Owns the programs and the rings; the weights stay the caller's.

    Args:
        graphdef, state: the split model, its arrays on all devices of `mesh`.
        mesh: of one axis.
        home: the device whose pages the keys go to.
        ops, parts: the operations of each device, and of attention over a piece of keys.
        rings: of the experts.
        plan: what they and the buffers were sized by.
        exchange: of tokens between the ranks.
        groups: how a group's experts are computed.

    on_compile: may be set; called with True before programs are compiled, and with False after.
    """

    def __init__(
        self,
        graphdef: Any,
        state: Any,
        mesh: Mesh,
        home: Device,
        ops: Ops,
        parts: Parts,
        rings: LoadingRings,
        plan: DslpPlan,
        *,
        exchange: Exchange,
        groups: GroupExperts,
        page_size: int,
    ) -> None:
        model = nnx.merge(graphdef, state)
        assert isinstance(model, Decoder)
        (self._axis,) = mesh.axis_names
        self._mesh, self._home, self._rings, self._plan = mesh, home, rings, plan
        self._ops, self._parts, self._exchange, self._groups = ops, parts, exchange, groups
        self._page_size = page_size
        self._dtype, self._hidden = model.compute_dtype, model.config.hidden_size
        self._router = model.config.moe.router
        self._layers = layers_by_kind(model)
        embed_graphdef, embed_state = nnx.split(model.embedding)
        self._embed_leaves, embed_treedef = jax.tree.flatten(embed_state)
        self._compiled: dict[tuple[Any, ...], Any] = {}
        self.on_compile: Callable[[bool], None] = lambda begins: None

        def embed(leaves, token_ids):
            embedding = nnx.merge(embed_graphdef, jax.tree.unflatten(embed_treedef, leaves))
            rows, per_token = token_ids.shape[0], self._router.experts_per_token
            return (
                embedding(token_ids),
                jnp.zeros((rows, self._hidden), self._dtype),
                jnp.full((rows, per_token), -1, jnp.int32),
                jnp.zeros((rows, per_token), jnp.float32),
            )

        self._embed_local = embed

    @property
    def max_tokens(self) -> int:
        """Of a prompt, in one pass over the weights."""
        return self._plan.max_tokens

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def programs(self) -> dict[tuple[Any, ...], Any]:
        """What was compiled so far, by name, kind and sizes."""
        return dict(self._compiled)

    def on_rings(self, rings: LoadingRings) -> DslpPrefill:
        """The same programs on other rings: for benchmarks, on weights that lie there already."""
        other = copy.copy(self)
        other._rings, other._compiled = rings, {}
        return other

    def close(self) -> None:
        """Drops the weights, the compiled programs that name the rings, and the rings."""
        self._compiled.clear()
        self._layers.clear()
        self._embed_leaves.clear()
        self._rings.close()

    def layers(
        self, row: StepRow, caches: Callable[[], list[Cache]]
    ) -> Generator[int, None, jax.Array]:
        """Computes all tokens of `row`, at most `max_tokens`, a layer at each `next`.

        As `SlpPrefill.layers`; the page arrays are the home device's.
        """
        assert 0 < len(row.token_ids) <= self.max_tokens, (len(row.token_ids), self.max_tokens)
        prompt = self._lay_out(row)
        slots = tuple(self._rings.groups)
        # Before weights are on their way: a ring that waits for a compiler looks stuck.
        self._prepare(prompt, slots, caches())
        get, rows = self._compiled, prompt.rows
        self._rings.start()
        y = None
        try:
            buffers = get["embed", rows](self._embed_leaves, prompt.tokens)
            for i, (kind, leaves) in enumerate(self._layers):
                held = self._keys(kind, leaves, buffers[0], prompt, caches, i)
                for begin in prompt.begins:
                    program = get["chunk", kind, rows, self._prefix_rows(prompt)]
                    buffers = program(leaves, buffers, held, prompt.where, begin, prompt.cut)
                if kind.is_moe:
                    sent = get["send", rows](*buffers[1:])
                    y, passed = get["experts", kind, rows](
                        leaves, sent.x, sent.expert_ids, sent.combine_weights, slots
                    )
                    # Here a failed load shows, while no rank waits for another.
                    jax.block_until_ready(y)
                    buffers = (get["back", rows](buffers[0], y, sent.kept), *buffers[1:])
                    # The plan has room for what is exchanged once, not for the next layer's beside.
                    del sent, passed
                    y = None
                jax.block_until_ready(buffers)
                yield i + 1
            last = self._last(buffers[0], prompt)
            self._rings.finish()
        except BaseException as error:
            self._rings.abort(f"{type(error).__name__}: {error}")
            _wait_for_all(y)
            raise
        return last

    def prefill(self, row: StepRow, caches: Callable[[], list[Cache]]) -> jax.Array:
        """All layers at once."""
        run = self.layers(row, caches)
        while True:
            try:
                next(run)
            except StopIteration as end:
                return end.value

    def _keys(
        self,
        kind: LayerKind,
        leaves: list[jax.Array],
        h: jax.Array,
        prompt: _Prompt,
        caches: Callable[[], list[Cache]],
        i: int,
    ) -> Held:
        """What the ranks bring to the ring; the new keys are on their way to the cache too."""
        get, rows = self._compiled, prompt.rows
        prefix = ()
        if prompt.pages is not None:
            fetched = get["fetch", self._prefix_rows(prompt)](caches()[i], prompt.pages)
            prefix = jax.device_put(fetched, self._sharded)
        new = get["empty", rows]()
        for begin in prompt.begins:
            new = get["keys", kind, rows](leaves, h, new, prompt.where, begin)
        cache = caches()[i]
        for rank, device in enumerate(self._devices):
            part = tuple(jax.device_put(_shard(a, device), self._home) for a in new)
            cache = get["insert", rows](cache, part, prompt.slots[rank])
        caches()[i] = cache
        return Held(new, prefix)

    def _last(self, h: jax.Array, prompt: _Prompt) -> jax.Array:
        rank, row = prompt.last
        part = _shard(h, self._devices[rank])[row : row + 1]
        return jax.device_put(part, self._home)

    @property
    def _devices(self) -> list[Device]:
        return list(self._mesh.devices.flat)

    @property
    def _sharded(self) -> NamedSharding:
        return NamedSharding(self._mesh, PartitionSpec(self._axis))

    def _prefix_rows(self, prompt: _Prompt) -> int:
        """Of the arrays that hold the prefix, on all ranks."""
        if prompt.pages is None:
            return 0
        positions, ranks = prompt.pages.shape[0] * self._page_size, len(self._devices)
        return positions // ranks * ranks

    def _lay_out(self, row: StepRow) -> _Prompt:
        num_tokens, ranks, size = len(row.token_ids), len(self._devices), self._page_size
        rows, length = self._plan.rows(num_tokens), chunk_length(num_tokens, ranks)
        index = deal(num_tokens, ranks, rows)
        there = index >= 0
        where = np.where(there, row.start + index, -1).astype(np.int32)
        tokens = np.where(there, np.asarray(row.token_ids, np.int32)[index], 0)
        table = np.asarray(row.pages, np.int32)
        slots = np.where(there, table[where // size] * size + where % size, -1).astype(np.int32)
        pages = None
        if row.start:
            steps = -(-row.start // _PREFIX_STEP)
            positions = next(n for n in LADDER if n >= steps) * _PREFIX_STEP
            # Whole pages, as many as leave every rank the same number of positions or more.
            pages = np.zeros(-(-(positions + ranks) // size), np.int32)
            used = -(-row.start // size)
            pages[:used] = table[:used]
            pages = jax.device_put(pages, self._home)
        rank, at = np.argwhere(index == num_tokens - 1)[0]
        whole = NamedSharding(self._mesh, PartitionSpec())
        cut = Cut(*(np.int32(n) for n in (row.start, num_tokens, length)))  # pyright: ignore
        return _Prompt(
            rows,
            jax.device_put(tokens.reshape(-1), self._sharded),
            jax.device_put(where.reshape(-1), self._sharded),
            jax.device_put(cut, whole),
            [np.int32(b) for b in range(0, 2 * length, self._plan.rank.chunk_tokens)],
            [jax.device_put(slots[r], self._home) for r in range(ranks)],
            pages,
            (int(rank), int(at)),
        )

    def _prepare(self, prompt: _Prompt, slots: Any, caches: Sequence[Cache]) -> None:
        """Compiles what the prompt needs and was not compiled yet."""
        wanted = self.lower(prompt, slots, caches)
        missing = {key: lower for key, lower in wanted.items() if key not in self._compiled}
        if not missing:
            return
        self.on_compile(True)
        for key, lower in missing.items():
            self._compiled[key] = lower().compile()
        self.on_compile(False)

    def lower(
        self, prompt: _Prompt, slots: Any, caches: Sequence[Cache]
    ) -> dict[tuple[Any, ...], Callable[[], Any]]:
        """What a prompt needs, by name, kind and sizes; each is lowered when it is called.

        Shapes do for `slots`, `caches` and the prompt's arrays.
        """
        rows, prefix_rows = prompt.rows, self._prefix_rows(prompt)
        ranks, per_token = len(self._devices), self._router.experts_per_token

        def like(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=self._sharded)

        def keys_like(count: int) -> Any:
            return tuple(like((count, *a.shape[2:]), a.dtype) for a in caches[0])

        def part_like(count: int) -> Any:
            home = SingleDeviceSharding(self._home)
            return tuple(
                jax.ShapeDtypeStruct((count, *a.shape[2:]), a.dtype, sharding=home)
                for a in caches[0]
            )

        def routed_like(count: int) -> tuple[Any, ...]:
            return (
                like((count, self._hidden), self._dtype),
                like((count, per_token), jnp.int32),
                like((count, per_token), jnp.float32),
            )

        h = like((ranks * rows, self._hidden), jnp.float32)
        buffers = h, *routed_like(ranks * rows)
        new = keys_like(ranks * rows)
        held = Held(new, keys_like(prefix_rows) if prefix_rows else ())
        begin, where, cut = np.int32(0), prompt.where, prompt.cut
        send, back = self._mapped_send(), self._mapped_back()
        kept: Any = None
        wanted: dict[tuple[Any, ...], Callable[[], Any]] = {
            ("embed", rows): lambda: self._mapped_embed().lower(self._embed_leaves, prompt.tokens),
            ("empty", rows): lambda: jax.jit(
                lambda: tuple(jnp.zeros(a.shape, a.dtype) for a in new),
                out_shardings=self._sharded,
            ).lower(),
            ("insert", rows): lambda: jax.jit(_insert, donate_argnums=0).lower(
                caches[0], part_like(rows), prompt.slots[0]
            ),
        }
        if prefix_rows:
            wanted["fetch", prefix_rows] = lambda: jax.jit(_fetch, static_argnums=2).lower(
                caches[0], prompt.pages, prefix_rows
            )
        for kind, leaves in self._layers:
            wanted["keys", kind, rows] = lambda kind=kind, leaves=leaves: self._mapped_keys(
                kind
            ).lower(leaves, h, new, where, begin)
            wanted["chunk", kind, rows, prefix_rows] = lambda kind=kind, leaves=leaves: (
                self._mapped_chunk(kind).lower(leaves, buffers, held, where, begin, cut)
            )
            if not kind.is_moe:
                continue
            sent: Any = jax.tree.map(
                lambda a: like(a.shape, a.dtype), jax.eval_shape(send, *buffers[1:])
            )
            kept, x = sent.kept, sent.x
            wanted["send", rows] = lambda: send.lower(*buffers[1:])
            wanted["experts", kind, rows] = lambda kind=kind, leaves=leaves, sent=sent: (
                self._mapped_experts(kind).lower(
                    leaves, sent.x, sent.expert_ids, sent.combine_weights, slots
                )
            )
            y = like(x.shape, jnp.float32)
            wanted["back", rows] = lambda y=y, kept=kept: back.lower(h, y, kept)
        return wanted

    # The programs: what each rank does with its own arrays; leaves and scalars are the same on all.

    def _mapped(self, f: Any, whole: Sequence[bool], donate: tuple[int, ...] = ()) -> Any:
        """whole: which arguments are the same on all ranks."""
        one = PartitionSpec(self._axis)
        specs = tuple(PartitionSpec() if w else one for w in whole)
        # Kernels and foreign calls do not say how their results vary over the mesh.
        mapped = jax.shard_map(f, mesh=self._mesh, in_specs=specs, out_specs=one, check_vma=False)
        return jax.jit(mapped, donate_argnums=donate)

    def _mapped_embed(self) -> Any:
        return self._mapped(self._embed_local, (True, False))

    def _step(self, where: jax.Array, begin: jax.Array) -> StepInputs:
        at = jax.lax.dynamic_slice_in_dim(where, begin, self._plan.rank.chunk_tokens)
        none = jnp.full_like(at, -1)
        return StepInputs(
            token_ids=jnp.zeros_like(at),
            positions=jnp.maximum(at, 0),
            token_rows=jnp.where(at < 0, -1, 0),
            kv_slots=none,
            block_tables=none[None, :1],
        )

    def _take(self, h: jax.Array, begin: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(h, begin, self._plan.rank.chunk_tokens)

    def _mapped_keys(self, kind: LayerKind) -> Any:
        def keys(leaves, h, new, where, begin):
            ops: Any = KeysOps(self._ops)
            kind.layer(leaves).attend(
                self._take(h, begin), (), self._step(where, begin), ops, self._dtype
            )
            return tuple(_put(old, begin, part) for old, part in zip(new, ops.taken, strict=True))

        return self._mapped(keys, (True, False, False, False, True), donate=(2,))

    def _mapped_chunk(self, kind: LayerKind) -> Any:
        ranks = len(self._devices)

        def chunk(leaves, buffers, held, where, begin, cut):
            layer, step = kind.layer(leaves), self._step(where, begin)
            ring: Any = RingOps(self._ops, self._parts, held, cut, self._axis, ranks)
            part, _, _ = layer.attend(self._take(buffers[0], begin), (), step, ring, self._dtype)
            deferred: Any = DeferredOps(ring)
            part = layer.feed_forward(part, step.token_rows >= 0, deferred, self._dtype)
            parts = part, *deferred.taken
            return (
                *(_put(old, begin, new) for old, new in zip(buffers, parts, strict=False)),
                *buffers[len(parts) :],
            )

        return self._mapped(chunk, (True, False, False, False, True, True), donate=(1,))

    def _mapped_send(self) -> Any:
        return self._mapped(self._exchange.send, (False,) * 3)

    def _mapped_experts(self, kind: LayerKind) -> Any:
        experts = self._router.num_experts
        most = most_experts(experts, len(self._devices))

        def compute(leaves, x, ids, weights, slots):
            block = kind.layer(leaves).mlp
            assert isinstance(block, MoeBlock)
            biases = None
            if block.expert_bias is not None:
                first = self._exchange.first_expert()

                def own(bias: jax.Array) -> jax.Array:
                    return jax.lax.dynamic_slice_in_dim(
                        jnp.pad(bias, ((0, 1), (0, 0))), first, most
                    )

                biases = own(block.expert_bias.gate[...]), own(block.expert_bias.up[...])
            streamed = StreamedExperts(slots, most, self._groups, self._rings)
            return streamed.add_to(
                jnp.zeros(x.shape, jnp.float32),
                x,
                ids,
                weights,
                activation=block.config.activation,
                biases=biases,
            )

        return self._mapped(compute, (True, False, False, False, False), donate=(1,))

    def _mapped_back(self) -> Any:
        return self._mapped(
            lambda h, y, kept: h + self._exchange.back(y, kept), (False,) * 3, donate=(0,)
        )


def _put(old: jax.Array, begin: jax.Array, new: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), begin, axis=0)


def _insert(cache: Cache, new: Cache, slots: jax.Array) -> Cache:
    return tuple(kv_write(pages, rows, slots) for pages, rows in zip(cache, new, strict=True))


def _fetch(cache: Cache, page_ids: jax.Array, num_rows: int) -> Cache:
    """The first `num_rows` positions of the pages, side by side."""
    return tuple(a[page_ids].reshape(-1, *a.shape[2:])[:num_rows] for a in cache)


def _shard(array: jax.Array, device: Device) -> jax.Array:
    """What lies on the device, as it is."""
    return next(s.data for s in array.addressable_shards if s.device == device)


def _wait_for_all(array: jax.Array | None) -> None:
    """Until no device computes it any more, whatever becomes of it."""
    for shard in () if array is None else array.addressable_shards:
        try:
            shard.data.block_until_ready()
        except NATIVE_ERRORS:
            pass
