"""config.json of GptOssForCausalLM (gpt-oss-20b, 120b)."""

from __future__ import annotations

import dataclasses

from jaxmoe.config import shared_fields
from jaxmoe.config.hf_fields import HfFields
from jaxmoe.config.model_config import ClampedSwiglu, ModelConfig, MoeConfig


def parse(fields: HfFields, architecture: str) -> ModelConfig:
    fields.choice("model_type", of=("gpt_oss",))
    fields.choice("hidden_act", of=("silu",), default="silu")
    fields.choice("attention_bias", of=(True,), default=True)
    fields.ignore("initial_context_length", "experts_per_token")  # of the original's own config
    num_layers = shared_fields.parse_num_layers(fields)
    window = fields.integer("sliding_window", default=128)
    kinds = fields.strings(
        "layer_types",
        default=["full_attention" if i % 2 else "sliding_attention" for i in range(num_layers)],
    )
    if len(kinds) != num_layers or set(kinds) - {"full_attention", "sliding_attention"}:
        wanted = f"{num_layers} of 'full_attention' and 'sliding_attention'"
        raise fields.fail("layer_types", list(kinds), wanted)

    attention = dataclasses.replace(
        shared_fields.parse_gqa(fields, "none", qkv_bias=True), o_bias=True, sinks=True
    )
    # Softmax over the chosen experts' logits is the softmax over all, renormalised.
    router = dataclasses.replace(
        shared_fields.parse_softmax_router(fields, renormalize=True), logit_bias=True
    )
    max_position = fields.integer("max_position_embeddings")
    parsed = shared_fields.parse_model(
        fields,
        architecture,
        attention=attention,
        rope=shared_fields.parse_rope(fields, attention.head_dim, max_position, interleaved=False),
        moe=MoeConfig(
            router=router,
            expert_intermediate=fields.integer("intermediate_size"),
            shared_intermediate=0,
            activation=ClampedSwiglu(
                alpha=fields.number("swiglu_alpha", default=1.702),
                limit=fields.number("swiglu_limit", default=7.0),
            ),
            expert_bias=True,
        ),
    )
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return dataclasses.replace(parsed, windows=windows)
