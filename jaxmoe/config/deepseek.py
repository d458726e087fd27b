"""config.json of the DeepSeek family: DeepseekV2ForCausalLM, DeepseekV3ForCausalLM, relatives.

DeepseekV3ForCausalLM covers R1, V3.1, Kimi-K2 (`model_type` kimi_k2) and other models that reuse
the architecture; GLM-4.7-Flash is one under a name of its own. V2 and V3 differ in their routers:
V2 takes a softmax and limits groups by their best expert; V3 takes sigmoids, chooses with a
correction bias and limits groups by the sum of their two best.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from jaxmoe.config import shared_fields
from jaxmoe.config.hf_fields import HfFields
from jaxmoe.config.model_config import (
    IndexerConfig,
    MlaConfig,
    ModelConfig,
    MoeConfig,
    RopeConfig,
    RouterConfig,
)

_MODEL_TYPES = {
    "DeepseekV2ForCausalLM": ("deepseek_v2",),
    "DeepseekV3ForCausalLM": ("deepseek_v3", "kimi_k2"),
    "Glm4MoeLiteForCausalLM": ("glm4_moe_lite",),  # GLM-4.7-Flash
    "DeepseekV32ForCausalLM": ("deepseek_v32",),
    "GlmMoeDsaForCausalLM": ("glm_moe_dsa",),  # GLM-5
}
# With sparse attention: an indexer chooses `index_topk` positions for every token.
_SPARSE = ("DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM")
# How GLM-5.2 and later say which layers have an indexer and which use an earlier layer's choice.
_OF_SHARING = (
    *("index_topk_freq", "index_topk_pattern"),
    *("index_skip_topk_offset", "indexer_types"),
)
_OF_INDEXER = ("index_head_dim", "index_n_heads", "index_topk", "indexer_rope_interleave")
# Of later relatives that carry one of the architectures above in their configs: each changes the
# results.
_NOT_IMPLEMENTED = (
    *(
        "index_topk",
        "index_head_dim",
        "index_n_heads",
        "sliding_window",
        "layer_types",
        "linear_attn_config",
    ),
    *("hc_mult", "swiglu_limit", "moe_latent_size", "use_qk_norm", "query_pre_attn_scalar"),
)


def parse(fields: HfFields, architecture: str) -> ModelConfig:
    model_type = fields.choice("model_type", of=_MODEL_TYPES[architecture])
    if architecture in _SPARSE:
        return _parse_sparse(fields, architecture, model_type)
    return _parse_dense(fields, architecture, model_type)


def _parse_sparse(fields: HfFields, architecture: str, model_type: str) -> ModelConfig:
    """A model whose tokens attend the positions an indexer chooses."""
    kinds = fields.strings("layer_types", default=())
    if other := set(kinds) - {"indexed_attention", "deepseek_sparse_attention"}:
        raise fields.fail("layer_types", sorted(other), "'indexed_attention' in every layer")
    dense = fields.without("layer_types", *_OF_INDEXER, *_OF_SHARING)
    parsed = _parse_dense(dense, architecture, model_type)
    attention, rope = parsed.attention, parsed.rope
    assert isinstance(attention, MlaConfig)
    head_dim = fields.integer("index_head_dim")
    if head_dim < rope.dim:
        raise fields.fail("index_head_dim", head_dim, f"at least {rope.dim}, which turn")
    if attention.q_lora_rank is None:
        raise fields.fail("q_lora_rank", None, "an integer: the indexer reads the query's latent")
    # The two families differ in which elements are a pair. transformers does not read the key.
    interleaved = model_type == "glm_moe_dsa"
    fields.choice("indexer_rope_interleave", of=(interleaved,), default=interleaved)
    kinds = _indexer_types(fields, parsed.num_layers)
    indexer = IndexerConfig(
        num_heads=fields.integer("index_n_heads"),
        head_dim=head_dim,
        top_k=fields.integer("index_topk"),
        rope=dataclasses.replace(rope, interleaved=interleaved),
        sharing_layers=tuple(i for i, kind in enumerate(kinds) if kind == "shared"),
    )
    return dataclasses.replace(parsed, attention=dataclasses.replace(attention, indexer=indexer))


def _indexer_types(fields: HfFields, num_layers: int) -> tuple[str, ...]:
    """ "full" or "shared" for each layer: by a list, else a pattern, else a schedule."""
    frequency = fields.integer("index_topk_freq", default=1)
    offset = fields.integer("index_skip_topk_offset", default=2, minimum=0)
    name, kinds = "indexer_types", fields.strings("indexer_types", default=())
    if not kinds:
        name, kinds = "index_topk_pattern", fields.raw("index_topk_pattern", default=())
        if isinstance(kinds, str):
            words = {"F": "full", "S": "shared"}
            kinds = tuple(words.get(letter, letter) for letter in kinds)
        elif kinds:
            kinds = fields.strings("index_topk_pattern")
    if not kinds:
        name = "index_topk_freq"
        steps = (max(i - offset + 1, 0) for i in range(num_layers))
        kinds = tuple("shared" if step % frequency else "full" for step in steps)
    if len(kinds) != num_layers or set(kinds) - {"full", "shared"} or kinds[0] == "shared":
        wanted = f"{num_layers} of 'full' and 'shared', 'full' first"
        raise fields.fail(name, list(kinds), wanted)
    return kinds


def _parse_dense(fields: HfFields, architecture: str, model_type: str) -> ModelConfig:
    for key in _NOT_IMPLEMENTED:
        if fields.given(key):
            raise fields.fail(key, fields.raw(key), f"absent in {architecture}")
    fields.choice("hidden_act", of=("silu",), default="silu")
    fields.choice("attention_bias", of=(False,), default=False)
    fields.choice("mlp_bias", of=(False,), default=False)

    nope, rope_dim = fields.integer("qk_nope_head_dim"), fields.integer("qk_rope_head_dim")
    max_position = fields.integer("max_position_embeddings")
    rope = shared_fields.parse_rope(
        fields, rope_dim, max_position, fields.boolean("rope_interleave", default=True)
    )
    num_heads = fields.integer("num_attention_heads")
    # A latent is shared by all heads, so a count of KV heads has no meaning of its own here.
    fields.choice("num_key_value_heads", of=(num_heads,), default=num_heads)
    attention = MlaConfig(
        num_heads=num_heads,
        q_lora_rank=fields.integer("q_lora_rank", default=None),
        kv_lora_rank=fields.integer("kv_lora_rank"),
        nope_head_dim=nope,
        rope_head_dim=rope_dim,
        v_head_dim=fields.integer("v_head_dim"),
        softmax_scale=_softmax_scale(nope + rope_dim, rope),
    )
    expert_intermediate = fields.integer("moe_intermediate_size")
    return shared_fields.parse_model(
        fields,
        architecture,
        attention=attention,
        rope=rope,
        moe=MoeConfig(
            router=_v2_router(fields) if model_type == "deepseek_v2" else v3_router(fields),
            expert_intermediate=expert_intermediate,
            shared_intermediate=expert_intermediate
            * fields.integer("n_shared_experts", default=0, minimum=0),
        ),
        mlp_types=mlp_types(fields, shared_fields.parse_num_layers(fields)),
        dense_intermediate=fields.integer("intermediate_size"),
    )


def _softmax_scale(head_dim: int, rope: RopeConfig) -> float:
    """1/sqrt(head_dim), sharpened by YaRN's mscale squared where `mscale_all_dim` is set."""
    scale = head_dim**-0.5
    yarn = rope.scaling
    if yarn is not None and yarn.mscale_all_dim is not None and yarn.factor > 1.0:
        scale *= (0.1 * yarn.mscale_all_dim * math.log(yarn.factor) + 1.0) ** 2
    return scale


def mlp_types(fields: HfFields, num_layers: int) -> tuple[Literal["dense", "moe"], ...]:
    """Both spellings: `first_k_dense_replace` with `moe_layer_freq`, and `mlp_layer_types`."""
    kinds = fields.strings("mlp_layer_types", default=())
    if kinds:
        if len(kinds) != num_layers or set(kinds) - {"dense", "sparse"}:
            wanted = f"{num_layers} of 'dense' and 'sparse'"
            raise fields.fail("mlp_layer_types", list(kinds), wanted)
        fields.ignore("first_k_dense_replace", "moe_layer_freq")
        return tuple("dense" if kind == "dense" else "moe" for kind in kinds)
    first = fields.integer("first_k_dense_replace", default=0, minimum=0)
    frequency = fields.raw("moe_layer_freq", default=1)
    if isinstance(frequency, (list, tuple)):
        if len(frequency) != num_layers or any(item not in (0, 1) for item in frequency):
            raise fields.fail(
                "moe_layer_freq", frequency, f"an integer, or {num_layers} of 0 and 1"
            )
        marks = [bool(item) for item in frequency]
    else:
        frequency = fields.integer("moe_layer_freq", default=1)
        marks = [i % frequency == 0 for i in range(num_layers)]
    return tuple("moe" if i >= first and marks[i] else "dense" for i in range(num_layers))


def _v2_router(fields: HfFields) -> RouterConfig:
    fields.choice("scoring_func", of=("softmax",), default="softmax")
    # The published code skips the scaling factor when it renormalises, transformers ignores the
    # key.
    fields.choice("norm_topk_prob", of=(False,), default=False)
    method = fields.choice("topk_method", of=("greedy", "group_limited_greedy"), default="greedy")
    grouped = method == "group_limited_greedy"
    if not grouped:
        fields.ignore("n_group", "topk_group")
    return shared_fields.checked_router(
        fields,
        RouterConfig(
            **_common_router(fields),
            score="softmax",
            correction_bias=False,
            renormalize=False,
            num_groups=fields.integer("n_group") if grouped else 1,
            groups_per_token=fields.integer("topk_group") if grouped else 1,
            group_score="max",
        ),
    )


def v3_router(fields: HfFields) -> RouterConfig:
    # Groups and factor have no default here: Hugging Face's are those of DeepSeek-V3 itself, which
    # a smaller relative that leaves them out can hardly mean.
    fields.number("routed_scaling_factor")
    fields.choice("scoring_func", of=("sigmoid",), default="sigmoid")
    fields.choice("topk_method", of=("noaux_tc",), default="noaux_tc")
    return shared_fields.checked_router(
        fields,
        RouterConfig(
            **_common_router(fields),
            score="sigmoid",
            correction_bias=True,
            renormalize=fields.boolean("norm_topk_prob", default=True),
            renormalize_eps=1e-20,
            num_groups=fields.integer("n_group"),
            groups_per_token=fields.integer("topk_group"),
            group_score="top2_sum",
        ),
    )


def _common_router(fields: HfFields) -> dict[str, Any]:
    return dict(
        num_experts=fields.integer("n_routed_experts", "num_experts", "num_local_experts"),
        experts_per_token=fields.integer("num_experts_per_tok"),
        weight_scale=fields.number("routed_scaling_factor", default=1.0),
    )
