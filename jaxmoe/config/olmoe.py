"""config.json of OlmoeForCausalLM (OLMoE-1B-7B)."""

from __future__ import annotations

import dataclasses

from jaxmoe.config import shared_fields
from jaxmoe.config.hf_fields import HfFields
from jaxmoe.config.model_config import ModelConfig, MoeConfig


def parse(fields: HfFields, architecture: str) -> ModelConfig:
    fields.choice("model_type", of=("olmoe",))
    fields.choice("hidden_act", of=("silu",), default="silu")
    fields.choice("attention_bias", of=(False,), default=False)
    attention = dataclasses.replace(
        shared_fields.parse_gqa(fields, "row"), qkv_clip=fields.number("clip_qkv", default=None)
    )
    max_position = fields.integer("max_position_embeddings")
    return shared_fields.parse_model(
        fields,
        architecture,
        attention=attention,
        rope=shared_fields.parse_rope(fields, attention.head_dim, max_position, interleaved=False),
        moe=MoeConfig(
            router=shared_fields.parse_softmax_router(
                fields, renormalize=fields.boolean("norm_topk_prob", default=False)
            ),
            expert_intermediate=fields.integer("intermediate_size"),
            shared_intermediate=0,
        ),
    )
