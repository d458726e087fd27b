"""One small MoE layer on every kernel path of this machine, against the plain reference: what a
broken build, a CPU that lies about itself, or a bad memory module would show.

The layer has the demo model's size. What it does not do: tolerate; an error beyond rounding is one.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxmoe.ffi.cpu_runtime import CpuRuntime, supported_isas
from jaxmoe.ffi.native_ops import NativeOps
from jaxmoe.ffi.ops import Weight
from jaxmoe.ffi.reference import ReferenceOps
from jaxmoe.weights.host_store import ExpertLayout, HostStore
from jaxmoe.weights.name_map import Matrix

_EXPERTS, _INTERMEDIATE, _HIDDEN, _PER_TOKEN = 16, 192, 320, 4
_TOKENS = {"vector": 3, "matrix": 70}  # a decode batch; a chunk that fills tiles
_MATRICES: tuple[Matrix, ...] = ("gate", "up", "down")
_LIMIT = 2.0**-7  # hidden activations may be rounded to BF16 between the stages


class Path(NamedTuple):
    """One kernel and its largest error, as a fraction of the largest value."""

    isa: str
    kernel: str
    error: float

    @property
    def good(self) -> bool:
        return self.error <= _LIMIT  # false for NaN


def run() -> list[Path]:
    """Every instruction set, weight format and kernel family that this machine has."""
    found = []
    for isa in supported_isas():
        with CpuRuntime(isa=isa) as runtime:
            for weight_format in ("bf16", "fp8_block"):
                found += _layer(runtime, weight_format)
    return found


def _layer(runtime: CpuRuntime, weight_format: Literal["bf16", "fp8_block"]) -> list[Path]:
    layout = ExpertLayout(_EXPERTS, _INTERMEDIATE, _HIDDEN, weight_format)
    rng = np.random.default_rng(0)
    store = HostStore.create(runtime, [layout])
    try:
        weights = {which: _fill(store, layout, which, rng) for which in _MATRICES}
        families: tuple[Literal["vector", "matrix"], ...] = ("vector", "matrix")
        found = []
        for family in families:
            count = _TOKENS[family]
            ids = rng.random((count, _EXPERTS)).argsort(-1)[:, :_PER_TOKEN].astype(np.int32)
            args = (
                jnp.asarray(rng.standard_normal((count, _HIDDEN)), jnp.bfloat16),
                jnp.asarray(ids),
                jnp.asarray(rng.uniform(0.1, 1.0, ids.shape), jnp.float32),
            )
            want = np.asarray(ReferenceOps([weights]).experts(*args, 0))
            ops = NativeOps(runtime, store, family)
            got = np.asarray(jax.jit(lambda *a, ops=ops: ops.experts(*a, 0))(*args))
            error = float(np.abs(got - want).max() / np.abs(want).max())
            name = runtime.kernel_name(family, weight_format, bf16_activations=True)
            found.append(Path(runtime.isa, name, error))
        return found
    finally:
        store.close()


def _fill(store: HostStore, layout: ExpertLayout, which: Matrix, rng: np.random.Generator):
    shape = _EXPERTS, *layout.shape(which)
    values = rng.standard_normal(shape) * shape[-1] ** -0.5
    scale_shape = layout.scale_shape(which)
    if scale_shape is None:
        data, scale = values.astype(ml_dtypes.bfloat16), None
    else:
        scale = rng.uniform(0.5, 2.0, (_EXPERTS, *scale_shape)).astype(np.float32) * 0.01
        data = (values * 100).astype(ml_dtypes.float8_e4m3fn)
    for expert in range(_EXPERTS):
        for first, rows in store.writable_rows(0, expert, which):
            rows[...] = data[expert, first : first + len(rows)]
        if scale is not None:
            store.set_scale(0, expert, which, scale[expert])
    return Weight(jnp.asarray(data), None if scale is None else jnp.asarray(scale))
