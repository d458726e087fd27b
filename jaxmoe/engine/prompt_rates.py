"""The cost model of prompts as it begins: from the machine's rates, or from first guesses."""

from __future__ import annotations

from collections.abc import Callable

import jax

from jaxmoe.config.engine_config import EngineConfig
from jaxmoe.config.model_config import ModelConfig
from jaxmoe.engine.calibration import LEAST_EXPERT_BYTES
from jaxmoe.engine.machine_bench import MachineBench
from jaxmoe.engine.machine_rates import KnownRates, known_rates
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.ffi.device_driver import Device
from jaxmoe.kv_cache.layout import CacheLayout
from jaxmoe.prefill.dslp_plan import DslpPlan, exchanged_bytes
from jaxmoe.prefill.rank_rings import RankRings
from jaxmoe.prefill.ring import ExpertRing
from jaxmoe.scheduler.prefill_route import DslpRates, PrefillRoute
from jaxmoe.weights.host_store import HostStore

OnStage = Callable[[str, float], None]

# Where nothing was measured. FLOP/s of a thread in the experts' many-row kernels, as earlier forms
# of jaxmoe_bench found them; the first prompts correct the guess.
_FLOPS = {"scalar": 2e9, "avx2": 6e10, "avx512": 8e10, "avx512_bf16": 1.2e11, "amx": 8e11}
# Of the GPU at large prompts, likewise.
DEVICE_FLOPS = 2e14


def token_flops(model: ModelConfig) -> int:
    """Of a token's routed experts in all layers."""
    expert = model.moe.expert_intermediate * model.hidden_size * 6
    return expert * model.moe.router.experts_per_token * len(model.moe_layers)


def make_route(
    config: EngineConfig,
    model: ModelConfig,
    device: Device,
    runtime: CpuRuntime,
    store: HostStore,
    ring: ExpertRing,
    max_tokens: int,
    on_stage: OnStage = lambda stage, percent: None,
) -> tuple[PrefillRoute, KnownRates | None]:
    """For prompts of up to `max_tokens` a pass over `ring`, or in chunks by `runtime`; and the
    rates that it was made from, where it was.
    """
    forced = "slp" if config.prefill == "slp" else None
    flops = token_flops(model)
    known = None
    if config.stand_in_copy_gb_s is None:  # else the bus is slower than what the machine can
        known = rates_for(config, device, runtime, store, on_stage)
    if known is None:
        on_stage("measuring the bus", 0.0)
        guessed = PrefillRoute(
            pass_s=ring.measure_pass_s(),
            # Everything else of a token is about as much again.
            streamed_token_s=2 * flops / DEVICE_FLOPS,
            chunked_token_s=flops / (_FLOPS[runtime.isa] * runtime.num_threads),
            max_tokens=max_tokens,
            forced=forced,
        )
        return guessed, None
    rates, weight_format = known.rates, store.layouts[0].format
    host_flops = rates.gemm_flops[weight_format]
    route = PrefillRoute.estimated(
        pass_bytes=ring.total_bytes,
        copy_bytes_per_s=rates.copy_rate(),
        token_flops=flops,
        device_flops_per_s=rates.device_flops.get(weight_format, host_flops),
        chunk_tokens=config.prefill_chunk_tokens,
        chunk_bytes=store.total_bytes * _met_share(model, config.prefill_chunk_tokens),
        host_flops_per_s=host_flops,
        host_bytes_per_s=rates.gemv_bytes[weight_format],
        max_tokens=max_tokens,
        forced=forced,
        source=known.describe(),
    )
    return route, known


def dslp_rates(
    model: ModelConfig,
    layout: CacheLayout,
    plan: DslpPlan,
    rings: RankRings,
    token_s: float,
    known: KnownRates | None = None,
) -> DslpRates:
    """token_s: of one device that computes a token alone."""
    ranks, most = plan.num_ranks, max(rings.streamed_bytes)
    pass_s = rings.measure_pass_s() if known is None else most / known.rates.copy_rate(ranks)
    # A token's keys, experts' inputs and partial sums go from device to device, on GPUs without a
    # way to each other through host memory: over two buses.
    sent = len(model.moe_layers) * exchanged_bytes(plan.shape) + layout.token_bytes
    sent *= (ranks - 1) / ranks
    return DslpRates(
        pass_s=pass_s,
        token_s=token_s / ranks + 2 * sent * pass_s / most,
        max_tokens=plan.max_tokens,
        num_devices=ranks,
    )


def rates_for(
    config: EngineConfig,
    device: Device,
    runtime: CpuRuntime,
    store: HostStore,
    on_stage: OnStage = lambda stage, percent: None,
) -> KnownRates | None:
    """What the machine does a second: kept on disk, or measured once where a model is large enough
    for that to be a small part of its start. None: neither.
    """
    devices = jax.local_devices(backend=device.platform)
    measure = None
    if config.calibrate and store.total_bytes >= LEAST_EXPERT_BYTES:
        measure = MachineBench(runtime, devices, on_stage=lambda stage: on_stage(stage, 0.0))
    weight_format = store.layouts[0].format
    return known_rates(runtime, devices, config.cache_path, [weight_format], measure)


def _met_share(model: ModelConfig, tokens: int) -> float:
    """Of all experts, those that so many tokens are expected to choose."""
    router = model.moe.router
    return 1.0 - (1.0 - router.experts_per_token / router.num_experts) ** tokens
