"""Tiny random checkpoints in the shipped layout, from seeds, with numpy alone.

Head dims, latent rank, rope and router settings are the published models'; widths, depth and
vocabulary are tiny. Norm weights and biases are random too, so that every term of the model shows
in its logits. Values come from raw generator bits, whose stream numpy guarantees, so a seed means
the same weights everywhere.

Used by the parity tests and, with torch, by tools/make_parity_fixtures.py.
"""

from __future__ import annotations

import functools
import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from support import tiny_quant
from support.tiny_quant import BF16, E8M0, F16, F32, FP8

CONFIG_DIR = Path(__file__).parents[2] / "configs" / "tiny"
# Every case, and what the README calls it.
TITLES = {
    "deepseek_v2_lite": "DeepSeek-V2-Lite-like, BF16",
    "deepseek_v2": "DeepSeek-V2-like, BF16",
    "deepseek_v3": "DeepSeek-V3-like, BF16",
    "deepseek_v3_fp8": "DeepSeek-V3-like, FP8",
    "kimi_k2": "Kimi-K2-like, BF16",
    "kimi_k2_fp8": "Kimi-K2-like, FP8",
    "qwen3_moe": "Qwen3-MoE-like, BF16",
    "qwen3_moe_fp8": "Qwen3-MoE-like, FP8",
    "mixtral": "Mixtral-like, BF16",
    "olmoe": "OLMoE-like, BF16",
    "glm4_moe": "GLM-4.5-like, BF16",
    "glm4_moe_lite": "GLM-4.7-Flash-like, BF16",
    "minimax_m2": "MiniMax-M2-like, BF16",
    "minimax_m2_fp8": "MiniMax-M2-like, FP8",
    "kimi_k25": "Kimi-K2.5-like, BF16",
    "gpt_oss": "gpt-oss-like, BF16",
    "deepseek_v32_fp8": "DeepSeek-V3.2-like, FP8",
    "glm_moe_dsa": "GLM-5-like, BF16",
    "qwen3_next": "Qwen3-Next-like, BF16",
    "qwen3_next_fp8": "Qwen3-Next-like, FP8",
    "qwen3_5_moe": "Qwen3.5-like, BF16",
    "qwen3_5_moe_fp8": "Qwen3.5-like, FP8",
    "glm4_moe_fp8": "GLM-4.5-like, FP8 channel",
    "kimi_k2_int4": "Kimi-K2-Thinking-like, INT4",
    "gpt_oss_mxfp4": "gpt-oss-like, MXFP4",
    "deepseek_v31_fp8": "DeepSeek-V3.1-like, FP8 (e8m0 scales)",
    "qwen3_moe_mxfp4": "Qwen3-MoE-like, MXFP4",
    "qwen3_moe_int4": "Qwen3-MoE-like, INT4 in groups of 128",
    "minimax_m2_mxfp8": "MiniMax-M2-like, MXFP8",
    "qwen3_moe_awq": "Qwen3-MoE-like, AWQ",
    "qwen3_moe_gptq": "Qwen3-MoE-like, GPTQ in groups of 64",
    "qwen3_moe_nvfp4": "Qwen3-MoE-like, NVFP4",
    "deepseek_v3_nvfp4": "DeepSeek-V3-like, NVFP4 (ModelOpt)",
    "kimi_k25_int4": "Kimi-K2.5-like, INT4",
    "deepseek_v2_fp8": "DeepSeek-V2-like, FP8",
    "glm_moe_dsa_fp8": "GLM-5-like, FP8",
    "deepseek_v32_sparse": "DeepSeek-V3.2-like, FP8, contexts beyond index_topk",
    "glm_moe_dsa_sparse": "GLM-5-like, BF16, contexts beyond index_topk",
    "deepseek_v4": "DeepSeek-V4-like, FP8 and MXFP4, contexts beyond window and index_topk",
    "glm_moe_dsa_shared": "GLM-5.2-like, BF16, contexts beyond index_topk",
    "mixtral_awq": "Mixtral-like, AWQ",
    "glm4_moe_awq": "GLM-4.5-like, AWQ",
    "glm4_moe_int4": "GLM-4.5-like, INT4 with zero points",
    "glm4_moe_nvfp4": "GLM-4.5-like, NVFP4 (ModelOpt)",
    "glm4_moe_lite_fp8": "GLM-4.7-Flash-like, FP8 channel",
    "minimax_m2_awq": "MiniMax-M2-like, AWQ",
    "minimax_m2_nvfp4": "MiniMax-M2-like, NVFP4 (ModelOpt)",
    "deepseek_v3_awq": "DeepSeek-V3-like, AWQ",
    "deepseek_v32_nvfp4": "DeepSeek-V3.2-like, NVFP4 (ModelOpt)",
    "glm_moe_dsa_nvfp4": "GLM-5-like, NVFP4 (ModelOpt)",
    "kimi_k25_nvfp4": "Kimi-K2.5-like, NVFP4 (ModelOpt)",
    "qwen3_next_int4": "Qwen3-Next-like, INT4 with zero points",
    "qwen3_5_moe_gptq": "Qwen3.5-like, GPTQ",
    "qwen3_5_moe_nvfp4": "Qwen3.5-like, NVFP4 (ModelOpt)",
}
CASES = tuple(TITLES)
# Formats of other cases in other models, whose modules and kernels those run: for the slow run.
COMBINED = (
    *("kimi_k25_int4", "deepseek_v2_fp8", "glm_moe_dsa_fp8"),
    *("mixtral_awq", "glm4_moe_awq", "minimax_m2_awq", "deepseek_v3_awq", "qwen3_5_moe_gptq"),
    *("glm4_moe_nvfp4", "minimax_m2_nvfp4", "deepseek_v32_nvfp4", "glm_moe_dsa_nvfp4"),
    *("kimi_k25_nvfp4", "qwen3_5_moe_nvfp4", "qwen3_next_int4", "glm4_moe_lite_fp8"),
)
# The format of the routed experts in the quantized ones.
FORMATS = {
    **dict.fromkeys(
        (
            *("deepseek_v3_fp8", "kimi_k2_fp8", "qwen3_moe_fp8", "minimax_m2_fp8"),
            *("deepseek_v32_fp8", "deepseek_v31_fp8", "qwen3_next_fp8", "qwen3_5_moe_fp8"),
            *("deepseek_v32_sparse", "deepseek_v2_fp8", "glm_moe_dsa_fp8"),
        ),
        "fp8_block",
    ),
    "glm4_moe_fp8": "fp8_channel",
    "deepseek_v4": "mxfp4",
    "kimi_k2_int4": "int4_g32",
    "kimi_k25_int4": "int4_g32",
    "qwen3_moe_awq": "uint4_g128",
    "qwen3_moe_gptq": "uint4_g32",
    "qwen3_moe_nvfp4": "nvfp4",
    "deepseek_v3_nvfp4": "nvfp4",
    "qwen3_moe_int4": "int4_g128",
    "gpt_oss_mxfp4": "mxfp4",
    "qwen3_moe_mxfp4": "mxfp4",
    "minimax_m2_mxfp8": "mxfp8",
    "glm4_moe_lite_fp8": "fp8_channel",
    **dict.fromkeys(("mixtral_awq", "glm4_moe_awq", "minimax_m2_awq"), "uint4_g128"),
    **dict.fromkeys(("deepseek_v3_awq", "qwen3_5_moe_gptq"), "uint4_g128"),
    **dict.fromkeys(("glm4_moe_int4", "qwen3_next_int4"), "uint4_g32"),
    **dict.fromkeys(("glm4_moe_nvfp4", "minimax_m2_nvfp4", "deepseek_v32_nvfp4"), "nvfp4"),
    **dict.fromkeys(("glm_moe_dsa_nvfp4", "kimi_k25_nvfp4", "qwen3_5_moe_nvfp4"), "nvfp4"),
}
# Written as several files with an index; the others are one file.
SHARDED = (
    *("deepseek_v3", "qwen3_moe_fp8", "minimax_m2_fp8", "kimi_k25", "kimi_k2_int4"),
    *("qwen3_5_moe", "deepseek_v4"),
)
_GATED_DELTA = ("qwen3_next", "qwen3_5_moe_text")  # model types with linear attention

DTYPE_NAMES = {
    BF16: "BF16",
    FP8: "F8_E4M3",
    F32: "F32",
    F16: "F16",
    E8M0: "F8_E8M0",
    np.dtype(np.int32): "I32",
    np.dtype(np.int64): "I64",
    np.dtype(np.int8): "I8",
    np.dtype(np.uint8): "U8",
}


def hf_config(case: str) -> dict[str, Any]:
    return json.loads((CONFIG_DIR / f"{case}.json").read_text())


def _normal(name: str, seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """About normal with variance 1, from the bits alone: sums of four 16-bit uniforms; float32."""
    count = int(np.prod(shape))
    bits = np.random.PCG64(seed * 1_000_003 + zlib.crc32(name.encode())).random_raw(count)
    quarters = bits.view(np.uint16).reshape(count, 4).astype(np.int64)
    centred = quarters.sum(axis=1) - 2 * 65535
    # Each uniform has variance 65536²/12, so the sum has 65536²/3.
    return (centred.astype(np.float64) * (3**0.5 / 65536)).astype(np.float32).reshape(shape)


def _published(config: Mapping[str, Any], name: str) -> str:
    """The name of a text model's tensor or module within the model of `config`."""
    if config["model_type"] == "kimi_k25":
        return f"language_model.{name}"
    if config["model_type"] == "qwen3_5_moe" and name.startswith("model."):
        return "model.language_model." + name.removeprefix("model.")
    return name


class _Builder:
    """config: of the language model. whole: of the model that it may be a part of."""

    def __init__(self, config: Mapping[str, Any], whole: Mapping[str, Any], seed: int):
        self.config, self._whole = config, whole
        self.seed = seed
        self.tensors: dict[str, np.ndarray] = {}
        self.scheme = tiny_quant.Scheme(config)
        # Norm weights of these are stored as what they are beyond 1.
        self.norm_centre = 0.0 if config["model_type"] in _GATED_DELTA else 1.0

    def matrix(
        self,
        name: str,
        n: int,
        k: int,
        gain: float = 1.0,
        *,
        plain: bool = False,
        dtype: np.dtype = BF16,
    ) -> None:
        """A linear map whose outputs have about `gain` times the variance of its inputs.

        `plain`: not quantized, whatever the case, but of `dtype`.
        """
        w = _normal(name, self.seed, (n, k)) * np.float32(gain / k**0.5)
        quantized = None if plain else self.scheme.tensors(_published(self._whole, name), w)
        if quantized is None:
            quantized = {".weight": w.astype(dtype)}
        self.tensors |= {name + suffix: array for suffix, array in quantized.items()}

    def norm(self, name: str, size: int) -> None:
        w = self.norm_centre + 0.3 * _normal(name, self.seed, (size,))
        self.tensors[f"{name}.weight"] = w.astype(BF16)

    def vector(self, name: str, shape: tuple[int, ...], size: float = 0.5) -> None:
        self.tensors[name] = (size * _normal(name, self.seed, shape)).astype(BF16)

    def packed(self, name: str, num_experts: int, n: int, k: int, gain: float) -> None:
        """All experts in one tensor: inputs first, or in MXFP4 outputs first, in groups."""
        if not self.scheme.is_mxfp4_experts:
            self.vector(name, (num_experts, k, n), gain / k**0.5)
            return
        w = _normal(name, self.seed, (num_experts * n, k)) * np.float32(gain / k**0.5)
        blocks, scales = tiny_quant.mxfp4_blocks(w)
        self.tensors[f"{name}_blocks"] = blocks.reshape(num_experts, n, k // 32, 16)
        self.tensors[f"{name}_scales"] = scales.reshape(num_experts, n, k // 32)

    def mlp(self, prefix: str, hidden: int, width: int) -> None:
        self.matrix(f"{prefix}.gate_proj", width, hidden, 1.5)
        self.matrix(f"{prefix}.up_proj", width, hidden, 1.5)
        self.matrix(f"{prefix}.down_proj", hidden, width)


@functools.lru_cache(maxsize=2)
def make_tensors(case: str, seed: int = 0) -> Mapping[str, np.ndarray]:
    """All tensors of a case by their published names, with those a loader has to ignore."""
    whole = hf_config(case)
    config = whole.get("text_config", whole)
    if "quantization_config" in whole:  # outside the text model's
        config = config | {"quantization_config": whole["quantization_config"]}
    b = _Builder(config, whole, seed)
    if config["model_type"] == "deepseek_v4":
        _deepseek_v4(b)
        return b.tensors
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    b.tensors["model.embed_tokens.weight"] = _normal("embed", seed, (vocab, hidden)).astype(BF16)
    num_layers = config["num_hidden_layers"]
    num_extra = config.get("num_nextn_predict_layers", 0)
    for i in range(num_layers + num_extra):
        prefix = f"model.layers.{i}"
        b.norm(f"{prefix}.input_layernorm", hidden)
        b.norm(f"{prefix}.post_attention_layernorm", hidden)
        if config["model_type"] in _GATED_DELTA and (i + 1) % config["full_attention_interval"]:
            _gated_delta(b, f"{prefix}.linear_attn")
        elif "kv_lora_rank" in config:
            _mla(b, f"{prefix}.self_attn", has_indexer=_has_indexer(config, i))
        else:
            _gqa(b, f"{prefix}.self_attn")
        if i < config.get("first_k_dense_replace", 0):
            b.mlp(f"{prefix}.mlp", hidden, config["intermediate_size"])
        elif config["model_type"] == "qwen3_5_moe_text" and not b.scheme.is_given:
            _packed_rows_moe(b, f"{prefix}.mlp")
        elif config["model_type"] == "gpt_oss":
            _packed_moe(b, f"{prefix}.mlp")
        elif config["model_type"] in ("mixtral", "minimax_m2"):
            _block_sparse_moe(b, f"{prefix}.block_sparse_moe")
        else:
            _moe(b, f"{prefix}.mlp")
    for i in range(num_layers, num_layers + num_extra):  # the draft head of training
        prefix = f"model.layers.{i}"
        b.norm(f"{prefix}.enorm", hidden)
        b.norm(f"{prefix}.hnorm", hidden)
        b.matrix(f"{prefix}.eh_proj", hidden, 2 * hidden, plain=True)
        b.norm(f"{prefix}.shared_head.norm", hidden)
        b.tensors[f"{prefix}.embed_tokens.weight"] = b.tensors["model.embed_tokens.weight"]
    if case == "deepseek_v2":  # as early conversions have them
        for i in range(num_layers):
            name = f"model.layers.{i}.self_attn.rotary_emb.inv_freq"
            b.tensors[name] = np.ones(32, np.float32)
    b.norm("model.norm", hidden)
    b.matrix("lm_head", vocab, hidden, 2.0, plain=True)
    if b.scheme.has_rounded_cache:
        for i in range(num_layers):
            for which in "kv":
                name = f"model.layers.{i}.self_attn.{which}_proj.{which}_scale"
                b.tensors[name] = np.array(0.5, np.float32)
    b.tensors = {_published(whole, name): array for name, array in b.tensors.items()}
    if whole["model_type"] == "kimi_k25":  # the text model of a larger one
        b.matrix("vision_tower.encoder.blocks.0.wqkv", 192, 64)
        b.matrix("mm_projector.linear_1", 64, 64)
    if whole["model_type"] == "qwen3_5_moe":
        b.matrix("model.visual.blocks.0.attn.qkv", 192, 64, plain=True)
    if config["model_type"] in _GATED_DELTA:  # the draft head of training
        b.norm("mtp.norm", hidden)
        b.matrix("mtp.fc", hidden, 2 * hidden, plain=True)
    return b.tensors


def _deepseek_v4(b: _Builder) -> None:
    c = b.config
    hidden, vocab, streams = c["hidden_size"], c["vocab_size"], c["hc_mult"]
    b.tensors["embed.weight"] = _normal("embed", b.seed, (vocab, hidden)).astype(BF16)
    for i in range(c["num_hidden_layers"]):
        prefix = f"layers.{i}"
        b.norm(f"{prefix}.attn_norm", hidden)
        b.norm(f"{prefix}.ffn_norm", hidden)
        _v4_attention(b, f"{prefix}.attn", c["compress_ratios"][i])
        _v4_moe(b, f"{prefix}.ffn", is_hashed=i < c["num_hash_layers"])
        for block in ("attn", "ffn"):
            _v4_streams(b, f"{prefix}.hc_{block}", (2 + streams) * streams, 3)
    _v4_streams(b, "hc_head", streams, 1)
    b.norm("norm", hidden)
    b.matrix("head", vocab, hidden, 2.0, plain=True)
    b.norm("mtp.0.norm", hidden)  # the draft head of training
    b.matrix("mtp.0.e_proj", hidden, hidden)


def _v4_streams(b: _Builder, name: str, rows: int, num_scales: int) -> None:
    width = b.config["hc_mult"] * b.config["hidden_size"]
    fn = _normal(f"{name}_fn", b.seed, (rows, width)) * np.float32(width**-0.5)
    b.tensors[f"{name}_fn"] = fn
    b.tensors[f"{name}_base"] = np.float32(0.5) * _normal(f"{name}_base", b.seed, (rows,))
    b.tensors[f"{name}_scale"] = 1 + np.float32(0.2) * _normal(
        f"{name}_scale", b.seed, (num_scales,)
    )


def _v4_attention(b: _Builder, prefix: str, ratio: int) -> None:
    c = b.config
    hidden, heads, dim, rank = (
        *(c["hidden_size"], c["num_attention_heads"], c["head_dim"], c["q_lora_rank"]),
    )
    b.matrix(f"{prefix}.wq_a", rank, hidden)
    b.norm(f"{prefix}.q_norm", rank)
    b.matrix(f"{prefix}.wq_b", heads * dim, rank, 1.5)
    b.matrix(f"{prefix}.wkv", dim, hidden)
    b.norm(f"{prefix}.kv_norm", dim)
    b.matrix(f"{prefix}.wo_a", c["o_groups"] * c["o_lora_rank"], heads * dim // c["o_groups"], 2.0)
    b.matrix(f"{prefix}.wo_b", hidden, c["o_groups"] * c["o_lora_rank"], 2.0)
    name = f"{prefix}.attn_sink"
    b.tensors[name] = 2 * _normal(name, b.seed, (heads,))
    if ratio:
        _v4_compressor(b, f"{prefix}.compressor", ratio, dim)
    if ratio == 4:
        index_heads, index_dim = c["index_n_heads"], c["index_head_dim"]
        b.matrix(f"{prefix}.indexer.wq_b", index_heads * index_dim, rank)
        b.matrix(f"{prefix}.indexer.weights_proj", index_heads, hidden, plain=True)
        _v4_compressor(b, f"{prefix}.indexer.compressor", ratio, index_dim)


def _v4_compressor(b: _Builder, prefix: str, ratio: int, dim: int) -> None:
    row = 2 * dim if ratio == 4 else dim
    b.matrix(f"{prefix}.wkv", row, b.config["hidden_size"], plain=True)
    b.matrix(f"{prefix}.wgate", row, b.config["hidden_size"], plain=True)
    b.norm(f"{prefix}.norm", dim)
    name = f"{prefix}.ape"
    b.tensors[name] = _normal(name, b.seed, (ratio, row))


def _v4_moe(b: _Builder, prefix: str, *, is_hashed: bool) -> None:
    c = b.config
    hidden, width, num_experts = c["hidden_size"], c["moe_intermediate_size"], c["n_routed_experts"]
    b.matrix(f"{prefix}.gate", num_experts, hidden, 1.5, plain=True)
    if is_hashed:
        name, per_token = f"{prefix}.gate.tid2eid", c["num_experts_per_tok"]
        order = _normal(name, b.seed, (c["vocab_size"], num_experts)).argsort(axis=1, kind="stable")
        b.tensors[name] = np.ascontiguousarray(order[:, :per_token].astype(np.int64))
    else:
        name = f"{prefix}.gate.bias"
        b.tensors[name] = np.float32(0.2) * _normal(name, b.seed, (num_experts,))
    for e in range(num_experts):
        _v4_expert(b, f"{prefix}.experts.{e}", hidden, width)
    _v4_expert(b, f"{prefix}.shared_experts", hidden, width * c["n_shared_experts"])


def _v4_expert(b: _Builder, prefix: str, hidden: int, width: int) -> None:
    b.matrix(f"{prefix}.w1", width, hidden, 1.5)
    b.matrix(f"{prefix}.w3", width, hidden, 1.5)
    b.matrix(f"{prefix}.w2", hidden, width)


def _has_indexer(config: Mapping[str, Any], layer: int) -> bool:
    """The draft head has one in any case."""
    kinds = config.get("indexer_types", [])[layer : layer + 1]
    return "index_topk" in config and kinds != ["shared"]


def _mla(b: _Builder, prefix: str, *, has_indexer: bool) -> None:
    c = b.config
    hidden, heads, latent = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"]
    nope, rope, v = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    if c["q_lora_rank"] is None:
        b.matrix(f"{prefix}.q_proj", heads * (nope + rope), hidden, 1.5)
    else:
        b.matrix(f"{prefix}.q_a_proj", c["q_lora_rank"], hidden)
        b.norm(f"{prefix}.q_a_layernorm", c["q_lora_rank"])
        b.matrix(f"{prefix}.q_b_proj", heads * (nope + rope), c["q_lora_rank"], 1.5)
    b.matrix(f"{prefix}.kv_a_proj_with_mqa", latent + rope, hidden)
    b.norm(f"{prefix}.kv_a_layernorm", latent)
    b.matrix(f"{prefix}.kv_b_proj", heads * (nope + v), latent)
    b.matrix(f"{prefix}.o_proj", hidden, heads * v, 1.5)
    if has_indexer:
        index_heads, index_dim = c["index_n_heads"], c["index_head_dim"]
        b.matrix(f"{prefix}.indexer.wq_b", index_heads * index_dim, c["q_lora_rank"])
        b.matrix(f"{prefix}.indexer.wk", index_dim, hidden)
        b.norm(f"{prefix}.indexer.k_norm", index_dim)
        b.vector(f"{prefix}.indexer.k_norm.bias", (index_dim,))
        b.matrix(f"{prefix}.indexer.weights_proj", index_heads, hidden, plain=True)


def _gqa(b: _Builder, prefix: str) -> None:
    c = b.config
    hidden, num_heads = c["hidden_size"], c["num_attention_heads"]
    head_dim = c.get("head_dim") or hidden // num_heads
    q_row, kv_row = num_heads * head_dim, c["num_key_value_heads"] * head_dim
    q_and_gate = 2 * q_row if c["model_type"] in _GATED_DELTA else q_row
    for which, row in (("q", q_and_gate), ("k", kv_row), ("v", kv_row)):
        b.matrix(f"{prefix}.{which}_proj", row, hidden)
        if c.get("attention_bias"):
            b.vector(f"{prefix}.{which}_proj.bias", (row,))
    b.matrix(f"{prefix}.o_proj", hidden, q_row, 1.5)
    if c["model_type"] == "gpt_oss":
        b.vector(f"{prefix}.o_proj.bias", (hidden,))
        b.vector(f"{prefix}.sinks", (num_heads,), 2.0)
    if c["model_type"] in ("qwen3_moe", "glm4_moe", *_GATED_DELTA):
        b.norm(f"{prefix}.q_norm", head_dim)
        b.norm(f"{prefix}.k_norm", head_dim)
    elif c["model_type"] in ("olmoe", "minimax_m2"):
        b.norm(f"{prefix}.q_norm", q_row)
        b.norm(f"{prefix}.k_norm", kv_row)


def _gated_delta(b: _Builder, prefix: str) -> None:
    c = b.config
    hidden, keys, values = c["hidden_size"], c["linear_num_key_heads"], c["linear_num_value_heads"]
    key_row, value_row = keys * c["linear_key_head_dim"], values * c["linear_value_head_dim"]
    if c["model_type"] == "qwen3_next":
        b.matrix(f"{prefix}.in_proj_qkvz", 2 * key_row + 2 * value_row, hidden)
        b.matrix(f"{prefix}.in_proj_ba", 2 * values, hidden, plain=True)
    else:
        b.matrix(f"{prefix}.in_proj_qkv", 2 * key_row + value_row, hidden)
        b.matrix(f"{prefix}.in_proj_z", value_row, hidden)
        b.matrix(f"{prefix}.in_proj_b", values, hidden, plain=True)
        b.matrix(f"{prefix}.in_proj_a", values, hidden, plain=True)
    b.vector(f"{prefix}.conv1d.weight", (2 * key_row + value_row, 1, c["linear_conv_kernel_dim"]))
    # Half-lives from a token to a few dozen, so that old tokens and decay both show.
    name, bias = f"{prefix}.A_log", f"{prefix}.dt_bias"
    dtype = BF16 if c["model_type"] == "qwen3_next" else F32
    b.tensors[name] = (_normal(name, b.seed, (values,)) - 2.0).astype(dtype)
    b.tensors[bias] = (_normal(bias, b.seed, (values,))).astype(BF16)
    norm = 1.0 + 0.3 * _normal(f"{prefix}.norm", b.seed, (c["linear_value_head_dim"],))
    b.tensors[f"{prefix}.norm.weight"] = norm.astype(dtype)
    b.matrix(f"{prefix}.out_proj", hidden, value_row, 1.5)


def _moe(b: _Builder, prefix: str) -> None:
    c = b.config
    hidden, width = c["hidden_size"], c.get("moe_intermediate_size") or c["intermediate_size"]
    num_experts = c.get("n_routed_experts") or c["num_experts"]
    b.matrix(f"{prefix}.gate", num_experts, hidden, 1.5, plain=True)
    if c.get("topk_method") == "noaux_tc" or c["model_type"] in ("glm4_moe", "glm4_moe_lite"):
        name = f"{prefix}.gate.e_score_correction_bias"
        b.tensors[name] = 0.2 * _normal(name, b.seed, (num_experts,))
    if c.get("n_shared_experts"):
        b.mlp(f"{prefix}.shared_experts", hidden, width * c["n_shared_experts"])
    _gated_shared_expert(b, prefix)
    for e in range(num_experts):
        b.mlp(f"{prefix}.experts.{e}", hidden, width)


def _gated_shared_expert(b: _Builder, prefix: str) -> None:
    c = b.config
    if c["model_type"] in _GATED_DELTA:
        width = c["shared_expert_intermediate_size"]
        b.mlp(f"{prefix}.shared_expert", c["hidden_size"], width)
        b.matrix(f"{prefix}.shared_expert_gate", 1, c["hidden_size"], 1.5, plain=True)


def _packed_rows_moe(b: _Builder, prefix: str) -> None:
    """All experts in one tensor, outputs first, gate rows before up rows."""
    c = b.config
    hidden, width, num_experts = c["hidden_size"], c["moe_intermediate_size"], c["num_experts"]
    b.matrix(f"{prefix}.gate", num_experts, hidden, 1.5)
    _gated_shared_expert(b, prefix)
    b.vector(f"{prefix}.experts.gate_up_proj", (num_experts, 2 * width, hidden), 1.5 / hidden**0.5)
    b.vector(f"{prefix}.experts.down_proj", (num_experts, hidden, width), width**-0.5)


def _block_sparse_moe(b: _Builder, prefix: str) -> None:
    c = b.config
    hidden, width, num_experts = c["hidden_size"], c["intermediate_size"], c["num_local_experts"]
    is_minimax = c["model_type"] == "minimax_m2"
    router_dtype = F32 if is_minimax else BF16
    b.matrix(f"{prefix}.gate", num_experts, hidden, 1.5, plain=True, dtype=router_dtype)
    if is_minimax:
        name = f"{prefix}.e_score_correction_bias"
        b.tensors[name] = 0.2 * _normal(name, b.seed, (num_experts,))
    for e in range(num_experts):
        b.matrix(f"{prefix}.experts.{e}.w1", width, hidden, 1.5)
        b.matrix(f"{prefix}.experts.{e}.w3", width, hidden, 1.5)
        b.matrix(f"{prefix}.experts.{e}.w2", hidden, width)


def _packed_moe(b: _Builder, prefix: str) -> None:
    """All experts in one tensor, gate and up alternating. Values are large enough to reach the
    activation's limit.
    """
    c = b.config
    hidden, width, num_experts = c["hidden_size"], c["intermediate_size"], c["num_local_experts"]
    b.matrix(f"{prefix}.router", num_experts, hidden, 1.5)
    b.vector(f"{prefix}.router.bias", (num_experts,))
    b.packed(f"{prefix}.experts.gate_up_proj", num_experts, 2 * width, hidden, 3.0)
    b.vector(f"{prefix}.experts.gate_up_proj_bias", (num_experts, 2 * width))
    b.packed(f"{prefix}.experts.down_proj", num_experts, hidden, width, 0.5)
    b.vector(f"{prefix}.experts.down_proj_bias", (num_experts, hidden))


def digest(tensors: Mapping[str, np.ndarray]) -> str:
    """Tells whether two sets of tensors are the same, byte for byte."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        total.update(f"{name} {array.dtype} {array.shape}".encode())
        total.update(array.tobytes())
    return total.hexdigest()


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": DTYPE_NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as f:
        f.write(len(encoded).to_bytes(8, "little"))
        f.write(encoded)
        for array in tensors.values():
            f.write(np.ascontiguousarray(array).tobytes())


def write_checkpoint(directory: Path, case: str, seed: int = 0) -> Mapping[str, np.ndarray]:
    """Writes a case as a Hugging Face directory (no tokenizer) and returns its tensors."""
    tensors = make_tensors(case, seed)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf_config(case), indent=2))
    if case not in SHARDED:
        write_safetensors(directory / "model.safetensors", tensors)
        return tensors
    num_files = 3
    names = list(tensors)
    weight_map = {}
    for i in range(num_files):
        file = f"model-{i + 1:05d}-of-{num_files:05d}.safetensors"
        shard = {name: tensors[name] for name in names[i::num_files]}
        write_safetensors(directory / file, shard)
        weight_map.update(dict.fromkeys(shard, file))
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}}
    index["weight_map"] = weight_map
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors
