"""kt-kernel's FP8 experts of one layer, for tools/bench_kt_kernel.py: runs under any Python whose
ABI the kt-kernel wheel was built for, with numpy and nothing else.

argv: the extension's file, then JSON {hidden, intermediate, num_experts, per_token, threads,
max_tokens}. Every line on stdin is JSON [calls, tokens, per_token] expert ids; the answer is one
line of JSON {"seconds": of one walk through the calls}, or for "check" the output of one call on
the weights of `weights`, from whose definition the caller computes its own.
"""

import importlib.util
import json
import mmap
import sys
import time
from typing import Any

import numpy as np


def weights(seed: int, rows: int, cols: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes uint8 [rows, cols] of FP8 E4M3 in +-1.875 (no NaN), scales f32 [rows/128, cols/128]."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 64, (rows, cols), np.uint8) | (
        rng.integers(0, 2, (rows, cols), np.uint8) << 7
    )
    scales = rng.uniform(0.01, 0.02, (-(-rows // 128), -(-cols // 128))).astype(np.float32)
    return codes, scales


def _aligned(array: np.ndarray) -> np.ndarray:
    """A copy at the beginning of pages, as kt-kernel's own loader's tensors are."""
    buffer = mmap.mmap(-1, array.nbytes)
    out = np.frombuffer(buffer, array.dtype).reshape(array.shape)
    out[...] = array
    return out


def main() -> None:
    path, given = sys.argv[1], json.loads(sys.argv[2])
    hidden, inner, experts = given["hidden"], given["intermediate"], given["num_experts"]
    spec = importlib.util.spec_from_file_location("kt_kernel_ext", path)
    assert spec is not None and spec.loader is not None
    ext: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ext)
    pool = ext.WorkerPoolConfig()
    pool.subpool_count = 1
    pool.subpool_numa_map = [0]
    pool.subpool_thread_count = [given["threads"]]
    infer = ext.CPUInfer(pool)

    matrices = {}
    for name, at, (rows, cols) in (
        ("gate", 0, (inner, hidden)),
        ("up", 1, (inner, hidden)),
        ("down", 2, (hidden, inner)),
    ):
        # What is multiplied makes no difference to the time: two experts' values serve all.
        made = [weights(3 * e + at, rows, cols) for e in range(2)]
        matrices[name] = [tuple(map(_aligned, made[e % 2])) for e in range(experts)]
    mask = np.zeros(experts, np.uint8)
    config = ext.moe.MOEConfig(experts, given["per_token"], hidden, inner, mask.ctypes.data)
    config.layer_idx = 0
    config.pool = infer.backend_
    config.max_len = given["max_tokens"]
    for name in matrices:
        setattr(config, f"{name}_projs", [[w.ctypes.data for w, _ in matrices[name]]])
        setattr(config, f"{name}_scales", [[s.ctypes.data for _, s in matrices[name]]])
    config.quant_config.bits = 8
    config.quant_config.group_size = 128
    config.quant_config.zero_point = False
    moe = ext.moe.AMXFP8_MOE(config)
    order = np.arange(experts, dtype=np.int64)
    infer.submit(moe.load_weights_task(order.ctypes.data))
    infer.sync()
    matrices.clear()  # it has its own copy

    rng = np.random.default_rng(0)
    tokens = given["max_tokens"]
    x = (rng.standard_normal((tokens, hidden)) * 0.05).astype(np.float32)
    bf16 = (x.view(np.uint32) >> 16).astype(np.uint16)
    out = np.zeros((tokens, hidden), np.uint16)
    combine = np.full((tokens, given["per_token"]), 1 / given["per_token"], np.float32)
    size = np.zeros(1, np.int32)
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        ids = np.asarray(asked["ids"], np.int64)
        size[0] = ids.shape[1]

        def forward(call: np.ndarray, per_token: int = ids.shape[2]) -> None:
            infer.submit(
                moe.forward_task(
                    size.ctypes.data,
                    per_token,
                    call.ctypes.data,
                    combine.ctypes.data,
                    bf16.ctypes.data,
                    out.ctypes.data,
                    False,
                )
            )
            infer.sync()

        begin = time.perf_counter()
        for call in ids:
            forward(call)
        told: dict[str, Any] = {"seconds": time.perf_counter() - begin}
        if asked.get("check"):
            first = (out[0].astype(np.uint32) << 16).view(np.float32)
            told |= {"output": first.tolist(), "x": x[0].tolist()}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
