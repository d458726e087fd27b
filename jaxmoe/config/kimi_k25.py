"""config.json of KimiK25ForConditionalGeneration (Kimi-K2.5, K2.6): its text model, a Kimi-K2.

The vision tower is not run; prompts are text.
"""

from __future__ import annotations

import dataclasses

from jaxmoe.common.errors import ConfigError
from jaxmoe.config import deepseek, shared_fields
from jaxmoe.config.hf_fields import HfFields
from jaxmoe.config.model_config import ModelConfig

# Of the part that sees, and of how its input is marked.
_OF_VISION = (
    *("vision_config", "media_placeholder_token_id", "use_unified_vision_chunk"),
    *("video_placeholder", "ignore_index"),
)
# Sampling defaults that transformers 4 wrote into every nested config.
_OF_SAMPLING = (
    *("length_penalty", "max_length", "num_beams", "num_beam_groups", "num_return_sequences"),
    *("temperature", "top_k", "top_p", "typical_p", "repetition_penalty"),
)


def parse(fields: HfFields, architecture: str) -> ModelConfig:
    fields.choice("model_type", of=("kimi_k25",))
    text = fields.table("text_config")
    if text is None:
        raise ConfigError(f"{fields.where} lacks 'text_config'")
    fields.choice("tie_word_embeddings", of=(False,), default=False)
    fields.ignore(*_OF_VISION)
    text.ignore(*_OF_SAMPLING)
    parsed = deepseek.parse(text, "DeepseekV3ForCausalLM")
    if fields.given("quantization_config") or fields.given("compression_config"):
        if parsed.quant.format != "none":
            raise fields.fail("quantization_config", "given twice", "one, at either level")
        parsed = dataclasses.replace(parsed, quant=shared_fields.parse_quant(fields))
    fields.ignore(
        "dtype", "torch_dtype"
    )  # of the nested config, which the text model was read from
    outer_bos, outer_eos = shared_fields.parse_bos(fields), shared_fields.parse_eos(fields)
    shared_fields.report_unread(fields)
    return dataclasses.replace(
        parsed,
        architecture=architecture,
        model_type="kimi_k25",
        bos_token_id=parsed.bos_token_id if outer_bos is None else outer_bos,
        eos_token_ids=outer_eos or parsed.eos_token_ids,
    )
