"""config.json of MiniMaxM2ForCausalLM (MiniMax-M2, M2.1, M2.5, M2.7)."""

from __future__ import annotations

from jaxmoe.config import shared_fields
from jaxmoe.config.hf_fields import HfFields
from jaxmoe.config.model_config import ModelConfig, MoeConfig, RouterConfig

# Of MiniMax-M1, whose configuration class M2's config.json still fills in: an M2 has neither linear
# attention nor residual factors nor dense layers.
_OF_OTHERS = (
    "layernorm_full_attention_beta",
    "layernorm_linear_attention_beta",
    "layernorm_mlp_beta",
    "mlp_intermediate_size",
    "shared_moe_mode",
    "postnorm",
    "router_jitter_noise",
)


def parse(fields: HfFields, architecture: str) -> ModelConfig:
    fields.choice("model_type", of=("minimax_m2", "minimax"))
    fields.choice("hidden_act", of=("silu",), default="silu")
    fields.choice("use_qk_norm", of=(True,), default=True)
    fields.choice("qk_norm_type", of=("per_layer",), default="per_layer")
    fields.choice("use_routing_bias", of=(True,), default=True)
    fields.choice("scoring_func", of=("sigmoid",), default="sigmoid")
    fields.choice("shared_intermediate_size", of=(0,), default=0)
    if fields.given("sliding_window"):
        raise fields.fail("sliding_window", fields.raw("sliding_window"), "null")
    num_layers = shared_fields.parse_num_layers(fields)
    kinds = fields.integers("attn_type_list", default=())
    if kinds and (set(kinds) != {1} or len(kinds) != num_layers):
        raise fields.fail("attn_type_list", list(kinds), f"1 (full attention) {num_layers} times")
    fields.ignore(*_OF_OTHERS, "use_mtp", "mtp_transformer_layers")  # draft heads are not run

    attention = shared_fields.parse_gqa(fields, "row")
    head_dim = attention.head_dim
    rotary_dim = fields.integer("rotary_dim", default=head_dim)
    if rotary_dim > head_dim:
        raise fields.fail("rotary_dim", rotary_dim, f"at most head_dim = {head_dim}")
    max_position = fields.integer("max_position_embeddings")
    router = RouterConfig(
        num_experts=shared_fields.parse_num_experts(fields),
        experts_per_token=fields.integer("num_experts_per_tok"),
        score="sigmoid",
        correction_bias=True,
        renormalize=True,
        weight_scale=1.0,
        float32_weights=True,
    )
    return shared_fields.parse_model(
        fields,
        architecture,
        attention=attention,
        rope=shared_fields.parse_rope(
            fields,
            head_dim,
            max_position,
            interleaved=False,
            rotary_factor=rotary_dim / head_dim,
        ),
        moe=MoeConfig(
            router=shared_fields.checked_router(fields, router),
            expert_intermediate=fields.integer("intermediate_size"),
            shared_intermediate=0,
        ),
    )
