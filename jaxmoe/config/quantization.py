"""`quantization_config`: how linear weights are stored, by what config.json says.

The tensors themselves have the last word (models/stored_forms.py); what is read here is refused if
it changes results and is not implemented, and is what random weights are made like.

Activations stay in the compute dtype whatever a scheme says of rounding them while it runs: that is
a speed trick of other engines. Fixed scales of activations are part of a model and are refused;
NVFP4's only say in which range groups of activations get scales of their own. A scheme for the KV
cache is of engines that round theirs; here it has the compute dtype, and its scales are not read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from jaxmoe.common.errors import ConfigError
from jaxmoe.config.hf_fields import HfFields
from jaxmoe.config.model_config import QuantConfig, QuantFormat

_SUPPORTED = (
    "none, fp8 (E4M3 with 128x128 blocks), mxfp4, mxfp8, compressed-tensors (FP8 a channel or a "
    "128x128 block, INT4 in groups, MXFP4, MXFP8, NVFP4), awq, gptq (4 bits, desc_act false), "
    "auto-round (4 bits, packed as GPTQ or AWQ), modelopt (NVFP4)"
)
_CT_FORMATS = (
    *("float-quantized", "naive-quantized", "pack-quantized"),
    *("mxfp4-pack-quantized", "mxfp8-quantized", "nvfp4-pack-quantized"),
)
_CT_SCHEMES: Mapping[tuple[str, int, str, int | None], QuantFormat] = {
    # type, bits, strategy, group size
    ("float", 8, "channel", None): "fp8_channel",
    ("float", 8, "block", None): "fp8_block",
    ("float", 8, "group", 32): "mxfp8",
    ("float", 4, "group", 32): "mxfp4",
    ("float", 4, "tensor_group", 16): "nvfp4",
    ("int", 4, "group", 32): "int4_g32",
    ("int", 4, "group", 128): "int4_g128",
}
_CT_WANTED = (
    "float 8 channel, float 8 block, float 8 group 32, float 4 group 32, float 4 tensor_group 16, "
    "int 4 group of a multiple of 32, with zero points too"
)


def parse_quant(fields: HfFields) -> QuantConfig:
    """Methods that are not implemented are refused by name."""
    if fields.given("compression_config"):
        raise fields.fail("compression_config", "given", _SUPPORTED)
    table = fields.table("quantization_config")
    if table is None:
        return QuantConfig("none")
    parsers = {
        "fp8": _parse_fp8,
        "mxfp4": _parse_mxfp4,
        "mxfp8": _parse_mxfp8,
        "compressed-tensors": _parse_compressed_tensors,
        "awq": _parse_awq,
        "gptq": _parse_gptq,
        "auto-round": _parse_auto_round,
        "modelopt": _parse_modelopt,
        "modelopt_fp4": _parse_modelopt,
    }
    method = table.raw("quant_method")
    if not isinstance(method, str) or method not in parsers:
        raise table.fail("quant_method", method, _SUPPORTED)
    parsed = parsers[method](table)
    _refuse_unread(table)
    return parsed


def _refuse_unread(table: HfFields) -> None:
    if left := table.unread():
        raise ConfigError(f"{table.where}: not supported: {', '.join(left)}")


def _parse_fp8(table: HfFields) -> QuantConfig:
    _block_size(table, [128, 128])
    _common(table)
    return QuantConfig("fp8_block", _kept(table))


def _parse_mxfp8(table: HfFields) -> QuantConfig:
    _block_size(table, [1, 32])
    _common(table)
    return QuantConfig("mxfp8", _kept(table), layout="mxfp8")


def _parse_mxfp4(table: HfFields) -> QuantConfig:
    """gpt-oss: its experts, and nothing else."""
    _common(table)
    return QuantConfig("mxfp4", _kept(table), layout="mxfp4", only_experts=True)


def _parse_awq(table: HfFields) -> QuantConfig:
    table.choice("version", of=("gemm", "GEMM"), default="gemm")
    table.choice("zero_point", of=(True, False), default=True)
    # How other engines run it.
    table.ignore("backend", "do_fuse", "exllama_config", "fuse_max_seq_len", "modules_to_fuse")
    # A part of a layer ends in a dot where it stands for all that begins so.
    kept = tuple(entry.removesuffix(".") for entry in _kept(table))
    return _grouped(table, "awq", ("lm_head", *kept))


def _parse_gptq(table: HfFields) -> QuantConfig:
    if table.choice("desc_act", of=(True, False), default=False):
        # With groups found beforehand, columns stay with the groups where they are.
        if not table.boolean("static_groups", default=False):
            raise table.fail("desc_act", True, "false, or true with static_groups true")
    table.choice("lm_head", of=(True, False), default=False)
    version = table.choice("checkpoint_format", of=("gptq", "gptq_v2"), default="gptq")
    table.choice("pack_dtype", of=("int32",), default="int32")
    # How its weights were found, and how other engines run it.
    table.ignore("sym", "damp_percent", "damp_auto_increment", "static_groups", "true_sequential")
    table.ignore("dataset", "meta", "model_name_or_path", "model_file_base_name", "tokenizer")
    table.ignore("backend", "exllama_config", "max_input_length", "use_cuda_fp16", "use_exllama")
    table.ignore("batch_size", "block_name_to_quantize", "cache_block_outputs", "pad_token_id")
    table.ignore("is_marlin_format", "module_name_preceding_first_block", "model_seqlen", "mse")
    table.ignore("modules_in_block_to_quantize", "act_group_aware", "group_aware")
    kept = ["lm_head", *_kept(table)]
    exceptions = table.raw("dynamic", default={})
    if not isinstance(exceptions, Mapping):
        raise table.fail("dynamic", exceptions, "an object")
    for pattern, changes in exceptions.items():
        if pattern.startswith("-:"):
            kept.append("re:" + pattern.removeprefix("-:"))
        elif changes != {}:
            raise table.fail("dynamic", pattern, "patterns of what is not quantized ('-:...')")
    return _grouped(table, "gptq", _patterns(table, "dynamic", tuple(kept)), version == "gptq_v2")


# How AutoRound found its weights, and what it would say of activations if it rounded them.
_OF_AUTO_ROUND = (
    *("autoround_version", "block_name_to_quantize", "quant_block_list", "backend", "iters", "lr"),
    *("nsamples", "seqlen", "batch_size", "gradient_accumulate_steps", "minmax_lr", "amp"),
    *("low_gpu_mem_usage", "low_cpu_mem_usage", "enable_minmax_tuning", "enable_quanted_input"),
    *("enable_norm_bias_tuning", "enable_alg_ext", "dataset", "sampler", "seed", "scale_dtype"),
    *("not_use_best_mse", "damp_percent", "true_sequential", "super_bits", "super_group_size"),
    *("act_data_type", "act_dynamic", "act_group_size", "act_sym", "supported_types"),
)


def _parse_auto_round(table: HfFields) -> QuantConfig:
    """AutoRound's own: the tensors of GPTQ, without their groups' order, or of AWQ."""
    formats = ("auto_round:auto_gptq", "auto_round:auto_awq")
    packed = table.choice("packing_format", of=formats)
    is_symmetric = table.choice("sym", of=(True, False), default=True)
    if packed == formats[0] and not is_symmetric:
        # A zero point of 0 is stored as -1 there, which spills into its neighbours.
        raise table.fail("sym", False, f"true with packing_format {packed}")
    table.choice("data_type", of=("int",), default="int")
    table.choice("act_bits", of=(16, 32), default=16)
    table.ignore(*_OF_AUTO_ROUND)
    kept = ["lm_head"]
    exceptions = table.raw("extra_config", default={})
    if not isinstance(exceptions, Mapping):
        raise table.fail("extra_config", exceptions, "an object")
    for name, changes in exceptions.items():
        bits = changes.get("bits") if isinstance(changes, Mapping) else None
        if isinstance(bits, bool) or not isinstance(bits, int) or bits < 16:
            raise table.fail("extra_config", {name: changes}, "only modules of 16 or 32 bits")
        kept.append(f"re:{name}$")  # a name, or a pattern
    layout = "gptq" if packed == formats[0] else "awq"
    return _grouped(table, layout, _patterns(table, "extra_config", tuple(kept)))


def _grouped(
    table: HfFields,
    layout: Literal["awq", "gptq"],
    kept: tuple[str, ...],
    zeros_as_they_are: bool = False,
) -> QuantConfig:
    table.choice("bits", "w_bit", of=(4,))
    group = table.integer("group_size", "q_group_size")
    if group % 32:
        raise table.fail("group_size", group, "a multiple of 32")
    return QuantConfig(
        "uint4_g32" if group % 128 else "uint4_g128",
        kept,
        layout=layout,
        group=group,
        zeros_as_they_are=zeros_as_they_are,
    )


def _parse_modelopt(table: HfFields) -> QuantConfig:
    table.choice("quant_algo", of=("NVFP4",))
    table.ignore("producer", "config_groups")  # what the tensors tell
    table.ignore("kv_cache_scheme", "kv_cache_quant_algo")
    ignored = table.strings("ignore", "exclude_modules", default=())
    kept = ("re:" + re.escape(entry).replace(r"\*", ".*") + "$" for entry in ignored)
    return QuantConfig("nvfp4", tuple(kept), layout="modelopt")


def _block_size(table: HfFields, wanted: list[int]) -> None:
    block = table.raw("weight_block_size", default=None)
    if not isinstance(block, (list, tuple)) or list(block) != wanted:
        raise table.fail("weight_block_size", block, str(wanted))


def _common(table: HfFields) -> None:
    table.choice("fmt", of=("e4m3", "float8_e4m3fn"), default="e4m3")
    table.choice("activation_scheme", of=("dynamic",), default="dynamic")
    table.choice("scale_fmt", of=("ue8m0", "float", None), default=None)
    table.choice("dequantize", of=(False, True), default=False)


def _kept(table: HfFields) -> tuple[str, ...]:
    return table.strings("modules_to_not_convert", "ignored_layers", default=())


def _parse_compressed_tensors(table: HfFields) -> QuantConfig:
    top = table.choice("format", of=(*_CT_FORMATS, None), default=None)
    table.choice("quantization_status", of=("compressed", "frozen"), default="compressed")
    table.ignore("global_compression_ratio", "version", "kv_cache_scheme")
    if (sparsity := table.table("sparsity_config")) is not None:
        sparsity.choice("format", of=("dense",), default="dense")
    groups = table.raw("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        raise table.fail("config_groups", groups, "an object with one group")
    ((name, values),) = groups.items()
    if not isinstance(values, Mapping):
        raise table.fail("config_groups", groups, "an object with one group")
    group = HfFields(values, f"{table.where}, config_groups, {name}")
    group.choice("format", of=(*_CT_FORMATS, None), default=top)
    targets = group.strings("targets", default=("Linear",))
    for target in targets:
        if target != "Linear" and not target.startswith("re:"):
            raise group.fail("targets", list(targets), "'Linear' and patterns ('re:...')")
    activations = group.table("input_activations")
    weights = group.table("weights")
    if weights is None:
        raise ConfigError(f"{group.where} lacks 'weights'")
    found, zeros_group, has_zeros = _scheme(weights)
    dynamic = None if activations is None else activations.raw("dynamic", default=None)
    if activations is not None and dynamic is not True:
        if found != "nvfp4" or dynamic != "local":
            raise group.fail("input_activations", "of fixed scales", "null, or 'dynamic': true")
    _refuse_unread(weights)
    _refuse_unread(group)
    return QuantConfig(
        found,
        _patterns(table, "ignore", table.strings("ignore", default=())),
        layout="compressed-tensors",
        converted=() if "Linear" in targets else _patterns(group, "targets", targets),
        group=zeros_group,
        has_zeros=has_zeros,
    )


def _scheme(weights: HfFields) -> tuple[QuantFormat, int, bool]:
    """The format; where it has zero points, or groups none else has, their size; which of both."""
    has_zeros = not weights.choice("symmetric", of=(True, False), default=True)
    weights.choice("dynamic", of=(False,), default=False)
    # The order in which columns were rounded, with the groups where they are; "group" moves them.
    weights.choice("actorder", of=("weight", "static", None), default=None)
    weights.ignore("observer", "observer_kwargs", "scale_dtype", "zp_dtype")
    kind = weights.choice("type", of=("float", "int"))
    bits = weights.integer("num_bits")
    group = weights.integer("group_size", default=None)
    strategy = weights.choice("strategy", of=("channel", "block", "group", "tensor_group"))
    if strategy == "block":
        block = weights.raw("block_structure", default=None)
        if not isinstance(block, (list, tuple)) or list(block) != [128, 128]:
            raise weights.fail("block_structure", block, "[128, 128]")
    if strategy not in ("group", "tensor_group"):
        group = None
    found = None if has_zeros else _CT_SCHEMES.get((kind, bits, strategy, group))
    if found is not None:
        return found, 0, False
    if (kind, bits, strategy) == ("int", 4, "group") and group is not None and group % 32 == 0:
        return "uint4_g32" if group % 128 else "uint4_g128", group, has_zeros
    given = f"{kind} {bits} {strategy}" + (f" {group}" if group else "")
    given += " with zero points" if has_zeros else ""
    raise ConfigError(f"{weights.where}: weights are {given}; supported: {_CT_WANTED}")


def _patterns(table: HfFields, key: str, entries: tuple[str, ...]) -> tuple[str, ...]:
    for entry in entries:
        if entry.startswith("re:"):
            try:
                re.compile(entry.removeprefix("re:"))
            except (re.error, RecursionError, OverflowError) as error:
                raise table.fail(key, entry, f"a regular expression ({error})") from None
    return entries
