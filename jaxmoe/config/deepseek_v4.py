"""config.json of DeepseekV4ForCausalLM (DeepSeek-V4, V4-Flash).

Read as published and as transformers writes it: `compress_ratios`, `num_hash_layers` and one table
of rope, or `layer_types`, `mlp_layer_types` and a table of two.
"""

from __future__ import annotations

import dataclasses

from jaxmoe.common.errors import ConfigError
from jaxmoe.config import shared_fields
from jaxmoe.config.hf_fields import HfFields
from jaxmoe.config.model_config import (
    ClampedSwiglu,
    CompressedConfig,
    LayerKind,
    ModelConfig,
    MoeConfig,
    QuantConfig,
    RopeConfig,
    RouterConfig,
    StreamsConfig,
)

_KINDS: dict[int, LayerKind] = {0: "window", 4: "sparse", 128: "heavy"}
_LAYER_TYPES: dict[str, LayerKind] = {
    "sliding_attention": "window",
    "compressed_sparse_attention": "sparse",
    "heavily_compressed_attention": "heavy",
}
_RATES = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
_ROPE = ("rope_parameters", "rope_scaling", "rope_theta", "compress_rope_theta")
# Read here; parse_model does not know them.
_OWN = (*_ROPE, "partial_rotary_factor", "expert_dtype", "mlp_layer_types")


def parse(fields: HfFields, architecture: str) -> ModelConfig:
    fields.choice("model_type", of=("deepseek_v4",))
    fields.choice("hidden_act", of=("silu",), default="silu")
    fields.choice("attention_bias", of=(False,), default=False)
    fields.choice("mlp_bias", of=(False,), default=False)
    fields.choice("num_key_value_heads", of=(1,), default=1)
    fields.ignore("router_jitter_noise", "intermediate_size")  # of training; of no layer
    num_layers = shared_fields.parse_num_layers(fields)
    limit = fields.number("swiglu_limit")
    activation = ClampedSwiglu(alpha=1.0, limit=limit, up_offset=0.0)
    width = fields.integer("moe_intermediate_size")
    rope, compressed_rope = _ropes(fields)
    expert_dtype = fields.choice("expert_dtype", of=("fp4", "fp8"), default="fp4")
    attention = _attention(fields, num_layers, compressed_rope)
    moe = MoeConfig(
        router=_router(fields, num_layers),
        expert_intermediate=width,
        shared_intermediate=width * fields.integer("n_shared_experts", default=1, minimum=0),
        activation=activation,
        # transformers clamps it too; the code beside the checkpoint reads as if it did not.
        shared_activation=activation,
    )
    streams = StreamsConfig(
        count=fields.integer("hc_mult"),
        sinkhorn_iterations=fields.integer("hc_sinkhorn_iters"),
        eps=fields.number("hc_eps"),
    )
    parsed = shared_fields.parse_model(
        fields, architecture, attention=attention, rope=rope, moe=moe
    )
    max_position = shared_fields.yarn_max_position(
        fields.integer("max_position_embeddings"), compressed_rope
    )
    return dataclasses.replace(
        parsed,
        max_position=max_position,
        streams=streams,
        quant=_quant(fields, parsed.quant, expert_dtype),
    )


def _attention(fields: HfFields, num_layers: int, rope: RopeConfig) -> CompressedConfig:
    num_heads, head_dim = fields.integer("num_attention_heads"), fields.integer("head_dim")
    groups = fields.integer("o_groups")
    if num_heads % groups:
        raise fields.fail("o_groups", groups, f"a divisor of {num_heads} heads")
    index_head_dim = fields.integer("index_head_dim")
    for key, dim in (("head_dim", head_dim), ("index_head_dim", index_head_dim)):
        if dim < rope.dim:
            raise fields.fail(key, dim, f"at least {rope.dim}, which turn")
    return CompressedConfig(
        num_heads=num_heads,
        head_dim=head_dim,
        q_lora_rank=fields.integer("q_lora_rank"),
        window=fields.integer("sliding_window"),
        kinds=_layer_kinds(fields, num_layers),
        compressed_rope=rope,
        softmax_scale=head_dim**-0.5,
        o_groups=groups,
        o_rank=fields.integer("o_lora_rank"),
        index_heads=fields.integer("index_n_heads"),
        index_head_dim=index_head_dim,
        index_top_k=fields.integer("index_topk"),
    )


def _layer_kinds(fields: HfFields, num_layers: int) -> tuple[LayerKind, ...]:
    rates = fields.raw("compress_rates", default=_RATES)
    if rates != _RATES:
        raise fields.fail("compress_rates", rates, str(_RATES))
    fields.choice("compress_rate_csa", of=(4,), default=4)
    fields.choice("compress_rate_hca", of=(128,), default=128)
    types = fields.strings("layer_types", default=())
    if types:
        if len(types) != num_layers or set(types) - set(_LAYER_TYPES):
            wanted = f"{num_layers} of {', '.join(_LAYER_TYPES)}"
            raise fields.fail("layer_types", list(types), wanted)
        fields.ignore("compress_ratios")
        return tuple(_LAYER_TYPES[word] for word in types)
    ratios = fields.integers("compress_ratios")
    # As shipped, with one more a draft layer.
    if len(ratios) < num_layers or set(ratios) - set(_KINDS):
        raise fields.fail("compress_ratios", list(ratios), f"{num_layers} or more of 0, 4 and 128")
    return tuple(_KINDS[ratio] for ratio in ratios[:num_layers])


def _router(fields: HfFields, num_layers: int) -> RouterConfig:
    fields.choice("topk_method", of=("noaux_tc",), default="noaux_tc")
    fields.choice("norm_topk_prob", of=(True,), default=True)
    for key in ("n_group", "topk_group"):
        fields.choice(key, of=(1,), default=1)
    kinds = fields.strings("mlp_layer_types", default=())
    if kinds:
        if len(kinds) != num_layers or set(kinds) - {"hash_moe", "moe"}:
            wanted = f"{num_layers} of 'hash_moe' and 'moe'"
            raise fields.fail("mlp_layer_types", list(kinds), wanted)
        fields.ignore("num_hash_layers")
        hashed = tuple(i for i, kind in enumerate(kinds) if kind == "hash_moe")
    else:
        count = fields.integer("num_hash_layers", minimum=0)
        hashed = tuple(range(min(count, num_layers)))
    router = RouterConfig(
        num_experts=fields.integer("n_routed_experts", "num_local_experts"),
        experts_per_token=fields.integer("num_experts_per_tok"),
        score=fields.choice("scoring_func", of=("sqrtsoftplus",)),
        correction_bias=True,
        renormalize=True,
        renormalize_eps=1e-20,
        weight_scale=fields.number("routed_scaling_factor"),
        hashed_layers=hashed,
    )
    return shared_fields.checked_router(fields, router)


def _ropes(fields: HfFields) -> tuple[RopeConfig, RopeConfig]:
    """Of layers without entries and of those with; YaRN extends the latter, without its mscale."""
    head_dim = fields.integer("head_dim")
    factor = fields.number("partial_rotary_factor", default=None)
    dim = fields.integer("qk_rope_head_dim", default=None)
    if factor is not None and dim is not None and int(head_dim * factor) != dim:
        raise fields.fail("partial_rotary_factor", factor, f"{dim / head_dim:g}")
    if dim is None:
        dim = 64 if factor is None else int(head_dim * factor)
    theta = fields.number("rope_theta", default=10000.0, above=1.0)
    compress_theta = fields.number("compress_rope_theta", default=160000.0, above=1.0)
    table = fields.table("rope_parameters", "rope_scaling")
    if table is not None and (table.given("main") or table.given("compress")):
        main, compress = table.table("main"), table.table("compress")
        if main is None or compress is None:
            raise ConfigError(f"{table.where}: wanted both 'main' and 'compress'")
    else:
        main, compress = HfFields({}, fields.where), table
        if table is not None:
            # The one table is of the layers with entries; what it says of theta is of the others.
            theta = table.number("rope_theta", default=theta, above=1.0)
            compress = table.without("rope_theta", "main", "compress")
    max_position = fields.integer("max_position_embeddings")
    plain = _rope(main, dim, head_dim, theta, max_position)
    if plain.scaling is not None:
        raise main.fail("rope_type", "yarn", "'default' for layers without entries")
    if compress is None:
        compress = HfFields({}, fields.where)
    return plain, _rope(compress, dim, head_dim, compress_theta, max_position)


def _rope(table: HfFields, dim: int, head_dim: int, theta: float, max_position: int) -> RopeConfig:
    share = table.number("partial_rotary_factor", default=dim / head_dim)
    if int(head_dim * share) != dim:
        raise table.fail("partial_rotary_factor", share, f"{dim / head_dim:g}")
    for key in ("mscale", "mscale_all_dim"):
        if table.given(key):
            raise table.fail(key, table.raw(key), "absent: attention is not sharpened")
    own = table.without("partial_rotary_factor", "rope_theta")
    theta = table.number("rope_theta", default=theta, above=1.0)
    wrapped = HfFields({"rope_theta": theta, "rope_scaling": own.values}, table.where)
    rope = shared_fields.parse_rope(wrapped, dim, max_position, interleaved=True)
    scaling = rope.scaling
    if scaling is not None and scaling.attention_factor is None:
        scaling = dataclasses.replace(scaling, attention_factor=1.0)
    return dataclasses.replace(rope, scaling=scaling, at_end=True)


def _quant(fields: HfFields, quant: QuantConfig, expert_dtype: str) -> QuantConfig:
    """Blocks of FP8, and experts of MXFP4 where they are not FP8 too."""
    if quant.format == "none":
        return quant
    if quant.layout != "fp8" or quant.format != "fp8_block":
        raise fields.fail("quantization_config", quant.format, "fp8 in blocks of 128x128")
    return dataclasses.replace(quant, layout="deepseek_v4", mxfp4_experts=expert_dtype == "fp4")
