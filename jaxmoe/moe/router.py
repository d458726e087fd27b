"""Which experts a token uses, and with what weights.

Everything is float32, whatever the compute dtype: a near tie decided differently changes the
experts, not the last digit. Of equal scores the lower expert (or group) id wins, on every platform.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.config.model_config import RouterConfig
from jaxmoe.ffi.ops import Ops
from jaxmoe.layers.linear import Linear
from jaxmoe.weights.param_spec import ParamSpec, WeightFormat, new_param


class Router(nnx.Module):
    """Leaves: logits `[E, D]` and, where the model has one, correction_bias `[E]` float32.

    hashed_vocab: instead, expert_table `[V, A]` int32 names the experts of every token id of so
    large a vocabulary; 0: the scores choose.
    """

    def __init__(
        self,
        config: RouterConfig,
        hidden: int,
        weight_format: WeightFormat,
        hashed_vocab: int = 0,
    ):
        self.config = config
        table = ParamSpec((hashed_vocab, config.experts_per_token), "int32", "expert_table")
        self.expert_table = new_param(table) if hashed_vocab else None
        self.logits = Linear(hidden, config.num_experts, weight_format, bias=config.logit_bias)
        bias = ParamSpec((config.num_experts,), "float32", "router_bias")
        has_bias = config.correction_bias and not hashed_vocab
        self.correction_bias = new_param(bias) if has_bias else None

    def __call__(
        self, x: jax.Array, valid: jax.Array, ops: Ops, token_ids: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Float32 `x [T, D]`, which rows are no padding, `valid [T]`, and `token_ids [T]`, which
        only a table is asked by, to the tokens' experts.

        Returns:
            expert_ids `[T, A]` int32, all -1 for padding, and combine_weights `[T, A]` float32.
        """
        router_logits = self.logits(x.astype(jnp.float32), ops, jnp.float32)
        bias = None if self.correction_bias is None else self.correction_bias[...]

        named = None
        if self.expert_table is not None:
            assert token_ids is not None
            named = jnp.take(self.expert_table[...], token_ids, axis=0, mode="clip")

        def route_one(row: tuple[jax.Array, jax.Array | None]) -> tuple[jax.Array, jax.Array]:
            logits, ids = row
            ids = None if ids is None else ids[None]
            expert_ids, combine_weights = route(logits[None], bias, self.config, ids)
            return expert_ids[0], combine_weights[0]

        expert_ids, combine_weights = ops.map_rows(route_one, (router_logits, named))
        return jnp.where(valid[:, None], expert_ids, -1), combine_weights


def route(
    router_logits: jax.Array,
    correction_bias: jax.Array | None,
    config: RouterConfig,
    expert_ids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Logits `[T, E]` float32 to expert_ids `[T, A]` int32 and combine_weights `[T, A]` float32.

    The bias takes part in the choice alone; the weights come from the scores themselves. Where
    `expert_ids [T, A]` are given, they are the choice.
    """
    if config.score == "softmax":
        scores = jax.nn.softmax(router_logits, axis=-1)
    elif config.score == "sqrtsoftplus":
        scores = jnp.sqrt(jax.nn.softplus(router_logits))
    else:
        scores = jax.nn.sigmoid(router_logits)
    if expert_ids is None:
        for_choice = scores if correction_bias is None else scores + correction_bias
        if config.num_groups > 1:
            for_choice = _keep_best_groups(for_choice, config)
        _, expert_ids = jax.lax.top_k(for_choice, config.experts_per_token)
    combine_weights = jnp.take_along_axis(scores, expert_ids, axis=-1)
    if config.renormalize:
        total = combine_weights.sum(axis=-1, keepdims=True) + config.renormalize_eps
        combine_weights = combine_weights / total
    return expert_ids.astype(jnp.int32), combine_weights * config.weight_scale


def _keep_best_groups(for_choice: jax.Array, config: RouterConfig) -> jax.Array:
    """Puts the experts outside a token's best groups beyond reach."""
    grouped = for_choice.reshape(
        for_choice.shape[0], config.num_groups, -1
    )  # [T, groups, E/groups]
    if config.group_score == "max":
        group_scores = grouped.max(axis=-1)
    else:
        group_scores = jax.lax.top_k(grouped, 2)[0].sum(axis=-1)
    _, kept = jax.lax.top_k(group_scores, config.groups_per_token)  # [T, kept]
    is_kept = (kept[:, :, None] == jnp.arange(config.num_groups)).any(axis=1)  # [T, groups]
    return jnp.where(is_kept[:, :, None], grouped, -jnp.inf).reshape(for_choice.shape)
