"""The project's Flax decoder, made trainable: float32 master weights, differentiable operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmoe.config.model_config import ClampedSwiglu, ModelConfig
from jaxmoe.ffi.ops import StepInputs, Weight
from jaxmoe.ffi.reference import BatchedSequenceOps, dequantize
from jaxmoe.models.decoder import Decoder
from jaxmoe.weights.param_spec import describe

Params = dict[str, jax.Array]  # the decoder's leaves, and experts.{m}.{gate,up,down} [E, ...]
Dropout = Callable[[jax.Array], jax.Array]
_WHICH = ("gate", "up", "down")


class TrainingOps(BatchedSequenceOps):
    """`Ops` on whole sequences, each product in the dtype of its activations with FP32 sums.

    With few experts it is cheapest to compute all of them for all tokens as three large products.
    `loads` collects, per MoE layer, how many tokens chose each expert: `[E]`.
    """

    def __init__(
        self,
        experts: list[dict[str, Weight]],
        num_sequences: int,
        precision: jax.lax.Precision = jax.lax.Precision.DEFAULT,
    ):
        super().__init__(experts, num_sequences)
        self._precision = precision
        self.loads: list[jax.Array] = []

    def _einsum(self, spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
        # A float32 activation means the caller cares (the router does).
        precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else self._precision
        y = y.astype(x.dtype)
        if jax.default_backend() == "cpu":  # which lacks some bfloat16 products
            x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        return jnp.einsum(spec, x, y, precision=precision, preferred_element_type=jnp.float32)

    def linear(self, x: jax.Array, w: Weight, out_dtype: jnp.dtype | None = None) -> jax.Array:
        return self._einsum("tk,nk->tn", x, dequantize(w)).astype(out_dtype or x.dtype)

    def head_linear(self, x: jax.Array, w: Weight, out_dtype: jnp.dtype | None = None) -> jax.Array:
        return self._einsum("tgk,gnk->tgn", x, dequantize(w)).astype(out_dtype or x.dtype)

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
        assert activation is None and biases is None, "the demo's experts are plain SwiGLU"
        gate, up, down = (dequantize(self._experts[moe_layer_idx][which]) for which in _WHICH)
        chosen = expert_ids[:, :, None] == jnp.arange(gate.shape[0])  # [T, A, E]
        self.loads.append(chosen.sum((0, 1)))
        share = jnp.where(chosen, combine_weights[:, :, None], 0.0).sum(1)  # [T, E]
        h = jax.nn.silu(self._einsum("td,efd->tef", x, gate)) * self._einsum("td,efd->tef", x, up)
        return self._einsum("tef,edf->td", (h * share[:, :, None]).astype(x.dtype), down)

    def attend(
        self,
        q: jax.Array,
        k_new: jax.Array,
        v_new: jax.Array | None,
        cache: tuple[jax.Array, ...],
        step: StepInputs | None,
        *,
        scale: float,
        v_dim: int,
        window: int | None = None,
        sinks: jax.Array | None = None,
        selected: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        assert window is None and sinks is None and selected is None, "the demo sees everything"
        assert v_new is None and k_new.shape[1] == 1, "the demo has one latent key a token"
        num_tokens, num_heads, _ = q.shape
        q, k = (a.reshape(self._num_sequences, -1, *a.shape[1:]) for a in (q, k_new[:, 0]))
        scores = self._einsum("bqnh,bsh->bnqs", q, k) * scale
        causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1).astype(q.dtype)
        out = self._einsum("bnqs,bsv->bqnv", weights, k[..., :v_dim])
        return out.reshape(num_tokens, num_heads, v_dim), cache


class TrainableDecoder:
    """`Decoder` as a function of a flat dictionary of float32 arrays."""

    def __init__(self, config: ModelConfig, compute_dtype: jax.typing.DTypeLike):
        self.config = config
        self._description = describe(lambda: Decoder(config, compute_dtype, lambda _: "f32"))
        moe, hidden = config.moe, config.hidden_size
        gate = (moe.router.num_experts, moe.expert_intermediate, hidden)
        shapes = {"gate": gate, "up": gate, "down": (gate[0], hidden, gate[1])}
        self.expert_shapes = {
            f"experts.{m}.{which}": shapes[which]
            for m in range(len(config.moe_layers))
            for which in _WHICH
        }
        self.kinds = {name: spec.kind for name, spec in self._description.specs.items()}
        self.kinds |= dict.fromkeys(self.expert_shapes, "matrix")

    @property
    def router_biases(self) -> list[str]:
        """The correction biases, one a MoE layer."""
        return [f"layers.{i}.mlp.router.correction_bias" for i in self.config.moe_layers]

    def init(self, seed: int) -> Params:
        """Normal weights scaled by fan-in, ones for norms, zeros for the router's biases."""
        shapes = {name: spec.shape for name, spec in self._description.specs.items()}
        random = np.random.default_rng(seed)
        params = {}
        for name, shape in (shapes | self.expert_shapes).items():
            kind = self.kinds[name]
            if kind == "norm":
                value = np.ones(shape)
            elif kind == "router_bias":
                value = np.zeros(shape)
            else:
                small = kind == "embedding" or "router" in name or name == "lm_head.data"
                std = 0.02 if small else 0.7 * shape[-1] ** -0.5
                value = random.standard_normal(shape) * std
            params[name] = jnp.asarray(value, jnp.float32)
        return params

    def __call__(
        self,
        params: Mapping[str, jax.Array],
        tokens: jax.Array,
        *,
        dropout: Dropout = lambda x: x,
        precision: jax.lax.Precision = jax.lax.Precision.DEFAULT,
    ) -> tuple[jax.Array, jax.Array]:
        """int32 `tokens [B, S]` to float32 logits `[B, S, V]` and loads `[MoE layers, E]`.

        dropout: applied to the embeddings and to what each half of a layer adds to the residual.
        """
        num_sequences, length = tokens.shape
        leaves = {name: params[name] for name in self._description.specs}
        model = nnx.merge(self._description.graphdef, self._description.fill(leaves))
        experts = [
            {which: Weight(params[f"experts.{m}.{which}"]) for which in _WHICH}
            for m in range(len(self.config.moe_layers))
        ]
        ops = TrainingOps(experts, num_sequences, precision)
        flat = tokens.reshape(-1)
        zeros = jnp.zeros_like(flat)
        positions = jnp.tile(jnp.arange(length), num_sequences)
        step = StepInputs(flat, positions, zeros, zeros, jnp.zeros((1, 1), jnp.int32))
        h = dropout(model.embed(flat))
        for i in range(self.config.num_layers):
            h = h + dropout(model.attention(i, h, (), step, ops)[0] - h)
            h = h + dropout(model.mlp(i, h, step, ops) - h)
        logits = model.head(h, ops)
        return logits.reshape(num_sequences, length, -1), jnp.stack(ops.loads)
