"""How a model's weights are held, in a few words for reports: what was found, not what config.json
says.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Mapping

import jax.numpy as jnp

from jaxmoe.quant.formats import WeightFormat
from jaxmoe.weights.host_store import ExpertLayout
from jaxmoe.weights.param_spec import ParamSpec
from jaxmoe.weights.random_values import format_at


def format_summary(specs: Mapping[str, ParamSpec], layouts: Iterable[ExpertLayout]) -> str:
    """Such as "fp8_block weights", or "int4_g32 experts, bf16 elsewhere": of the linear maps
    outside the experts the format that has the most bytes.
    """
    experts = sorted({layout.format for layout in layouts})
    sizes: collections.Counter[WeightFormat] = collections.Counter()
    for path, spec in specs.items():
        if spec.kind in ("matrix", "head_map"):
            nbytes = math.prod(spec.shape) * jnp.dtype(spec.dtype).itemsize
            sizes[_format_of(path, spec, specs)] += nbytes
    elsewhere = sizes.most_common(1)[0][0] if sizes else None
    if not experts or experts == [elsewhere]:
        return f"{elsewhere or 'no'} weights"
    words = f"{' and '.join(experts)} experts"
    return words if elsewhere is None else f"{words}, {elsewhere} elsewhere"


def _format_of(path: str, spec: ParamSpec, specs: Mapping[str, ParamSpec]) -> WeightFormat:
    scale_path = path.removesuffix("data") + "scale_inv"
    scale = specs.get(scale_path)
    if scale is not None:
        found = format_at(scale_path, scale, specs)
        assert found is not None
        return found
    return "bf16" if spec.dtype == "bfloat16" else "f32"
