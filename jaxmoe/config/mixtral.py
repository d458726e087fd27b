"""config.json of MixtralForCausalLM (Mixtral-8x7B, 8x22B)."""

from __future__ import annotations

from jaxmoe.config import shared_fields
from jaxmoe.config.hf_fields import HfFields
from jaxmoe.config.model_config import ModelConfig, MoeConfig


def parse(fields: HfFields, architecture: str) -> ModelConfig:
    fields.choice("model_type", of=("mixtral",))
    fields.choice("hidden_act", of=("silu",), default="silu")
    if fields.given("sliding_window"):
        raise fields.fail("sliding_window", fields.raw("sliding_window"), "null")
    fields.ignore("router_jitter_noise")  # of training
    attention = shared_fields.parse_gqa(fields, "none")
    max_position = fields.integer("max_position_embeddings")
    return shared_fields.parse_model(
        fields,
        architecture,
        attention=attention,
        rope=shared_fields.parse_rope(fields, attention.head_dim, max_position, interleaved=False),
        moe=MoeConfig(
            router=shared_fields.parse_softmax_router(fields, renormalize=True),
            expert_intermediate=fields.integer("intermediate_size"),
            shared_intermediate=0,
        ),
    )
