"""Where the model runs: the device of everything but the routed experts, which stay in host memory.

With a GPU, non-expert weights and the KV cache lie there; the CPU computes the routed experts of
decode and of short prompts in place, and for long prompts they are streamed (prefill/).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Literal

import jax

from jaxmoe.common.errors import CapacityError, ConfigError
from jaxmoe.config.engine_config import EngineConfig
from jaxmoe.config.model_config import GqaConfig, MlaConfig, ModelConfig
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.ffi.device_driver import Device
from jaxmoe.ffi.native_ops import NativeOps
from jaxmoe.ffi.ops import Ops
from jaxmoe.kernels.device_ops import DeviceOps
from jaxmoe.weights.loaded_model import LoadedModel
from jaxmoe.weights.memory import gib
from jaxmoe.weights.param_spec import ParamSpec, num_blocks

# Of the device's memory that XLA may take. The rest is for CUDA's own context and libraries.
MEMORY_FRACTION = "0.92"


def choose_device(config: EngineConfig, model: ModelConfig) -> tuple[Device, tuple[str, ...]]:
    """The device, and notes for the start-up report.

    Raises: ConfigError where `device="gpu"` cannot be.
    """
    cpu = jax.local_devices(backend="cpu")[0]
    if config.device == "cpu":
        return cpu, ()
    gpus = local_gpus()
    if not gpus:
        if config.device == "gpu":
            raise ConfigError(
                "device: gpu, but JAX sees no NVIDIA GPU; install the driver and the CUDA plugin "
                '(pip install "jax[cuda13]"), or use device=cpu'
            )
        return cpu, ()
    problem = unsupported(model, config)
    if problem is None:
        return gpus[0], ()
    if config.device == "gpu":
        raise ConfigError(f"device: gpu, but {problem}; use device=cpu")
    return cpu, (f"the GPU is not used: {problem}",)


def local_gpus() -> list[Device]:
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY_FRACTION)
    try:
        return jax.local_devices(backend="cuda")
    except RuntimeError:
        return []


def choose_prefill_device(
    config: EngineConfig, model: ModelConfig, device: Device
) -> tuple[Device | None, tuple[str, ...]]:
    """Where long prompts are computed beside decode on `device`, None where the two take turns; and
    notes for the start-up report. Beside a CPU that decodes that is a GPU where there is one, which
    then needs no room for the weights.

    Raises: ConfigError where `disaggregate="on"` cannot be.
    """
    if config.disaggregate == "process" and device.platform != "cpu":
        raise ConfigError(
            "disaggregate: process, but which GPU each of the two processes has is not settled "
            "yet; use disaggregate=on, or device=cpu"
        )
    if config.disaggregate in ("off", "process"):
        return None, ()
    others = [d for d in jax.local_devices(backend=device.platform) if d != device]
    if device.platform == "cpu" and config.disaggregate == "on":
        others = local_gpus() or others
    if config.disaggregate == "auto":
        if device.platform == "cpu" or not others or config.prefill in ("chunked", "dslp"):
            return None, ()
        return None, (
            "prompts and decode take turns on the first GPU: what a second one of their own gains "
            "was not measured yet; disaggregate=on gives them one",
        )
    if config.prefill == "dslp":
        raise ConfigError(
            "disaggregate: on, but prefill=dslp computes prompts on the device that decodes too; "
            "use prefill=auto or slp, or disaggregate=off"
        )
    if config.prefill == "chunked":
        raise ConfigError(
            "disaggregate: on, but prefill=chunked computes every prompt beside the experts; use "
            "prefill=auto or slp"
        )
    if not others:
        advice = "set JAX_NUM_CPU_DEVICES=2, so that a second one stands in, or use"
        raise ConfigError(
            f"disaggregate: on, but {device.device_kind} is the only device; "
            f"{advice if device.platform == 'cpu' else 'use'} disaggregate=off"
        )
    if others[0].platform != "cpu":
        _require_for_prompts(unsupported(model, config))
    return others[0], ()


def _require_for_prompts(problem: str | None) -> None:
    if problem is not None:
        raise ConfigError(f"disaggregate: on, but {problem}; use disaggregate=off")


def check_prefill_device(device: Device | None, specs: Mapping[str, ParamSpec]) -> None:
    """Now that the weights' formats are known. Raises: ConfigError where they are none for it."""
    if device is not None and device.platform != "cpu":
        _require_for_prompts(check_leaves(specs))


def unsupported(model: ModelConfig, config: EngineConfig) -> str | None:
    """Why the GPU's kernels cannot run the model, or None."""
    if not isinstance(model.attention, MlaConfig | GqaConfig):
        return f"{model.architecture}'s attention has no GPU kernel yet"
    if model.linear_attention is not None:
        return f"{model.architecture}'s recurrent layers have no GPU kernel yet"
    indexer = model.attention.indexer if isinstance(model.attention, MlaConfig) else None
    if indexer is not None and (config.max_model_len or model.max_position) > indexer.top_k:
        return (
            f"{model.architecture}'s attention beyond index_topk = {indexer.top_k} positions has "
            f"no GPU kernel yet (max_model_len={indexer.top_k} does without)"
        )
    if config.compute_dtype == "float32":
        return "float32 activations (audits) run on the CPU"
    return None


def check_leaves(specs: Mapping[str, ParamSpec]) -> str | None:
    """Why the GPU's kernels cannot read some non-expert weight, or None."""
    for path, spec in specs.items():
        if spec.kind not in ("matrix", "head_map"):
            continue
        scale = specs.get(path.removesuffix(".data") + ".scale_inv")
        n, k = spec.shape[-2:]
        if spec.dtype == "float8_e4m3fn":
            blocks = *spec.shape[:-2], num_blocks(n), num_blocks(k)
            if scale is None or scale.dtype != "float32" or scale.shape != blocks:
                return f"{path} is FP8 with other scales than by blocks of 128"
        elif scale is not None or spec.dtype not in ("bfloat16", "float32"):
            return f"{path} is in a format without a GPU kernel"
    return None


def free_bytes(device: Device) -> int:
    """What XLA may still take of a GPU's memory."""
    stats = device.memory_stats() or {}
    return int(stats.get("bytes_limit", 0)) - int(stats.get("bytes_in_use", 0))


def settle_device(
    config: EngineConfig, device: Device, specs: Mapping[str, ParamSpec]
) -> tuple[Device, tuple[str, ...]]:
    """The device now that the weights' formats are known. Raises: ConfigError, as above."""
    problem = None if device.platform == "cpu" else check_leaves(specs)
    if problem is None:
        return device, ()
    if config.device == "gpu":
        raise ConfigError(f"device: gpu, but {problem}; use device=cpu")
    return jax.local_devices(backend="cpu")[0], (f"the GPU is not used: {problem}",)


def to_device(loaded: LoadedModel, device: Device) -> LoadedModel:
    """The model with all but the routed experts on `device`.

    Raises: CapacityError where they do not fit.
    """
    need, free = sum(leaf.nbytes for leaf in loaded.leaves), free_bytes(device)
    if need > free:
        raise CapacityError(
            f"the weights beside the routed experts take {gib(need)}, which a device that decodes "
            f"needs in its memory, and {device.device_kind} has {gib(free)} free; use device=cpu "
            f"with disaggregate=on, which decodes on the CPU and has the GPU compute long prompts, "
            "or device=cpu alone"
        )
    return dataclasses.replace(loaded, state=jax.device_put(loaded.state, device))


def device_ops(
    device: Device, runtime: CpuRuntime, loaded: LoadedModel
) -> dict[Literal["prefill", "decode"], Ops]:
    """The operations for each kind of step: on a GPU with the routed experts on the CPU."""
    prefill = NativeOps(runtime, loaded.host_store, "matrix")
    decode = NativeOps(runtime, loaded.host_store, "vector")
    if device.platform == "cpu":
        return {"prefill": prefill, "decode": decode}
    return {"prefill": DeviceOps(prefill, "prefill"), "decode": DeviceOps(decode, "decode")}
