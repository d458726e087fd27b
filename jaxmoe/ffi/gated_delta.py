"""Linear attention by the gated delta rule as an FFI call."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.config.model_config import GatedDeltaConfig
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.ffi.ops import GatedDeltaWeights, StepInputs


def gated_delta(
    runtime: CpuRuntime,
    qkv: jax.Array,
    decay_input: jax.Array,
    rate_input: jax.Array,
    weights: GatedDeltaWeights,
    cache: tuple[jax.Array, ...],
    step: StepInputs,
    config: GatedDeltaConfig,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """As `Ops.gated_delta`; the new states are the old ones' buffers, in place when donated."""
    if step.state_from is None or step.state_to is None or step.state_saves is None:
        raise ValueError("gated_delta: the step has no state slots")
    conv_state, delta_state = cache
    shape = (qkv.shape[0], config.num_value_heads, config.value_head_dim)
    results = (
        jax.ShapeDtypeStruct(shape, jnp.float32),
        jax.ShapeDtypeStruct(conv_state.shape, conv_state.dtype),
        jax.ShapeDtypeStruct(delta_state.shape, delta_state.dtype),
    )
    call = jax.ffi.ffi_call("jaxmoe_gated_delta", results, input_output_aliases={6: 1, 7: 2})
    out, conv_state, delta_state = call(
        qkv,
        decay_input,
        rate_input,
        weights.conv,
        weights.a_log,
        weights.dt_bias,
        conv_state,
        delta_state,
        step.token_rows,
        step.positions,
        step.state_from,
        step.state_to,
        step.state_saves,
        runtime_id=np.int64(runtime.id),
        num_key_heads=np.int64(config.num_key_heads),
    )
    return out, (conv_state, delta_state)
