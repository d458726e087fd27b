"""config.json of Qwen3MoeForCausalLM (Qwen3-30B-A3B, 235B-A22B, Coder, and their FP8 forms)."""

from __future__ import annotations

from typing import Literal

from jaxmoe.common.errors import ConfigError
from jaxmoe.config import shared_fields
from jaxmoe.config.hf_fields import HfFields
from jaxmoe.config.model_config import GqaConfig, ModelConfig, MoeConfig, RouterConfig


def parse(fields: HfFields, architecture: str) -> ModelConfig:
    model_type = fields.choice("model_type", of=("qwen3_moe",))
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

    hidden_size, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    num_kv_heads = fields.integer("num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise fields.fail("num_key_value_heads", num_kv_heads, f"a divisor of {num_heads} heads")
    head_dim = fields.integer("head_dim", default=hidden_size // num_heads)
    max_position = fields.integer("max_position_embeddings")
    rope = shared_fields.parse_rope(fields, head_dim, max_position, interleaved=False)
    num_layers = shared_fields.parse_num_layers(fields)
    num_experts = fields.integer("num_experts", "num_local_experts", "n_routed_experts")
    experts_per_token = fields.integer("num_experts_per_tok")
    if experts_per_token > num_experts:
        raise fields.fail(
            "num_experts_per_tok", experts_per_token, f"at most {num_experts} experts"
        )
    parsed = ModelConfig(
        architecture=architecture,
        model_type=model_type,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        num_layers=num_layers,
        mlp_types=_mlp_types(fields, num_layers),
        dense_intermediate=fields.integer("intermediate_size"),
        norm_eps=fields.number("rms_norm_eps", default=1e-6),
        tie_embeddings=fields.boolean("tie_word_embeddings", default=False),
        max_position=shared_fields.yarn_max_position(max_position, rope),
        attention=GqaConfig(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            softmax_scale=head_dim**-0.5,
            qk_norm=True,
        ),
        rope=rope,
        moe=MoeConfig(
            router=RouterConfig(
                num_experts=num_experts,
                experts_per_token=experts_per_token,
                score="softmax",
                correction_bias=False,
                renormalize=fields.boolean("norm_topk_prob", default=False),
                weight_scale=1.0,
            ),
            expert_intermediate=fields.integer("moe_intermediate_size"),
            shared_intermediate=0,
        ),
        quant=shared_fields.parse_quant(fields),
        weight_dtype=shared_fields.parse_weight_dtype(fields),
        bos_token_id=shared_fields.parse_bos(fields),
        eos_token_ids=shared_fields.parse_eos(fields),
        num_draft_layers=shared_fields.parse_num_draft_layers(fields),
    )
    shared_fields.report_unread(fields)
    return parsed


def _mlp_types(fields: HfFields, num_layers: int) -> tuple[Literal["dense", "moe"], ...]:
    step = fields.integer("decoder_sparse_step", default=1)
    dense = fields.integers("mlp_only_layers", default=())
    if any(i >= num_layers for i in dense):
        raise ConfigError(
            f"{fields.where}: 'mlp_only_layers' names layer {max(dense)} of {num_layers}"
        )
    return tuple(
        "moe" if i not in dense and (i + 1) % step == 0 else "dense" for i in range(num_layers)
    )
