"""config.json of Qwen3MoeForCausalLM (Qwen3-30B-A3B, 235B-A22B, Coder, and their FP8 forms)."""

from __future__ import annotations

from typing import Literal

from jaxmoe.common.errors import ConfigError
from jaxmoe.config import shared_fields
from jaxmoe.config.hf_fields import HfFields
from jaxmoe.config.model_config import ModelConfig, MoeConfig


def parse(fields: HfFields, architecture: str) -> ModelConfig:
    fields.choice("model_type", of=("qwen3_moe",))
    fields.choice("hidden_act", of=("silu",), default="silu")
    fields.choice("attention_bias", of=(False,), default=False)
    # Qwen3-Coder's configs spell these out; the architecture has one value for each.
    fields.choice("qkv_bias", of=(False,), default=False)
    fields.choice("use_qk_norm", of=(True,), default=True)
    fields.choice("shared_expert_intermediate_size", of=(0,), default=0)
    if fields.boolean("use_sliding_window", default=False):
        raise fields.fail("use_sliding_window", True, "false")
    fields.ignore("sliding_window")  # without effect unless the key above is true
    layer_types = fields.strings("layer_types", default=())
    if other := set(layer_types) - {"full_attention"}:
        raise fields.fail("layer_types", sorted(other), "'full_attention' in every layer")

    attention = shared_fields.parse_gqa(fields, "head")
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
            expert_intermediate=fields.integer("moe_intermediate_size"),
            shared_intermediate=0,
        ),
        mlp_types=mlp_types(fields, shared_fields.parse_num_layers(fields)),
        dense_intermediate=fields.integer("intermediate_size"),
    )


def mlp_types(fields: HfFields, num_layers: int) -> tuple[Literal["dense", "moe"], ...]:
    """From `decoder_sparse_step` and `mlp_only_layers`."""
    step = fields.integer("decoder_sparse_step", default=1)
    dense = fields.integers("mlp_only_layers", default=())
    if any(i >= num_layers for i in dense):
        raise ConfigError(
            f"{fields.where}: 'mlp_only_layers' names layer {max(dense)} of {num_layers}"
        )
    return tuple(
        "moe" if i not in dense and (i + 1) % step == 0 else "dense" for i in range(num_layers)
    )
