"""Which architectures there are, and everything a loader or engine needs of one.

In order: `stored_formats` (how the checkpoint holds each linear map) or `configured_formats` (for
random weights) -> `describe_model` (the structure and its leaves, nothing allocated) -> `name_map`
(where each leaf comes from).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping

import jax

from jaxmoe.common.errors import CheckpointError
from jaxmoe.config.model_config import MlaConfig, ModelConfig
from jaxmoe.models.decoder import Decoder
from jaxmoe.models.deepseek_names import DeepseekNames, IndexedNames, head_map_format
from jaxmoe.models.glm4_moe_names import Glm4MoeNames
from jaxmoe.models.gpt_oss_names import GptOssNames
from jaxmoe.models.kimi_k25_names import KimiK25Names
from jaxmoe.models.minimax_m2_names import MiniMaxM2Names
from jaxmoe.models.mixtral_names import MixtralNames
from jaxmoe.models.names import HfNames
from jaxmoe.models.qwen3_moe_names import Qwen3MoeNames
from jaxmoe.models.qwen3_next_names import Qwen3NextNames, Qwen35MoeNames
from jaxmoe.weights.param_spec import Description, Formats, ParamSpec, WeightFormat, describe

_log = logging.getLogger(__name__)

_FORMAT_OF_DTYPE: Mapping[str, WeightFormat] = {
    "BF16": "bf16",
    "F32": "f32",
    "F8_E4M3": "fp8_block",
}


# Small maps that no quantization touches, whether or not config.json lists them.
_NEVER_QUANTIZED = (
    *(".router.logits", ".shared_gate"),
    *(".attention.ba", ".attention.b", ".attention.a"),
)


@dataclasses.dataclass(frozen=True)
class Family:
    """What sets an architecture apart beyond its `ModelConfig`."""

    names: type[HfNames]


SUPPORTED: Mapping[str, Family] = {
    "DeepseekV2ForCausalLM": Family(DeepseekNames),
    "DeepseekV3ForCausalLM": Family(DeepseekNames),
    "DeepseekV32ForCausalLM": Family(IndexedNames),
    "Glm4MoeForCausalLM": Family(Glm4MoeNames),
    "Glm4MoeLiteForCausalLM": Family(DeepseekNames),
    "GlmMoeDsaForCausalLM": Family(IndexedNames),
    "GptOssForCausalLM": Family(GptOssNames),
    "KimiK25ForConditionalGeneration": Family(KimiK25Names),
    "MiniMaxM2ForCausalLM": Family(MiniMaxM2Names),
    "MixtralForCausalLM": Family(MixtralNames),
    "OlmoeForCausalLM": Family(Qwen3MoeNames),
    "Qwen3MoeForCausalLM": Family(Qwen3MoeNames),
    "Qwen3NextForCausalLM": Family(Qwen3NextNames),
    "Qwen3_5MoeForConditionalGeneration": Family(Qwen35MoeNames),
}


def build_model(
    config: ModelConfig, compute_dtype: jax.typing.DTypeLike, formats: Formats
) -> Decoder:
    """The model with zeros for weights; call it under `nnx.eval_shape`, or `describe_model`."""
    return Decoder(config, compute_dtype, formats)


def describe_model(
    config: ModelConfig, compute_dtype: jax.typing.DTypeLike, formats: Formats
) -> Description:
    """The model's structure and leaves; allocates nothing."""
    return describe(lambda: build_model(config, compute_dtype, formats))


def name_map(config: ModelConfig, specs: Mapping[str, ParamSpec]) -> HfNames:
    """Where the leaves of a description come from in a Hugging Face checkpoint."""
    return SUPPORTED[config.architecture].names(config, specs)


def stored_formats(config: ModelConfig, dtypes: Mapping[str, str]) -> Formats:
    """Formats as the checkpoint's headers have them.

    Args:
        config: the model.
        dtypes: tensor name to safetensors dtype ("BF16") of all tensors in the checkpoint.
    """
    names = name_map(config, {})

    def stored(path: str) -> WeightFormat:
        name = names.weight_name(path)
        if name not in dtypes:
            raise CheckpointError(f"tensor '{name}' is missing from the checkpoint")
        dtype = dtypes[name]
        if dtype not in _FORMAT_OF_DTYPE:
            raise CheckpointError(
                f"tensor '{name}' is stored as {dtype}; supported: {', '.join(_FORMAT_OF_DTYPE)}"
            )
        if dtype == "F8_E4M3" and config.quant.format != "fp8_block":
            raise CheckpointError(
                f"tensor '{name}' is stored as {dtype}, but config.json describes no FP8 weights; "
                "add its quantization_config"
            )
        if dtype == "F8_E4M3" and path == "embedding":
            raise CheckpointError(f"tensor '{name}' is stored as {dtype}; supported: BF16, F32")
        return _FORMAT_OF_DTYPE[dtype]

    return _with_head_maps(config, stored)


def configured_formats(config: ModelConfig) -> Formats:
    """Formats as a checkpoint of this configuration would have them, for random weights."""
    names = name_map(config, {})
    plain: WeightFormat = "bf16" if config.weight_dtype == "bfloat16" else "f32"

    def kept(module: str) -> bool:
        return any(
            module == entry or module.startswith(entry + ".") or module.endswith("." + entry)
            for entry in config.quant.not_converted
        )

    def configured(path: str) -> WeightFormat:
        if path.endswith(".router.logits") and config.moe.router.float32_weights:
            return "f32"
        if config.quant.format == "none" or path in ("embedding", "lm_head"):
            return plain
        if path.endswith(_NEVER_QUANTIZED) or kept(names.module_name(path)):
            return plain
        return "fp8_block"

    return _with_head_maps(config, configured)


def _with_head_maps(config: ModelConfig, formats: Formats) -> Formats:
    """MLA's per-head maps are cut out of a stored matrix, which not every format survives."""
    attention = config.attention

    def with_head_maps(path: str) -> WeightFormat:
        stored = formats(path)
        if not isinstance(attention, MlaConfig) or not path.endswith((".w_uk", ".w_uv")):
            return stored
        held = head_map_format(attention, stored)
        if held != stored:
            _log.warning(
                "%s: held as float32, four times its stored bytes: "
                "heads of %d + %d rows cut through 128-row scale blocks",
                path,
                attention.nope_head_dim,
                attention.v_head_dim,
            )
        return held

    return with_head_maps
