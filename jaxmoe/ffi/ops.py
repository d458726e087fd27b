"""The operations a model's layers are written against, and nothing else they may call.

`Ops` is the seam between model text and machine: `NativeOps` (ffi/native_ops.py) reaches the CPU
kernels through XLA FFI, `ReferenceOps` (ffi/reference.py) says the same in jnp. The reference is
the oracle of every kernel, what other platforms lower to, and what the demo model is trained with
(it has gradients).

Shapes use the letters of common/dims.py. T is the number of tokens packed in a step, from any
number of sequences; rows of padding have `token_rows == -1`, `kv_slots == -1` and expert ids of -1:
they cost no weight bytes and produce zeros.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp

from jaxmoe.config.model_config import ClampedSwiglu, GatedDeltaConfig
from jaxmoe.quant.formats import WeightFormat, format_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Weight:
    """A linear map's weights as they lie in the checkpoint, row-major, outputs first.

    data: `[N, K]`, of four-bit formats uint8 `[N, K/2]`; per-head maps have a leading G.
    scale_inv: multiply to dequantize; with a leading G too. None for bfloat16 and float32.
    quant/formats.py has the types and shapes of every format.
    """

    data: jax.Array
    scale_inv: jax.Array | None = None

    @property
    def format(self) -> WeightFormat:
        """What types and shapes say. ValueError where they are those of no format."""
        scale = self.scale_inv
        return format_of(
            self.data.dtype.name,
            self.data.shape,
            None if scale is None else scale.dtype.name,
            None if scale is None else scale.shape,
        )

    @property
    def num_columns(self) -> int:
        """K: the inputs of the map."""
        return self.data.shape[-1] * (2 if self.data.dtype == jnp.uint8 else 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class GatedDeltaWeights:
    """The small weights of linear attention, float32: conv `[W, C]`, oldest token first, a_log and
    dt_bias `[HV]`.
    """

    conv: jax.Array
    a_log: jax.Array
    dt_bias: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class StepInputs:
    """What a step needs to know about its T packed tokens. All int32; padding as said above.

    token_ids, positions, token_rows, kv_slots: `[T]`. `token_rows` indexes `block_tables`;
    `kv_slots` is the flat cache slot (page * page_size + offset) the token's key and value are
    written to. block_tables: `[R, MP]` page ids of each row, -1 where unused.

    For models with recurrent state, else None. A row's tokens then lie side by side, at positions
    one after the other. state_from, state_to: `[R]` slots of the state arrays that a row's state is
    read from and written to: its own, or at first that of a kept state; -1 where unused.
    state_saves: `[T]` slots that the state after a token is kept in too, -1 for nowhere. A token at
    position 0 starts from zeros, whatever its slot holds.

    selected: within a step, what the last indexer chose (`Ops.select`), for layers without one.
    """

    token_ids: jax.Array
    positions: jax.Array
    token_rows: jax.Array
    kv_slots: jax.Array
    block_tables: jax.Array
    state_from: jax.Array | None = None
    state_to: jax.Array | None = None
    state_saves: jax.Array | None = None
    selected: jax.Array | None = None


# Moments of a compiled step that figures of where its time goes are told by.
Point = Literal["begin", "logits", "end"]


class Ops(Protocol):
    def mark(self, x: jax.Array, point: Point) -> jax.Array:
        """`x` itself; says, when it is ready, that the program has come to this point."""
        ...

    @property
    def expands_latents(self) -> bool:
        """Whether MLA calls `attend_latents` instead of `attend`."""
        ...

    @property
    def splits_experts(self) -> bool:
        """Whether `experts_submit` and `experts_wait` are better than `experts` where there is
        something to compute between the two.
        """
        ...

    def map_rows(self, f: Callable[[Any], Any], x: Any) -> Any:
        """`f` of every row of the arrays `[T, ...]` in `x`, stacked: for all but single operations.

        XLA orders the sums of a reduction, and may choose how it computes functions such as rsqrt
        or exp, by the size of the whole array, so that a token's last bits would depend on how many
        others are in its step. Native operations see to it that they do not; where nothing hangs on
        it, rows are computed together.
        """
        ...

    def linear(self, x: jax.Array, w: Weight, out_dtype: jnp.dtype | None = None) -> jax.Array:
        """`[T, K] -> [T, N]`: y = x Wᵀ, FP32 accumulation; result dtype defaults to x's."""
        ...

    def head_linear(self, x: jax.Array, w: Weight, out_dtype: jnp.dtype | None = None) -> jax.Array:
        """`[T, G, K] -> [T, G, N]`: one map `[N, K]` per head, `w.data [G, N, K]`."""
        ...

    def experts(
        self,
        x: jax.Array,
        expert_ids: jax.Array,
        combine_weights: jax.Array,
        moe_layer_idx: int,
        *,
        activation: ClampedSwiglu | None = None,
        biases: tuple[jax.Array, jax.Array] | None = None,
    ) -> jax.Array:
        """Routed experts of `x [T, D]`: `expert_ids [T, A]` int32, `combine_weights [T, A]` f32.

        Returns f32 `[T, D]`: sum over a of combine_weights * down(silu(gate(x)) * up(x)). The
        weights of layer `moe_layer_idx` (0-based among the MoE layers) come from the store the ops
        object was made with. `activation` replaces silu(gate) * up; `biases`, float32 `[E, F]`
        each, are added to gate and up before it.
        """
        ...

    def experts_submit(
        self,
        x: jax.Array,
        expert_ids: jax.Array,
        combine_weights: jax.Array,
        moe_layer_idx: int,
        *others: jax.Array,
        slot: int = 0,
        activation: ClampedSwiglu | None = None,
        biases: tuple[jax.Array, jax.Array] | None = None,
    ) -> tuple[jax.Array, ...]:
        """Starts what `experts` computes; returns `(ticket, *others)`.

        `others` are passed through in place: what is computed from them comes after the start. An
        array that is also another operand of the call costs a copy. Calls outstanding at once in a
        program each have their own `slot`. Biases must be constants of the layer (weights). The
        ticket is good for one wait; what it is made of is the platform's affair.
        """
        ...

    def experts_wait(
        self, ticket: jax.Array, num_tokens: int, hidden: int, *others: jax.Array, slot: int = 0
    ) -> tuple[jax.Array, ...]:
        """Ends what `experts_submit` started: `(y, *others)`, y f32 `[T, D]`, the bits of
        `experts`. `others` are computed before the wait.
        """
        ...

    def attend(
        self,
        q: jax.Array,
        k_new: jax.Array,
        v_new: jax.Array | None,
        cache: tuple[jax.Array, ...],
        step: StepInputs,
        *,
        scale: float,
        v_dim: int,
        window: int | None = None,
        sinks: jax.Array | None = None,
        selected: jax.Array | None = None,
        num_selected: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Causal attention of T packed tokens over their own sequences' paged cache.

        Writes `k_new [T, K, H]` (and `v_new [T, K, Hv]`) to the cache at `step.kv_slots`, then lets
        each token attend positions 0..its own. `q [T, N, H]`; heads n of group n // (N / K) share
        KV head. `cache` is `(k_pages [P, Z, K, H], v_pages [P, Z, K, Hv])`, or `(k_pages,)` when
        v_new is None: values are then the first `v_dim` elements of the keys (MLA's latent cache).
        With a `window`, a token attends its last `window` positions only, its own among them.
        `sinks [N]` float32 are scores of one more position each head sees, which has no value.
        With `selected`, what `select` returned, a token attends those positions only; with
        `num_selected [T]` too, the first so many of its row of any list of flat slots `[T, L]`.
        `k_new` and `step.kv_slots` may then have more rows than there are tokens.
        Softmax in FP32. Returns f32 `[T, N, v_dim]` and the updated cache (same buffers where the
        platform can alias them).
        """
        ...

    def select(
        self,
        q: jax.Array,
        head_weights: jax.Array,
        k_new: jax.Array,
        pages: jax.Array,
        step: StepInputs,
        *,
        top_k: int,
    ) -> tuple[jax.Array | None, jax.Array]:
        """The `top_k` positions each of T packed tokens is to attend, of those up to its own.

        Writes `k_new [T, 1, H]` to the indexer's `pages [P, Z, 1, H]` at `step.kv_slots`. A
        position's score is the sum over N heads of head_weights * max(0, q · key): `q [T, N, H]`,
        `head_weights [T, N]` float32. Of equal scores the lower position is taken.

        Returns int32 `[T, top_k]` flat cache slots in ascending order of their positions, -1 after
        the last, or None where a row has no more than `top_k` positions, and the pages.
        """
        ...

    def attend_latents(
        self,
        q: jax.Array,
        k_new: jax.Array,
        cache: tuple[jax.Array, ...],
        step: StepInputs,
        *,
        w_uk: Weight,
        w_uv: Weight,
        scale: float,
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """MLA of one sequence with keys and values made from the latents of the cache.

        `q [T, N, nope + rope]`; `k_new [T, 1, C + rope]`, latent and rotated key, is written to the
        cache. `w_uk [N, C, nope]`, `w_uv [N, v, C]`. Returns f32 `[T, N, v]` and the cache. Only
        where `expands_latents`, and never with selected positions.
        """
        ...

    def gated_delta(
        self,
        qkv: jax.Array,
        decay_input: jax.Array,
        rate_input: jax.Array,
        weights: GatedDeltaWeights,
        cache: tuple[jax.Array, ...],
        step: StepInputs,
        config: GatedDeltaConfig,
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Causal convolution and gated delta rule of T packed tokens over their rows' states.

        `qkv [T, C]` float32: a token's query, key `[HK * K]` and value `[HV * V]` before the
        convolution. `decay_input`, `rate_input`: float32 `[T, HV]`. `cache`: float32 conv_state
        `[S, W - 1, C]`, the last inputs of the convolution, oldest first, and delta_state
        `[S, HV, K, V]`. For a token, with the state M of each value head and q, k, v after
        convolution and silu, q and k of length 1 and q divided by sqrt(K):

            M = exp(-exp(a_log) softplus(decay_input + dt_bias)) M
            M = M + k ⊗ sigmoid(rate_input) (v - kᵀ M)        out = qᵀ M

        Token by token, so a result is the same however a text is cut into steps. Returns f32
        `[T, HV, V]`, zeros for padding, and the updated cache.
        """
        ...
