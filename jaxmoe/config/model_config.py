"""The frozen description of a model, parsed from a checkpoint's config.json.

`ModelConfig.from_hf` is the only door: outside this package nothing spells Hugging Face config
keys. Everything the layers need is here in our own terms, so a layer never asks which family it
belongs to.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN context extension (arXiv 2309.00071), with DeepSeek's mscale terms."""

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """`dim` may be less than a head's: then its first `dim` elements turn, or its last."""

    dim: int
    theta: float
    interleaved: bool
    scaling: YarnScaling | None = None
    at_end: bool = False


@dataclasses.dataclass(frozen=True)
class IndexerConfig:
    """What chooses the positions a token attends (DeepSeek-V3.2, arXiv 2512.02556 section 2.1).

    Of all positions up to a token's own, the `top_k` with the highest scores. The first `rope.dim`
    elements of an indexer's heads turn. sharing_layers: those that have none, and attend what the
    last one before them chose; never the first.
    """

    num_heads: int
    head_dim: int
    top_k: int
    rope: RopeConfig
    norm_eps: float = 1e-6
    sharing_layers: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class MlaConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434 section 2.1).

    indexer: with one, a token attends only what it chooses.
    """

    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    nope_head_dim: int
    rope_head_dim: int
    v_head_dim: int
    softmax_scale: float
    lora_norm_eps: float = 1e-6
    indexer: IndexerConfig | None = None

    kind: Literal["mla"] = "mla"


@dataclasses.dataclass(frozen=True)
class GqaConfig:
    """Grouped-query attention with its knobs.

    qk_norm: RMS norm of q and k, of each head or of all heads' row at once. qkv_clip: bound of
    what q, k and v are clamped to after the norm, None for none. sinks: a score a head that counts
    in its softmax and has no value. output_gate: q's map gives a gate a head too, after its query;
    the sigmoid of it multiplies what the head attends to.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    softmax_scale: float
    qk_norm: Literal["none", "head", "row"]
    qkv_bias: bool = False
    qkv_clip: float | None = None
    o_bias: bool = False
    sinks: bool = False
    output_gate: bool = False

    kind: Literal["gqa"] = "gqa"


LayerKind = Literal["window", "sparse", "heavy"]


@dataclasses.dataclass(frozen=True)
class CompressedConfig:
    """Attention to a window of positions and to compressed entries for all before (DeepSeek-V4).

    All heads share one vector a position, which is key and value; the turn of its last
    `rope.dim` elements is undone in what a head attends to. kinds: of each layer: "window" has
    nothing else; "sparse" an entry every 4 positions, made of 8, of which an indexer chooses
    `index_top_k`; "heavy" an entry every 128. compressed_rope: of layers that have entries.
    o_groups: parts of the heads' row that have an output map of rank `o_rank` each.
    """

    num_heads: int
    head_dim: int
    q_lora_rank: int
    window: int
    kinds: tuple[LayerKind, ...]
    compressed_rope: RopeConfig
    softmax_scale: float
    o_groups: int
    o_rank: int
    index_heads: int
    index_head_dim: int
    index_top_k: int
    sinks: bool = True

    kind: Literal["compressed"] = "compressed"

    def ratio(self, layer: int) -> int:
        """Positions an entry of a layer stands for; 0: it has none."""
        return {"window": 0, "sparse": 4, "heavy": 128}[self.kinds[layer]]


@dataclasses.dataclass(frozen=True)
class StreamsConfig:
    """Several residual streams, mixed by doubly stochastic matrices (arXiv 2512.24880).

    sinkhorn_iterations: of the normalisation that makes a matrix one; eps is added to its sums.
    """

    count: int
    sinkhorn_iterations: int
    eps: float


@dataclasses.dataclass(frozen=True)
class GatedDeltaConfig:
    """Linear attention by the gated delta rule (arXiv 2412.06464), with one decay a head.

    Each of the `num_key_heads` serves `num_value_heads / num_key_heads` value heads in a row.
    conv_width: tokens the causal convolution before it sees. fused_projections: one map makes
    query, key, value and output gate, another the update rate and the decay, all of them key head
    by key head.
    """

    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_width: int
    fused_projections: bool

    @property
    def conv_channels(self) -> int:
        """Elements of a token's query, key and value."""
        return 2 * self.num_key_heads * self.key_head_dim + self.value_row

    @property
    def value_row(self) -> int:
        return self.num_value_heads * self.value_head_dim


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """hashed_layers: those where a table of token ids names the experts; scores weigh them."""

    num_experts: int
    experts_per_token: int
    score: Literal["softmax", "sigmoid", "sqrtsoftplus"]
    correction_bias: bool
    renormalize: bool
    weight_scale: float
    num_groups: int = 1
    groups_per_token: int = 1
    group_score: Literal["max", "top2_sum"] = "max"
    renormalize_eps: float = 0.0
    logit_bias: bool = False
    float32_weights: bool = False  # stored in float32, whatever the model's own dtype
    hashed_layers: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class ClampedSwiglu:
    """(u + up_offset) g sigmoid(alpha g), with g = min(gate, limit), u = up within ±limit."""

    alpha: float
    limit: float
    up_offset: float = 1.0


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    router: RouterConfig
    expert_intermediate: int
    shared_intermediate: int  # 0: no shared experts
    activation: ClampedSwiglu | None = None  # None: silu(gate) * up
    shared_activation: ClampedSwiglu | None = None
    shared_gate: bool = False  # the shared experts' sum is weighed by the sigmoid of one more map
    expert_bias: bool = False


QuantFormat = Literal[
    "none",
    "fp8_block",
    "fp8_channel",
    "int4_g32",
    "int4_g128",
    "mxfp4",
    "mxfp8",
    "uint4_g32",
    "uint4_g128",
    "nvfp4",
]


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """How config.json says linear weights are stored; the tensors have the last word.

    format: "none" means plain `weight_dtype` tensors; otherwise a word of `WeightFormat`.
    not_converted: modules kept plain, by a name's whole, beginning or end, or after "re:" by a
    pattern of its beginning. converted: likewise, the only ones that are not; empty: all others.
    layout: whose names and dtypes the tensors have. only_experts: nothing but routed experts.
    group: inputs that share a scale, of 4-bit values with zero points. has_zeros: whether
    compressed-tensors has any (they are 8 where it has none). zeros_as_they_are: GPTQ's second
    version, whose zero points are not stored less one.
    mxfp4_experts: routed experts are MXFP4, whatever the format of the rest.
    """

    format: QuantFormat
    not_converted: tuple[str, ...] = ()
    layout: Literal[
        "fp8", "mxfp4", "mxfp8", "compressed-tensors", "awq", "gptq", "modelopt", "deepseek_v4"
    ] = "fp8"
    converted: tuple[str, ...] = ()
    only_experts: bool = False
    group: int = 0
    has_zeros: bool = False
    zeros_as_they_are: bool = False
    mxfp4_experts: bool = False

    def converts(self, module: str) -> bool:
        """Whether the linear map of that name is stored in `format`."""
        if self.format == "none" or _named(module, self.not_converted):
            return False
        return not self.converted or _named(module, self.converted)


def _named(module: str, entries: tuple[str, ...]) -> bool:
    return any(
        re.match(entry.removeprefix("re:"), module) is not None
        if entry.startswith("re:")
        else module == entry or module.startswith(entry + ".") or module.endswith("." + entry)
        for entry in entries
    )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    architecture: str  # e.g. "DeepseekV3ForCausalLM"
    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    mlp_types: tuple[Literal["dense", "moe"], ...]  # one a layer
    dense_intermediate: int
    norm_eps: float
    tie_embeddings: bool
    max_position: int
    attention: MlaConfig | GqaConfig | CompressedConfig
    rope: RopeConfig
    moe: MoeConfig
    quant: QuantConfig
    weight_dtype: Literal["bfloat16", "float32"]
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    # Last positions a token of each layer attends, None for all; empty: all in every layer.
    windows: tuple[int | None, ...] = ()
    # Layers that have `linear_attention` instead of `attention`.
    linear_layers: tuple[int, ...] = ()
    linear_attention: GatedDeltaConfig | None = None
    norm_offset: float = 0.0  # is added to the weights of all norms but linear attention's own
    streams: StreamsConfig | None = None  # None: one residual stream
    num_draft_layers: int = 0  # multi-token-prediction heads stored after the last layer
    runs_draft: bool = False  # whether the first of them is loaded and run too, as one more layer

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Layers that hold routed experts; a position in here is the `moe_layer_idx` of the ops."""
        return tuple(i for i, kind in enumerate(self.mlp_types) if kind == "moe")

    @property
    def num_held_layers(self) -> int:
        """Layers with weights and a cache: the model's, and the draft head's."""
        return self.num_layers + self.runs_draft

    def with_draft(self) -> ModelConfig:
        """This with its first draft head, whose layer has routed experts as the last ones do."""
        assert self.num_draft_layers and not self.runs_draft
        return dataclasses.replace(self, mlp_types=(*self.mlp_types, "moe"), runs_draft=True)

    @staticmethod
    def from_hf(config: Mapping[str, Any]) -> ModelConfig:
        """Parses and validates the contents of a Hugging Face config.json.

        Raises:
            ConfigError: naming the key, what it says and what is supported. A key known to change
                results that is not implemented is refused; keys nobody knows are logged.
        """
        from jaxmoe.config.families import parse  # the families import the classes above

        return parse(config)
