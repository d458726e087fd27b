"""Prefill and decode programs compiled for GPUs that are not here, at DeepSeek-V3's full width:
order, aliasing, copies, temporaries. `pytest -m gpu_aot`, with the extra gpu_aot.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from support import aot, aot_dslp

from jaxmoe.ffi.slot_ring import expert_buffers
from jaxmoe.kernels.experts import ExpertGroup, add_group, sort_by_expert

pytestmark = pytest.mark.gpu_aot
# jax says of its Triton backend that it will go.
ignore = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module", params=sorted(aot.TARGETS))
def target(request):
    return aot.Target(aot.TARGETS[request.param])


@ignore
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "model", ["deepseek_v3", "qwen3_30b_a3b_cut", "kimi_k2_thinking", "gpt_oss_120b"]
)
def test_streamed_layers(target, model):
    config = aot.bench_config(model, 2, dense=1)
    found = aot.compile_prefill(target, config, 8192)
    print(target.name, found.plan.describe(), {n: c.temp for n, c in found.chunks.items()},
          found.experts.temp)  # fmt: skip
    assert found.problems() == []
    assert len(found.chunks) == len({layer in config.moe_layers for layer in range(2)})


@ignore
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("weight_format", "f", "d"),
    [
        ("bf16", 768, 2048),
        ("f32", 768, 2048),
        ("fp8_channel", 1536, 3072),
        ("int4_g128", 768, 2048),
        ("mxfp8", 1536, 3072),
    ],
)
def test_experts_in_formats_of_other_models(target, weight_format, f, d):
    """No weight is copied, decoded or not, beyond a window's rows."""
    group = ExpertGroup(
        *(jax.ShapeDtypeStruct(*buffer) for buffer in expert_buffers(8, f, d, weight_format))
    )
    tokens, per_token, window = 4096, 8, 16384

    def program(y, x, ids, weights, group):
        routing = sort_by_expert(ids, weights, 8, window)
        return add_group(y, x, routing, group, 0, window=window)

    found = target.compile(
        jax.jit(program, donate_argnums=0),
        jax.ShapeDtypeStruct((tokens, d), jnp.float32),
        jax.ShapeDtypeStruct((tokens, d), jnp.bfloat16),
        jax.ShapeDtypeStruct((tokens, per_token), jnp.int32),
        jax.ShapeDtypeStruct((tokens, per_token), jnp.float32),
        group,
    )
    assert found.copies_of(aot.hlo_shapes(group)) == []
    assert found.temp <= window * (6 * d + 2 * f) + (1 << 20) * 4
    assert found.aliased == tokens * d * 4


@ignore
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("model", "prefix", "exchange"),
    [
        ("deepseek_v3", 0, "small_ep"),
        ("deepseek_v3", 0, "all_to_all"),
        pytest.param("deepseek_v3", 3000, "small_ep", marks=pytest.mark.slow),
        pytest.param("qwen3_30b_a3b_cut", 3000, "small_ep", marks=pytest.mark.slow),
    ],
)
def test_a_prompt_on_two_devices(target, model, prefix, exchange):
    config = aot.bench_config(model, 2, dense=1)
    only = None if exchange == "small_ep" else ("send", "back")
    found = aot_dslp.compile_dslp(
        target, config, 16384, prefix=prefix, exchange=exchange, only=only
    )
    for name, program in found.programs.items():
        print(target.name, name, program.temp, found.sends(name))
    assert found.problems() == []
    assert {"send", "back"} <= set(found.programs)


@ignore
@pytest.mark.timeout(3600)  # ptxas and XLA have 61 layers' kernels to compile
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("layers", [5, pytest.param(61, marks=pytest.mark.slow)])
def test_decode_of_all_layers(target, layers, n):
    config = aot.bench_config("deepseek_v3", layers, dense=3)
    found = aot.compile_decode(target, config, 8, n)
    print(target.name, n, f"temp {found.step.temp / 2**20:.1f} MiB, {found.step.seconds:.0f} s")
    assert found.problems(aot.DECODE_TEMP_BYTES) == []


def test_what_is_wrong_is_found():
    """The reading itself: a text with a copy of a weight, and events out of order."""
    text = """
ENTRY %main {
  %a = (f32[8]) custom-call(%x), custom_call_target="jaxmoe_slot_acquire", slot = 0
  %r = (f32[8]) custom-call(%a), custom_call_target="jaxmoe_slot_release", slot = 0
  %s = (s32[], f32[8]) while(%r), condition=%c, body=%b
  %w = (s32[], f8e4m3fn[8,2,2]) while(%s), condition=%c, body=%b
  %c = f8e4m3fn[2048,7168]{1,0} copy(%p)
}
"""
    program = aot.Compiled(text, temp=10, aliased=5, seconds=0.0)
    assert aot.event_order(program) == ["acquire 0", "release 0", "products 0"]
    weight = ("f8e4m3fn", (2048, 7168))
    assert len(program.copies_of({weight})) == 1 and not program.copies_of({("bf16", (4, 4))})
    decode = aot.DecodeProgram(1, 0, 1, program, 6, {weight}, set())
    assert len(decode.problems(9)) == 4
