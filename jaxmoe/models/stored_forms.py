"""The forms in which published checkpoints store linear maps, told by their tensors.

config.json may be wrong about suffixes, scale dtypes and even schemes; dtypes and shapes cannot be.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jaxmoe.common.errors import CheckpointError
from jaxmoe.config.model_config import QuantConfig
from jaxmoe.quant.formats import FORMATS, WeightFormat, scale_shape
from jaxmoe.weights.repacked_forms import (
    AwqForm,
    GptqForm,
    Nvfp4Form,
    PackedUint4Form,
    held_uint4,
)
from jaxmoe.weights.stored_form import FormError, HasShape, StoredForm

PLAIN: Mapping[str, StoredForm] = {
    "BF16": StoredForm("bf16", "BF16"),
    "F32": StoredForm("f32", "F32"),
}
_WIDENED = ("F32", "BF16", "F8_E8M0")  # what float32 scales may be stored as
_E8M0 = ("U8", "F8_E8M0")

FP8_BLOCK = StoredForm("fp8_block", "F8_E4M3", scale=".weight_scale_inv", scale_dtypes=_WIDENED)
FP8_CHANNEL = StoredForm(
    "fp8_channel", "F8_E4M3", scale=".weight_scale", scale_dtypes=("BF16", "F32")
)
MXFP8 = StoredForm("mxfp8", "F8_E4M3", scale=".weight_scale_inv", scale_dtypes=_E8M0)
_PACKED = StoredForm(
    "int4_g32",
    "I32",
    weight=".weight_packed",
    scale=".weight_scale",
    scale_dtypes=("BF16",),
    beside=(".weight_shape",),
)
INT4: Mapping[WeightFormat, StoredForm] = {
    "int4_g32": _PACKED,
    "int4_g128": dataclasses.replace(_PACKED, format="int4_g128"),
}
PACKED_UINT4 = PackedUint4Form(
    "uint4_g32",
    "I32",
    weight=".weight_packed",
    scale=".weight_scale",
    scale_dtypes=("BF16", "F16"),
    beside=(".weight_shape",),
)
MXFP4 = dataclasses.replace(_PACKED, format="mxfp4", weight_dtype="U8", scale_dtypes=_E8M0)
# DeepSeek-V4's experts
MXFP4_INT8 = StoredForm("mxfp4", "I8", scale=".scale", scale_dtypes=("F8_E8M0", "U8"))
# gpt-oss's experts, all of a layer in a tensor
MXFP4_BLOCKS = StoredForm("mxfp4", "U8", weight="_blocks", scale="_scales", scale_dtypes=_E8M0)
_INPUTS_FIRST = ("int4_g32", "I32", ".qweight", ".scales", ("F16", "BF16"))
AWQ, GPTQ = AwqForm(*_INPUTS_FIRST), GptqForm(*_INPUTS_FIRST, zero_offset=1)
# Activations may be rounded too while other engines run; the ranges that are for are not read.
NVFP4_PACKED = Nvfp4Form(
    "nvfp4",
    "U8",
    weight=".weight_packed",
    scale=".weight_scale",
    scale_dtypes=("F8_E4M3",),
    beside=(".input_global_scale",),
    factor=".weight_global_scale",
    divides=True,
    factor_shape=(1,),
)
NVFP4_MODELOPT = Nvfp4Form(
    "nvfp4",
    "U8",
    scale=".weight_scale",
    scale_dtypes=("F8_E4M3",),
    beside=(".input_scale",),
    factor=".weight_scale_2",
)
_SCALES = (".weight_scale_inv", ".weight_scale", ".scale")
_ZERO_POINT = ".weight_zero_point"
_NOT_SUPPORTED = {
    ".weight_g_idx": "columns in the order of their activations",
    ".input_scale": "fixed scales of activations",
    ".input_global_scale": "fixed scales of activations",
}


def weight_of_scale(name: str) -> str | None:
    """The weight that a tensor called `name` would hold the scales of."""
    for suffix in _SCALES:
        if name.endswith(suffix):
            return name.removesuffix(suffix) + ".weight"
    return None


def configured_form(quant: QuantConfig, *, is_experts: bool = False) -> StoredForm:
    """The form that config.json describes, of routed experts or of everything else."""
    assert quant.format != "none"
    if is_experts and quant.mxfp4_experts:
        return MXFP4_INT8
    if quant.layout == "deepseek_v4":
        scales = ("F8_E8M0", "F32", "BF16")
        return dataclasses.replace(FP8_BLOCK, scale=".scale", scale_dtypes=scales)
    if quant.layout == "mxfp4":
        return MXFP4_BLOCKS
    if quant.layout in ("awq", "gptq"):
        return _grouped(GPTQ if quant.layout == "gptq" else AWQ, quant)
    if quant.group:
        assert quant.format in ("uint4_g32", "uint4_g128"), quant
        return dataclasses.replace(
            PACKED_UINT4, format=quant.format, group=quant.group, has_zeros=quant.has_zeros
        )
    if quant.format == "nvfp4":
        return NVFP4_MODELOPT if quant.layout == "modelopt" else NVFP4_PACKED
    form = {
        "fp8_block": FP8_BLOCK,
        "fp8_channel": FP8_CHANNEL,
        "mxfp8": MXFP8,
        "mxfp4": MXFP4,
        **INT4,
    }[quant.format]
    if quant.layout == "compressed-tensors":
        return dataclasses.replace(form, scale=".weight_scale")
    return form


def find_form(name: str, tensors: Mapping[str, HasShape], quant: QuantConfig) -> StoredForm:
    """The form of the linear map whose weight would be called `name` if it were not quantized.

    Where its scales are missing or of no shape a format has, config.json decides, so that what is
    wrong with them is told as for any tensor.

    Raises CheckpointError: there is no such map, or it is in no form that is supported.
    """
    base = name.removesuffix(".weight")
    if base + AWQ.weight in tensors:
        return _uint4_form(base, tensors, quant)
    for form in (NVFP4_PACKED, NVFP4_MODELOPT):
        if base + form.factor in tensors:
            return dataclasses.replace(form, factor_shape=tensors[base + form.factor].shape)
    scale = tensors.get(base + ".weight_scale")
    if base + NVFP4_PACKED.weight in tensors and scale is not None and scale.dtype == "F8_E4M3":
        return NVFP4_PACKED  # whose factor is missing
    for suffix, what in _NOT_SUPPORTED.items():
        if base + suffix in tensors:
            raise FormError(
                f"tensor '{base}{suffix}' belongs to a weight of {what}, which is not supported"
            )
    packed, blocks = (tensors.get(base + form.weight) for form in (MXFP4, MXFP4_BLOCKS))
    if base + _ZERO_POINT in tensors and (packed is None or packed.dtype != "I32"):
        raise FormError(
            f"tensor '{base}{_ZERO_POINT}' belongs to a weight of values with zero points; "
            f"supported: 4-bit ones in int32 '{base}{MXFP4.weight}'"
        )
    if blocks is not None:
        return _checked(base + MXFP4_BLOCKS.weight, blocks, MXFP4_BLOCKS)
    if packed is not None:
        return _packed_form(base, packed, tensors, quant)
    if name not in tensors:
        if quant.format != "none" and not quant.only_experts:
            form = configured_form(quant)
            if base + (form.scale or "") in tensors:
                return form  # the scales are there and the weight is not
        raise CheckpointError(f"tensor '{name}' is missing from the checkpoint")
    weight = tensors[name]
    if weight.dtype in PLAIN:
        return PLAIN[weight.dtype]
    if weight.dtype == "F8_E4M3":
        return _fp8_form(base, weight, tensors, quant)
    if weight.dtype == "I8" and MXFP4_INT8.scale_name(name) in tensors:
        return MXFP4_INT8
    raise CheckpointError(
        f"tensor '{name}' is stored as {weight.dtype}; supported: BF16, F32, F8_E4M3, and 4-bit "
        f"values in '{base}{MXFP4.weight}'"
    )


def _grouped(form: AwqForm | GptqForm, quant: QuantConfig) -> AwqForm | GptqForm:
    """By config.json alone."""
    held = held_uint4(quant.group)
    assert held is not None, quant
    offset = 0 if quant.zeros_as_they_are else form.zero_offset
    return dataclasses.replace(form, format=held, group=quant.group, zero_offset=offset)


def _uint4_form(
    base: str, tensors: Mapping[str, HasShape], quant: QuantConfig
) -> AwqForm | GptqForm:
    """Which of the two, and how large its groups are, by the shapes of values and scales."""
    name = base + AWQ.weight
    values, scales = tensors[name], tensors.get(base + ".scales")
    if scales is None:
        if quant.layout in ("awq", "gptq"):
            return _grouped(GPTQ if quant.layout == "gptq" else AWQ, quant)
        raise CheckpointError(f"tensor '{base}.scales' is missing: the scales of '{name}'")
    if len(values.shape) != 2 or len(scales.shape) != 2:
        raise FormError(f"tensor '{name}' has shape {list(values.shape)}; wanted two dimensions")
    groups, outputs = scales.shape
    if values.shape[1] == outputs:
        form, inputs = GPTQ, 8 * values.shape[0]
        has_order = base + ".g_idx" in tensors
        offset = 0 if quant.zeros_as_they_are else GPTQ.zero_offset
        form = dataclasses.replace(GPTQ, has_order=has_order, zero_offset=offset)
    elif 8 * values.shape[1] == outputs:
        form, inputs = AWQ, values.shape[0]
    else:
        raise FormError(
            f"tensor '{name}' has shape {list(values.shape)} and its scales {list(scales.shape)}; "
            "supported: 4-bit values of AWQ ([K, N/8]) or GPTQ ([K/8, N]) with scales [groups, N]"
        )
    held = held_uint4(inputs // groups) if groups and inputs % groups == 0 else None
    if held is None or outputs % 8:
        raise FormError(
            f"tensor '{name}' holds {inputs} inputs of {outputs} outputs with {groups} scales "
            "each; supported: groups of a multiple of 32 inputs, outputs a multiple of 8"
        )
    return dataclasses.replace(form, format=held, group=inputs // groups)


def _packed_form(
    base: str, packed: HasShape, tensors: Mapping[str, HasShape], quant: QuantConfig
) -> StoredForm:
    name, scale = base + MXFP4.weight, tensors.get(base + ".weight_scale")
    if packed.dtype == "U8" and (scale is None or scale.dtype in _E8M0):
        return MXFP4
    if packed.dtype != "I32":
        raise CheckpointError(f"tensor '{name}' is stored as {packed.dtype}; supported: I32, U8")
    if scale is None or len(scale.shape) != 2 or len(packed.shape) != 2:
        return INT4.get(quant.format, _PACKED) if quant.format != "none" else _PACKED
    inputs, groups = 8 * packed.shape[1], scale.shape[1]
    has_zeros = base + _ZERO_POINT in tensors
    if not has_zeros:
        for weight_format, form in INT4.items():
            if inputs == groups * FORMATS[weight_format].group_cols:
                return form
    held = held_uint4(inputs // groups) if groups and inputs % groups == 0 else None
    if held is None:
        raise FormError(
            f"tensor '{name}' holds {inputs} inputs a row with {groups} scales; supported: groups "
            "of a multiple of 32 inputs"
        )
    return dataclasses.replace(
        PACKED_UINT4, format=held, group=inputs // groups, has_zeros=has_zeros
    )


def _fp8_form(
    base: str, weight: HasShape, tensors: Mapping[str, HasShape], quant: QuantConfig
) -> StoredForm:
    suffix = next((s for s in _SCALES if base + s in tensors), None)
    expected = configured_form(quant) if quant.format != "none" else None
    if expected is not None and expected.weight_dtype != "F8_E4M3":
        expected = None
    if suffix is not None:
        scale = tensors[base + suffix]
        found = _fp8_format(weight.shape, scale)
        if found is not None:
            usual = {"fp8_block": FP8_BLOCK, "fp8_channel": FP8_CHANNEL, "mxfp8": MXFP8}[found]
            flat = found == "fp8_channel" and len(scale.shape) == 1
            return dataclasses.replace(usual, scale=suffix, flat_scale=flat)
        if expected is not None and len(scale.shape) == 2:
            return dataclasses.replace(expected, scale=suffix)
        raise FormError(
            f"tensor '{base}{suffix}' has shape {list(scale.shape)} for a weight of "
            f"{list(weight.shape)}; supported: scales of 128x128 blocks, of rows, or of 32 inputs"
        )
    if expected is None:
        raise CheckpointError(
            f"tensor '{base}.weight' is stored as {weight.dtype}, but has no scales, and "
            "config.json describes no FP8 weights; add its quantization_config"
        )
    return expected


def _fp8_format(shape: tuple[int, ...], scale: HasShape) -> WeightFormat | None:
    """By the scales' shape; where two fit, as for a single row, they mean the same."""
    if len(shape) != 2:
        return None
    n, k = shape
    if scale.shape == scale_shape("fp8_block", n, k):
        return "fp8_block"
    if scale.shape in ((n, 1), (n,)):
        return "fp8_channel"
    if scale.dtype in _E8M0 and scale.shape == (n, k // FORMATS["mxfp8"].group_cols):
        return "mxfp8"
    return None


def _checked(name: str, tensor: HasShape, form: StoredForm) -> StoredForm:
    if tensor.dtype != form.weight_dtype:
        raise CheckpointError(
            f"tensor '{name}' is stored as {tensor.dtype}, wanted {form.weight_dtype}"
        )
    return form
