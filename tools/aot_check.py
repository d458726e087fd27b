"""Compiles the decode step for a GPU on a machine without one and reads the schedule: are submit,
attention and wait in order, merged and in microbatches, and is the cache updated in place.

    python tools/aot_check.py TARGET_CONFIG [--case=deepseek_v3] [--layers=4]

TARGET_CONFIG: a GpuTargetConfigProto as text; XLA ships some in
xla/backends/gpu/target_config/specs. Needs the extra `gpu_aot`: the CUDA plugin and ptxas, but no
driver. What is not right ends the program with exit code 1.

Attention and linear maps are the reference's here, so memory and kernels say nothing about what a
GPU would run; the order of the experts' calls, and aliasing, do.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
TOKENS, PAGE_SIZE = 8, 16


def find_toolkit() -> pathlib.Path:
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else ():
        if (pathlib.Path(folder) / "cu13" / "bin" / "ptxas").exists():
            return pathlib.Path(folder) / "cu13"
    sys.exit("no ptxas found in the package nvidia-cuda-nvcc: install the extra gpu_aot")


def wanted_order(num_layers: int, num_dense: int, n: int) -> list[str]:
    order = []
    for layer in range(num_layers - num_dense):
        for slot in range(n):
            order += [f"wait {slot}"] * (layer > 0) + [f"submit {slot}"]
    return order + [f"wait {slot}" for slot in range(n)]


def scheduled_calls(text: str) -> list[str]:
    """submit and wait, with their slots, in the order of the entry computation."""
    calls = []
    for line in text[text.index("\nENTRY") :].splitlines():
        found = re.search(r'custom_call_target="jaxmoe_experts_(submit|wait)', line)
        if found:
            slot = re.search(r"slot = (\d)", line)
            calls.append(f"{found[1]} {slot[1] if slot else '?'}")
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target_config", type=pathlib.Path)
    parser.add_argument("--case", default="deepseek_v3", help="of configs/tiny")
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    toolkit = find_toolkit()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_gpu_cuda_data_dir={toolkit} --xla_gpu_autotune_level=0"
    os.environ["PATH"] = f"{toolkit / 'bin'}:{os.environ['PATH']}"
    sys.path.insert(0, str(ROOT / "tests"))

    import jax
    import jax.numpy as jnp
    from flax import nnx
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding
    from support import tiny_engine

    from jaxmoe.decode import dual_batch
    from jaxmoe.ffi.cpu_runtime import CpuRuntime
    from jaxmoe.ffi.host_store import native_host_store
    from jaxmoe.ffi.native_ops import NativeOps
    from jaxmoe.ffi.ops import StepInputs
    from jaxmoe.ffi.reference import ReferenceOps
    from jaxmoe.ffi.registry import register_cuda_targets
    from jaxmoe.models.decoder import cache_spec

    class DeviceOps(ReferenceOps):
        """The reference, with the experts on the CPU."""

        splits_experts = True

        def __init__(self, native: NativeOps) -> None:
            super().__init__()
            self.experts = native.experts
            self.experts_submit = native.experts_submit
            self.experts_wait = native.experts_wait

    register_cuda_targets()
    device = topologies.get_topology_desc(
        platform="cuda", target_config=args.target_config.read_text(), topology="1x1x1"
    ).devices[0]
    sharding = SingleDeviceSharding(device)
    config = tiny_engine.config(args.case, num_hidden_layers=args.layers)
    tiny = tiny_engine.model(config)
    moe = config.moe
    runtime = CpuRuntime(num_threads=1)
    layer = (moe.router.num_experts, moe.expert_intermediate, config.hidden_size, "bf16")
    store = native_host_store(runtime, [layer] * len(config.moe_layers), "arena")

    def there(tree):
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree
        )

    def shape(*dims):
        return jax.ShapeDtypeStruct(dims, jnp.int32, sharding=sharding)

    inputs = StepInputs(*[shape(TOKENS)] * 4, shape(TOKENS, 4))  # pyright: ignore
    caches = [
        tuple(
            jax.ShapeDtypeStruct(
                (4 * TOKENS, PAGE_SIZE, a.num_heads, a.head_dim), a.dtype, sharding=sharding
            )
            for a in arrays
        )
        for arrays in cache_spec(config, "float32")
    ]
    cache_bytes = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(caches))
    wrong = []
    for packed in (False, True):
        ops = DeviceOps(NativeOps(runtime, store, "vector", packed=packed))
        for n in (1, 2, 4):

            def step(state, step, caches, ops=ops, n=n):
                model = nnx.merge(tiny.graphdef, state)
                if n == 1:
                    return model(step, caches, ops, jnp.arange(TOKENS))
                return dual_batch.forward(model, step, caches, ops, jnp.arange(TOKENS), n)

            traced = jax.jit(step, donate_argnums=2).trace(there(tiny.state), inputs, caches)
            compiled = traced.lower(lowering_platforms=("cuda",)).compile()
            calls = scheduled_calls(compiled.as_text())
            want = wanted_order(config.num_layers, config.num_layers - len(config.moe_layers), n)
            # The last waits may come in any order.
            same = calls[:-n] == want[:-n] and sorted(calls[-n:]) == sorted(want[-n:])
            memory = compiled.memory_analysis()
            in_place = memory.alias_size_in_bytes >= cache_bytes
            print(
                f"{n} microbatches, {packed=}: order {'kept' if same else 'CHANGED'}, cache "
                f"{'in place' if in_place else 'COPIED'}, temp "
                f"{memory.temp_size_in_bytes / 2**20:.1f} MiB",
                flush=True,
            )
            if not same:
                print("  wanted", want, "\n  got   ", calls)
            if not (same and in_place):
                wrong.append((n, packed))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
