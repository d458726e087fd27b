"""config.json of Glm4MoeForCausalLM (GLM-4.5, 4.5-Air, 4.6, 4.7).

GLM-4.7-Flash has DeepSeek's attention and is read by deepseek.py.
"""

from __future__ import annotations

from jaxmoe.config import deepseek, shared_fields
from jaxmoe.config.hf_fields import HfFields
from jaxmoe.config.model_config import ModelConfig, MoeConfig


def parse(fields: HfFields, architecture: str) -> ModelConfig:
    fields.choice("model_type", of=("glm4_moe",))
    fields.choice("hidden_act", of=("silu",), default="silu")
    attention = shared_fields.parse_gqa(
        fields,
        "head" if fields.boolean("use_qk_norm", default=False) else "none",
        qkv_bias=fields.boolean("attention_bias", default=False),
    )
    max_position = fields.integer("max_position_embeddings")
    width = fields.integer("moe_intermediate_size")
    return shared_fields.parse_model(
        fields,
        architecture,
        attention=attention,
        rope=shared_fields.parse_rope(
            fields, attention.head_dim, max_position, interleaved=False, rotary_factor=0.5
        ),
        moe=MoeConfig(
            router=deepseek.v3_router(fields),
            expert_intermediate=width,
            shared_intermediate=width * fields.integer("n_shared_experts", default=0, minimum=0),
        ),
        mlp_types=deepseek.mlp_types(fields, shared_fields.parse_num_layers(fields)),
        dense_intermediate=fields.integer("intermediate_size"),
    )
