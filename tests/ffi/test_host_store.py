"""The native store as Python sees it: filling, views, errors, and use after close."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.native import Layer, bits, make_store, padded_columns

from jaxmoe.common.errors import ConfigError
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.ffi.host_store import native_host_store
from jaxmoe.ffi.native_ops import NativeOps

GATE, UP, DOWN = range(3)


@pytest.fixture(params=["fp8_block", "fp8_channel", "int4_g32", "mxfp4"])
def any_layer(request):
    k = padded_columns(request.param, 136)
    return Layer.random(
        np.random.default_rng(0), request.param, 3, padded_columns(request.param, 40), k
    )


@pytest.fixture
def layer():
    return Layer.random(np.random.default_rng(0), "fp8_block", 3, 40, 136)


def matrices(layer):
    """(expert, which, bytes, scale) of all matrices, in file order."""
    for e in range(layer.dims[0]):
        for which, name in enumerate(("gate", "up", "down")):
            weight = layer.weights[name]
            yield e, which, np.asarray(weight.data[e]).tobytes(), np.asarray(weight.scale_inv[e])


@pytest.mark.parametrize("backing", ["arena", "mmap"])
@pytest.mark.parametrize("nodes", [None, [[0], [0]]])
def test_filled_from_a_file(tmp_path, any_layer, backing, nodes):
    layer = any_layer
    path = tmp_path / "weights"
    path.write_bytes(b"\0" * 7 + b"".join(data for _, _, data, _ in matrices(layer)))
    x = jnp.ones((2, layer.dims[2]), jnp.bfloat16)
    ids = jnp.array([[0, 2], [1, -1]], jnp.int32)
    with CpuRuntime(num_threads=2, numa_nodes=nodes) as runtime:
        store = native_host_store(runtime, [(*layer.dims, layer.weight_format)], backing)
        file_idx = store.map_file(str(path)) if backing == "mmap" else -1
        with open(path, "rb") as file:
            offset = 7
            for e, which, data, scale in matrices(layer):
                if backing == "mmap":
                    store.set_mapped(0, e, which, file_idx, offset)
                else:
                    store.read_matrix(0, e, which, file.fileno(), offset)
                store.set_scale(0, e, which, scale)
                offset += len(data)
        counted = offset - 7
        if not layer.weight_format.startswith("fp8"):
            counted += sum(scale.nbytes for _, _, _, scale in matrices(layer))
        assert store.total_bytes == sum(store.bytes_per_node()) == counted
        for e, which, data, scale in matrices(layer):
            rows = store.segments(0, e, which)
            assert b"".join(view.tobytes() for _, _, view in rows) == data
            assert [view.flags.writeable for _, _, view in rows] == [backing == "arena"] * len(rows)
            if nodes is None or backing == "mmap":
                assert store.matrix(0, e, which).tobytes() == data
            got = store.scale(0, e, which)
            assert got.dtype == scale.dtype and not got.flags.writeable
            np.testing.assert_array_equal(got, scale)
        got = NativeOps(runtime, store, "vector").experts(x, ids, jnp.ones((2, 2)), 0)
        with make_store(runtime, layer) as other:
            want = NativeOps(runtime, other, "vector").experts(x, ids, jnp.ones((2, 2)), 0)
        np.testing.assert_array_equal(bits(got), bits(want))
        store.close()


def test_a_truncated_file_is_an_os_error_that_names_the_matrix(tmp_path, runtime, layer):
    path = tmp_path / "weights"
    path.write_bytes(bytes(40 * 136 - 1))
    store = native_host_store(runtime, [(*layer.dims, "fp8_block")], "arena")
    with open(path, "rb") as file:
        with pytest.raises(OSError, match="ends at byte 5439, inside layer 0 expert 1 up"):
            store.read_matrix(0, 1, UP, file.fileno(), 0)
        with pytest.raises(ValueError, match="MoE layer 1 of a store that has 1"):
            store.read_matrix(1, 0, UP, file.fileno(), 0)
    with pytest.raises(OSError, match="Bad file descriptor"):
        store.read_matrix(0, 0, GATE, 10_000, 0)
    with pytest.raises(ValueError, match="has an arena"):
        store.map_file(str(path))
    store.close()


def test_views_outlive_the_store(runtime, layer):
    with make_store(runtime, layer) as store:
        view = store.matrix(0, 2, DOWN)
        scale = store.scale(0, 2, DOWN)
    del store
    gc.collect()
    want = np.asarray(layer.weights["down"].data[2])
    assert view.shape == want.shape and view.tobytes() == want.tobytes()
    view[:] = 0  # still memory
    assert not scale.flags.writeable and scale.shape == (2, 1)


def test_use_after_close_is_an_error(runtime, layer):
    with make_store(runtime, layer) as store:
        pass
    store.close()
    for use in (
        lambda: store.id,
        lambda: store.matrix(0, 0, GATE),
        lambda: store.set_scale(0, 0, GATE, np.ones((1, 2), np.float32)),
        lambda: store.read_matrix(0, 0, GATE, 0, 0),
    ):
        with pytest.raises(ValueError, match="closed"):
            use()


def test_ids_are_reused_lowest_first(runtime, layer):
    stores = [native_host_store(runtime, [(*layer.dims, "bf16")], "arena") for _ in range(3)]
    ids = [store.id for store in stores]
    assert ids == sorted(ids)
    stores[0].close()
    again = native_host_store(runtime, [(*layer.dims, "bf16")], "arena")
    assert again.id == ids[0]
    for store in (*stores[1:], again):
        store.close()


@pytest.mark.parametrize(
    "layers, backing, match",
    [
        ([(3, 0, 8, "bf16")], "arena", "layer 0 .* intermediate 0"),
        ([(3, 8, 8, "int3")], "arena", '"int3"; wanted "f32", "bf16", .* or "nvfp4"'),
        ([(3, 8, 32, "mxfp4")], "arena", "layer 0 of format mxfp4 has rows of 8 weights"),
        ([(3, 8, 8, "bf16")], "disk", '"disk"; wanted "arena" or "mmap"'),
        ([(1 << 16, 1 << 20, 1 << 20, "f32")], "arena", "more than a petabyte"),
        ([(1 << 30, 8, 8, "f32")], "arena", "num_experts 1073741824.*wanted 1 to 65536"),
    ],
)
def test_impossible_stores(runtime, layers, backing, match):
    with pytest.raises(ConfigError, match=match):
        native_host_store(runtime, layers, backing)


def test_scales_are_checked(runtime, layer):
    store = native_host_store(runtime, [(*layer.dims, "fp8_block"), (1, 8, 8, "bf16")], "arena")
    with pytest.raises(ValueError, match=r"\[1, 1\]; wanted \[1, 2\] for a matrix of \[40, 136\]"):
        store.set_scale(0, 0, GATE, np.ones((1, 1), np.float32))
    with pytest.raises(ValueError, match="2"):
        store.set_scale(0, 0, GATE, np.ones(2, np.float32))
    with pytest.raises(ValueError, match="its format is bf16"):
        store.set_scale(1, 0, GATE, np.ones((1, 1), np.float32))
    with pytest.raises(
        ValueError, match="is float64; wanted float32, bfloat16, uint32 .* or uint8"
    ):
        store.set_scale(0, 0, GATE, np.ones((1, 2)))
    with pytest.raises(ValueError, match="is uint8 .*; wanted float32 for format fp8_block"):
        store.set_scale(0, 0, GATE, np.ones((1, 2), np.uint8))
    with pytest.raises(ValueError, match="C-contiguous"):
        store.set_scale(0, 0, GATE, np.ones((2, 4), np.float32)[:1, ::2])
    with pytest.raises(ValueError, match="no scales"):
        store.scale(1, 0, GATE)
    store.close()


def test_a_store_closed_while_named_by_a_program_is_kept_by_running_calls(runtime, layer):
    """A submitted call holds its store: closing it in between changes nothing."""
    with make_store(runtime, layer) as store:
        ops = NativeOps(runtime, store, "vector")
        x, ids = jnp.ones((1, 136), jnp.bfloat16), jnp.array([[1]], jnp.int32)
        want = ops.experts(x, ids, jnp.ones((1, 1)), 0)
        (ticket,) = ops.experts_submit(x, ids, jnp.ones((1, 1)), 0)
        jax.block_until_ready(ticket)
    (got,) = ops.experts_wait(ticket, 1, 136)
    np.testing.assert_array_equal(bits(got), bits(want))
