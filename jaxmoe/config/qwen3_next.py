"""config.json of Qwen3NextForCausalLM (Qwen3-Next-80B-A3B and its FP8 form).

Three of four layers are linear attention; the fourth is gated grouped-query attention. The text
model of Qwen3.5 (qwen3_5_moe.py) differs from it in a few keys.
"""

from __future__ import annotations

import dataclasses

from jaxmoe.config import shared_fields
from jaxmoe.config.hf_fields import HfFields
from jaxmoe.config.model_config import GatedDeltaConfig, ModelConfig, MoeConfig
from jaxmoe.config.qwen3_moe import mlp_types

# What the kernels have: whole vectors of a head's elements, and a few tokens of convolution.
_LANES = 16
_MOST_CONV_WIDTH = 8
_MROPE = ("mrope_section", "mrope_interleaved")  # of pictures' positions; text turns as one


def parse(fields: HfFields, architecture: str) -> ModelConfig:
    fields.choice("model_type", of=("qwen3_next",))
    fields.ignore("sliding_window")
    if fields.boolean("use_sliding_window", default=False):
        raise fields.fail("use_sliding_window", True, "false")
    renormalize = fields.boolean("norm_topk_prob", default=True)
    return parse_text(fields, architecture, fused=True, renormalize=renormalize)


def parse_text(
    fields: HfFields, architecture: str, *, fused: bool, renormalize: bool
) -> ModelConfig:
    """What Qwen3-Next and Qwen3.5 have in common."""
    fields.choice("hidden_act", of=("silu",), default="silu")
    fields.choice("attention_bias", of=(False,), default=False)
    fields.choice("attn_output_gate", of=(True,), default=True)
    num_layers = shared_fields.parse_num_layers(fields)
    kinds = _layer_types(fields, num_layers)
    attention = dataclasses.replace(shared_fields.parse_gqa(fields, "head"), output_gate=True)
    max_position = fields.integer("max_position_embeddings")
    rope = shared_fields.parse_rope(
        fields,
        attention.head_dim,
        max_position,
        interleaved=False,
        rotary_factor=0.25,
        without_effect=_MROPE,
    )
    moe = MoeConfig(
        router=shared_fields.parse_softmax_router(fields, renormalize=renormalize),
        expert_intermediate=fields.integer("moe_intermediate_size"),
        shared_intermediate=fields.integer("shared_expert_intermediate_size"),
        shared_gate=True,
    )
    linear = _linear_attention(fields, fused)
    types = mlp_types(fields, num_layers)
    dense = fields.integer("intermediate_size") if "dense" in types else 0
    fields.ignore("intermediate_size")  # of no layer, where all have experts
    parsed = shared_fields.parse_model(
        fields,
        architecture,
        attention=attention,
        rope=rope,
        moe=moe,
        mlp_types=types,
        dense_intermediate=dense,
    )
    return dataclasses.replace(
        parsed,
        linear_layers=tuple(i for i, kind in enumerate(kinds) if kind == "linear_attention"),
        linear_attention=linear,
        norm_offset=1.0,
    )


def _layer_types(fields: HfFields, num_layers: int) -> tuple[str, ...]:
    interval = fields.integer("full_attention_interval", default=4)
    kinds = fields.strings(
        "layer_types",
        default=[
            "linear_attention" if (i + 1) % interval else "full_attention"
            for i in range(num_layers)
        ],
    )
    if len(kinds) != num_layers or set(kinds) - {"full_attention", "linear_attention"}:
        wanted = f"{num_layers} of 'full_attention' and 'linear_attention'"
        raise fields.fail("layer_types", list(kinds), wanted)
    if "full_attention" not in kinds:
        raise fields.fail("layer_types", list(kinds), "at least one 'full_attention'")
    return kinds


def _linear_attention(fields: HfFields, fused: bool) -> GatedDeltaConfig:
    # Qwen3.5 names the states' type, which is float32 here always.
    fields.choice("mamba_ssm_dtype", of=("float32",), default="float32")
    linear = GatedDeltaConfig(
        num_key_heads=fields.integer("linear_num_key_heads", default=16),
        num_value_heads=fields.integer("linear_num_value_heads", default=32),
        key_head_dim=fields.integer("linear_key_head_dim", default=128),
        value_head_dim=fields.integer("linear_value_head_dim", default=128),
        conv_width=fields.integer("linear_conv_kernel_dim", default=4, minimum=2),
        fused_projections=fused,
    )
    if linear.num_value_heads % linear.num_key_heads:
        raise fields.fail(
            "linear_num_value_heads",
            linear.num_value_heads,
            f"a multiple of {linear.num_key_heads} key heads",
        )
    for key in ("linear_key_head_dim", "linear_value_head_dim"):
        if (dim := fields.integer(key, default=128)) % _LANES:
            raise fields.fail(key, dim, f"a multiple of {_LANES}")
    if linear.conv_width > _MOST_CONV_WIDTH:
        wanted = f"at most {_MOST_CONV_WIDTH}"
        raise fields.fail("linear_conv_kernel_dim", linear.conv_width, wanted)
    return linear
