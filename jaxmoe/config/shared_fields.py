"""What families spell alike in config.json: rope, routers, dtype, special tokens."""

from __future__ import annotations

import logging
from typing import Literal

from jaxmoe.common.errors import ConfigError
from jaxmoe.config.hf_fields import HfFields
from jaxmoe.config.model_config import (
    CompressedConfig,
    GqaConfig,
    MlaConfig,
    ModelConfig,
    MoeConfig,
    RopeConfig,
    RouterConfig,
    YarnScaling,
)
from jaxmoe.config.quantization import parse_quant

_log = logging.getLogger(__name__)

# Training, generation and bookkeeping: nothing here changes a forward pass.
_WITHOUT_EFFECT = (
    *(
        "_name_or_path",
        "auto_map",
        "architectures",
        "model_type",
        "transformers_version",
        "use_cache",
    ),
    *(
        "initializer_range",
        "attention_dropout",
        "pretraining_tp",
        "ep_size",
        "aux_loss_alpha",
        "seq_aux",
    ),
    *("router_aux_loss_coef", "output_router_logits", "output_attentions", "output_hidden_states"),
    *(
        "return_dict",
        "pad_token_id",
        "max_window_layers",
    ),
    *("head_dim", "qk_head_dim", "id2label", "label2id", "problem_type", "is_encoder_decoder"),
    *("chunk_size_feed_forward", "attn_implementation", "_attn_implementation", "torchscript"),
)


_MAX_LAYERS = 1_000  # far beyond any model; a damaged number must not be laid out in memory


def parse_rope(
    fields: HfFields,
    dim: int,
    max_position: int,
    interleaved: bool,
    *,
    rotary_factor: float | None = None,
    without_effect: tuple[str, ...] = (),
) -> RopeConfig:
    """Both spellings: `rope_theta` + `rope_scaling` (transformers 4) and `rope_parameters` (5).

    `rotary_factor`: the share of `dim` that turns where no `partial_rotary_factor` is given, which
    either place may hold; None for families that turn all of it. `without_effect`: keys of the
    table that do not change how text is turned.
    """
    table = fields.table("rope_parameters", "rope_scaling")
    theta = fields.number("rope_theta", default=None, above=1.0)
    factor = _rotary_factor(fields, rotary_factor)
    if table is not None:
        factor = _rotary_factor(table, factor if rotary_factor is not None else None)
    dim = int(dim * factor)
    if dim % 2 or dim < 2:
        raise ConfigError(f"{fields.where}: rope needs an even number of dimensions, got {dim}")
    if table is None:
        return RopeConfig(
            dim=dim, theta=10000.0 if theta is None else theta, interleaved=interleaved
        )
    theta = table.number("rope_theta", default=10000.0 if theta is None else theta, above=1.0)
    kind = table.choice("rope_type", "type", of=("default", "yarn"), default="default")
    table.ignore("type", *without_effect)
    scaling = None
    if kind == "yarn":
        scaling = _parse_yarn(table, max_position)
    if left := table.unread():
        raise ConfigError(f"{table.where}: not supported for rope type '{kind}': {', '.join(left)}")
    return RopeConfig(dim=dim, theta=theta, interleaved=interleaved, scaling=scaling)


def _rotary_factor(fields: HfFields, default: float | None) -> float:
    factor = fields.number("partial_rotary_factor", default=1.0 if default is None else default)
    if factor > 1.0 or (default is None and factor != 1.0):
        wanted = "1.0" if default is None else "at most 1.0"
        raise fields.fail("partial_rotary_factor", factor, wanted)
    return factor


def _parse_yarn(table: HfFields, max_position: int) -> YarnScaling:
    original = table.integer("original_max_position_embeddings", default=max_position)
    mscale = table.number("mscale", default=None, at_least=0.0)
    all_dim = table.number("mscale_all_dim", default=None, at_least=0.0)
    mscale, all_dim = mscale or None, all_dim or None  # 0 means unset
    if mscale not in (None, 1.0) and all_dim is None:
        # The published model code and transformers read this combination differently.
        raise table.fail("mscale", mscale, "1.0 where 'mscale_all_dim' is absent")
    beta_slow = table.number("beta_slow", default=1.0)
    return YarnScaling(
        factor=table.number("factor", default=max_position / original, at_least=1.0),
        original_max_position=original,
        beta_fast=table.number("beta_fast", default=32.0, at_least=beta_slow),
        beta_slow=beta_slow,
        mscale=mscale,
        mscale_all_dim=all_dim,
        attention_factor=table.number("attention_factor", default=None),
        truncate=table.boolean("truncate", default=True),
    )


def yarn_max_position(max_position: int, rope: RopeConfig) -> int:
    """The context YaRN extends to, even where `max_position_embeddings` states the original."""
    if rope.scaling is None:
        return max_position
    return max(max_position, int(rope.scaling.factor * rope.scaling.original_max_position))


def parse_gqa(
    fields: HfFields, qk_norm: Literal["none", "head", "row"], *, qkv_bias: bool = False
) -> GqaConfig:
    """Heads and their dimension, which defaults to the hidden size's share."""
    hidden_size, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    num_kv_heads = fields.integer("num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise fields.fail("num_key_value_heads", num_kv_heads, f"a divisor of {num_heads} heads")
    head_dim = fields.integer("head_dim", default=max(1, hidden_size // num_heads))
    return GqaConfig(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        softmax_scale=head_dim**-0.5,
        qk_norm=qk_norm,
        qkv_bias=qkv_bias,
    )


def parse_num_experts(fields: HfFields) -> int:
    return fields.integer("num_experts", "num_local_experts", "n_routed_experts")


def parse_softmax_router(fields: HfFields, *, renormalize: bool) -> RouterConfig:
    """The plain router: the best of a softmax over all experts."""
    router = RouterConfig(
        num_experts=parse_num_experts(fields),
        experts_per_token=fields.integer("num_experts_per_tok"),
        score="softmax",
        correction_bias=False,
        renormalize=renormalize,
        weight_scale=1.0,
    )
    return checked_router(fields, router)


def checked_router(fields: HfFields, router: RouterConfig) -> RouterConfig:
    """Refuses combinations no top-k exists for."""
    if router.num_experts % router.num_groups:
        raise fields.fail(
            "n_group", router.num_groups, f"a divisor of {router.num_experts} experts"
        )
    per_group = router.num_experts // router.num_groups
    if router.groups_per_token > router.num_groups:
        raise fields.fail(
            "topk_group", router.groups_per_token, f"at most n_group = {router.num_groups}"
        )
    if router.group_score == "top2_sum" and router.num_groups > 1 and per_group < 2:
        raise fields.fail("n_group", router.num_groups, "groups of at least 2 experts")
    if router.experts_per_token > per_group * router.groups_per_token:
        raise fields.fail(
            "num_experts_per_tok",
            router.experts_per_token,
            f"at most {per_group * router.groups_per_token} (experts a token may choose from)",
        )
    return router


def parse_model(
    fields: HfFields,
    architecture: str,
    *,
    attention: GqaConfig | MlaConfig | CompressedConfig,
    rope: RopeConfig,
    moe: MoeConfig,
    mlp_types: tuple[Literal["dense", "moe"], ...] | None = None,
    dense_intermediate: int = 0,
) -> ModelConfig:
    """The parts a family's parser made, and the rest of the keys; reports what nobody read.

    `mlp_types` defaults to experts in every layer.
    """
    num_layers = parse_num_layers(fields)
    parsed = ModelConfig(
        architecture=architecture,
        model_type=fields.raw("model_type"),
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        num_layers=num_layers,
        mlp_types=("moe",) * num_layers if mlp_types is None else mlp_types,
        dense_intermediate=dense_intermediate,
        norm_eps=fields.number("rms_norm_eps", default=1e-6),
        tie_embeddings=fields.boolean("tie_word_embeddings", default=False),
        max_position=yarn_max_position(fields.integer("max_position_embeddings"), rope),
        attention=attention,
        rope=rope,
        moe=moe,
        quant=parse_quant(fields),
        weight_dtype=parse_weight_dtype(fields),
        bos_token_id=parse_bos(fields),
        eos_token_ids=parse_eos(fields),
        num_draft_layers=parse_num_draft_layers(fields),
    )
    report_unread(fields)
    return parsed


def parse_num_layers(fields: HfFields) -> int:
    count = fields.integer("num_hidden_layers")
    if count > _MAX_LAYERS:
        raise fields.fail("num_hidden_layers", count, f"at most {_MAX_LAYERS}")
    return count


def parse_num_draft_layers(fields: HfFields) -> int:
    return fields.integer(
        "num_nextn_predict_layers", "num_mtp_layers", "num_mtp_modules", default=0, minimum=0
    )


def parse_weight_dtype(fields: HfFields) -> Literal["bfloat16", "float32"]:
    return fields.choice("dtype", "torch_dtype", of=("bfloat16", "float32"), default="bfloat16")


def parse_bos(fields: HfFields) -> int | None:
    return fields.integer("bos_token_id", default=None, minimum=0)


def parse_eos(fields: HfFields) -> tuple[int, ...]:
    value = fields.raw("eos_token_id", default=[])
    if isinstance(value, (list, tuple)):
        return fields.integers("eos_token_id", default=())
    return (fields.integer("eos_token_id", minimum=0),)


def report_unread(fields: HfFields) -> None:
    """Says which keys nobody looked at; those known to change results were refused before."""
    fields.ignore(*_WITHOUT_EFFECT)
    if left := fields.unread():
        _log.warning("%s: keys not understood and not used: %s", fields.where, ", ".join(left))
