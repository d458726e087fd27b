"""Which architectures there are, and everything a loader or engine needs of one.

In order: `stored_formats` (how the checkpoint holds each linear map) or `configured_formats` (for
random weights) -> `describe_model` (the structure and its leaves, nothing allocated) -> `name_map`
(where each leaf comes from).
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Collection, Mapping

import jax

from jaxmoe.common.errors import CheckpointError
from jaxmoe.config.model_config import MlaConfig, ModelConfig
from jaxmoe.models.decoder import Decoder
from jaxmoe.models.deepseek_names import DeepseekNames, IndexedNames, head_map_format
from jaxmoe.models.deepseek_v4_names import DeepseekV4Names
from jaxmoe.models.glm4_moe_names import Glm4MoeNames
from jaxmoe.models.gpt_oss_names import GptOssNames
from jaxmoe.models.kimi_k25_names import KimiK25Names
from jaxmoe.models.minimax_m2_names import MiniMaxM2Names
from jaxmoe.models.mixtral_names import MixtralNames
from jaxmoe.models.names import HfNames
from jaxmoe.models.qwen3_moe_names import Qwen3MoeNames
from jaxmoe.models.qwen3_next_names import Qwen3NextNames, Qwen35MoeNames
from jaxmoe.models.stored_forms import PLAIN, configured_form, find_form
from jaxmoe.quant.formats import FORMATS, WeightFormat
from jaxmoe.weights.param_spec import Description, Formats, ParamSpec, describe
from jaxmoe.weights.stored_form import Forms, HasShape, StoredForm

_log = logging.getLogger(__name__)


# Small maps that no quantization touches, whether or not config.json lists them.
_NEVER_QUANTIZED = (
    *(".router.logits", ".shared_gate", ".indexer.head_weights"),
    *(".attention.ba", ".attention.b", ".attention.a"),
    *(".compressor.kv", ".compressor.gate"),
)


@dataclasses.dataclass(frozen=True)
class Family:
    """What sets an architecture apart beyond its `ModelConfig`.

    models: which ones have it, in the words of the README. has_draft_head: whether they may ship
    one that models/draft.py describes.
    """

    names: type[HfNames]
    models: str
    has_draft_head: bool = False


SUPPORTED: Mapping[str, Family] = {
    "DeepseekV2ForCausalLM": Family(DeepseekNames, "DeepSeek-V2, V2-Lite, Coder-V2"),
    "DeepseekV3ForCausalLM": Family(
        DeepseekNames, "DeepSeek-V3, R1, V3.1; Kimi-K2-Instruct, K2-Thinking (`kimi_k2`)", True
    ),
    "DeepseekV32ForCausalLM": Family(IndexedNames, "DeepSeek-V3.2"),
    "DeepseekV4ForCausalLM": Family(DeepseekV4Names, "DeepSeek-V4, V4-Flash"),
    "Glm4MoeForCausalLM": Family(Glm4MoeNames, "GLM-4.5, 4.5-Air, 4.6, 4.7", True),
    "Glm4MoeLiteForCausalLM": Family(DeepseekNames, "GLM-4.7-Flash", True),
    "GlmMoeDsaForCausalLM": Family(
        IndexedNames,
        "GLM-5, 5.1, 5.2",
    ),
    "GptOssForCausalLM": Family(GptOssNames, "gpt-oss-20b, 120b"),
    "KimiK25ForConditionalGeneration": Family(
        KimiK25Names, "Kimi-K2.5, K2.6 (INT4, as K2-Thinking): the text model"
    ),
    "MiniMaxM2ForCausalLM": Family(MiniMaxM2Names, "MiniMax-M2, M2.1, M2.5, M2.7"),
    "MixtralForCausalLM": Family(MixtralNames, "Mixtral-8x7B, 8x22B"),
    "OlmoeForCausalLM": Family(Qwen3MoeNames, "OLMoE-1B-7B"),
    "Qwen3MoeForCausalLM": Family(Qwen3MoeNames, "Qwen3-30B-A3B, 235B-A22B, Coder-480B-A35B"),
    "Qwen3NextForCausalLM": Family(Qwen3NextNames, "Qwen3-Next-80B-A3B"),
    "Qwen3_5MoeForConditionalGeneration": Family(
        Qwen35MoeNames,
        "Qwen3.5 and Qwen3.6 MoE (35B-A3B, 122B-A10B, 397B-A17B): the text model",
    ),
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


def name_map(
    config: ModelConfig,
    specs: Mapping[str, ParamSpec],
    formats: Forms | None = None,
    tensors: Collection[str] = (),
) -> HfNames:
    """Where the leaves of a description come from in a Hugging Face checkpoint, whose `formats` it
    was made with.

    tensors: the names that there are, for families with more than one layout; none: as published.
    """
    return SUPPORTED[config.architecture].names.of(tensors)(config, specs, formats)


def stored_formats(config: ModelConfig, tensors: Mapping[str, HasShape]) -> Forms:
    """Formats as the checkpoint's headers have them.

    Args:
        config: the model.
        tensors: all tensors in the checkpoint by name, with safetensors dtype ("BF16") and shape.
    """
    names = name_map(config, {}, tensors=tensors)

    def stored(path: str) -> StoredForm:
        name = names.weight_name(path)
        form = find_form(name, tensors, config.quant)
        if path == "embedding" and form not in PLAIN.values():
            dtype = tensors[form.weight_name(name)].dtype
            raise CheckpointError(f"tensor '{name}' is stored as {dtype}; supported: BF16, F32")
        return form

    return _with_head_maps(config, functools.cache(stored))


def configured_formats(config: ModelConfig) -> Forms:
    """Formats as a checkpoint of this configuration would have them, for random weights."""
    names, quant = name_map(config, {}), config.quant
    plain = PLAIN["BF16" if config.weight_dtype == "bfloat16" else "F32"]

    def configured(path: str) -> StoredForm:
        if path.endswith(".router.logits") and config.moe.router.float32_weights:
            return PLAIN["F32"]
        if path.endswith("streams.fn") or path == "streams_head.fn":
            return PLAIN["F32"]
        if path.endswith(_NEVER_QUANTIZED) or path in ("embedding", "lm_head", "draft.join"):
            return plain
        if quant.only_experts and not path.endswith(".mlp.experts"):
            return plain
        if not quant.converts(names.module_name(path)):
            return plain
        return configured_form(quant, is_experts=path.endswith(".mlp.experts"))

    return _with_head_maps(config, configured)


def _with_head_maps(config: ModelConfig, stored: Callable[[str], StoredForm]) -> Forms:
    """MLA's per-head maps are cut out of a stored matrix, which not every format survives."""
    attention = config.attention

    def held(path: str, stored: WeightFormat) -> WeightFormat:
        if not isinstance(attention, MlaConfig) or not path.endswith((".w_uk", ".w_uv")):
            return stored
        held = head_map_format(attention, stored, path.rpartition(".")[2])
        if held != stored:
            _log.warning(
                "%s: held as float32, %d times its stored bytes: cut into %d and %d rows a head "
                "and turned, its %s values lack scales to go with",
                path,
                32 // FORMATS[stored].bits,
                attention.nope_head_dim,
                attention.v_head_dim,
                stored,
            )
        return held

    return Forms(stored, held)
