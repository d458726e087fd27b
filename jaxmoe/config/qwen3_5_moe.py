"""config.json of Qwen3_5MoeForConditionalGeneration (Qwen3.5 and 3.6 MoE): its text model, a
Qwen3-Next with its projections apart.

The vision tower is not run; prompts are text.
"""

from __future__ import annotations

import dataclasses

from jaxmoe.common.errors import ConfigError
from jaxmoe.config import shared_fields
from jaxmoe.config.hf_fields import HfFields
from jaxmoe.config.model_config import ModelConfig
from jaxmoe.config.qwen3_next import parse_text

# Of the part that sees, and of how its input is marked.
_OF_VISION = (
    *("vision_config", "image_token_id", "video_token_id"),
    *("vision_start_token_id", "vision_end_token_id"),
)
# Of the draft layers, which are not run.
_OF_DRAFTS = ("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings")


def parse(fields: HfFields, architecture: str) -> ModelConfig:
    fields.choice("model_type", of=("qwen3_5_moe",))
    text = fields.table("text_config")
    if text is None:
        raise ConfigError(f"{fields.where} lacks 'text_config'")
    text.choice("model_type", of=("qwen3_5_moe_text",))
    text.choice("mlp_only_layers", of=([],), default=[])
    text.choice("decoder_sparse_step", of=(1,), default=1)
    text.choice("norm_topk_prob", of=(True,), default=True)
    # The outer key decides, as it does in transformers; the inner one has the class's default.
    tied = fields.boolean("tie_word_embeddings", default=False)
    text.choice("tie_word_embeddings", of=(tied,), default=tied)
    fields.ignore(*_OF_VISION)
    text.ignore(*_OF_DRAFTS)
    parsed = parse_text(text, architecture, fused=False, renormalize=True)
    if fields.given("quantization_config") or fields.given("compression_config"):
        if parsed.quant.format != "none":
            raise fields.fail("quantization_config", "given twice", "one, at either level")
        parsed = dataclasses.replace(parsed, quant=shared_fields.parse_quant(fields))
    fields.ignore("dtype", "torch_dtype", "language_model_only")  # the text model's own count
    outer_bos, outer_eos = shared_fields.parse_bos(fields), shared_fields.parse_eos(fields)
    shared_fields.report_unread(fields)
    return dataclasses.replace(
        parsed,
        model_type="qwen3_5_moe",
        tie_embeddings=tied,
        bos_token_id=parsed.bos_token_id if outer_bos is None else outer_bos,
        eos_token_ids=outer_eos or parsed.eos_token_ids,
    )
