"""Products of rows with the weights of their own expert, in every format of quant/formats.py.

Rows of one expert lie together. Work is cut into tiles of rows that share an expert; a tile reads
the expert's weights as they are stored and decodes them in registers (E4M3, E2M1 and 4-bit integers
are exact in BF16), so no dequantized copy of a weight ever exists in device memory. The sum over
the columns that share a scale is multiplied by it in float32, as on the CPU.

An output's additions depend on the shape of the weights alone, not on how many rows there are: a
token's result is the same alone and in company, for one `block_rows`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxmoe.kernels.shared_memory import num_stages
from jaxmoe.quant.formats import FORMATS, WeightFormat, format_of

BLOCK = 128  # columns of a step where scales do not want fewer, and the side of a scale block
# Rows of a tile. Tensor cores take 16 at least; 128 reuse a weight tile often enough that the
# products, not the reads of weights from L2, bound the kernel.
DECODE_ROWS = 16
PREFILL_ROWS = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Tiles:
    """Which rows each tile computes, `[NT]` int32 each; a tile whose end is not above its row does
    nothing.

    expert: whose weights. row, end: first row, and the end of the expert's rows.
    """

    expert: jax.Array
    row: jax.Array
    end: jax.Array


def tiles_of(
    starts: jax.Array, ends: jax.Array, num_rows: int, block_rows: int, first_expert: int = 0
) -> Tiles:
    """Tiles for experts whose rows are `[starts[e], ends[e])` of `num_rows`, `[E]` int32 each."""
    num_experts = starts.shape[0]
    counts = (jnp.maximum(ends - starts, 0) + block_rows - 1) // block_rows
    last = jnp.cumsum(counts)
    tile = jnp.arange(num_rows // block_rows + num_experts, dtype=jnp.int32)
    expert = jnp.searchsorted(last, tile, side="right").astype(jnp.int32)
    known = jnp.minimum(expert, num_experts - 1)
    row = starts[known] + (tile - (last - counts)[known]) * block_rows
    end = jnp.where(expert < num_experts, ends[known], 0)
    return Tiles(known + first_expert, row.astype(jnp.int32), end.astype(jnp.int32))


def whole(num_rows: int, block_rows: int) -> Tiles:
    """Tiles of rows that all meet the one matrix there is."""
    row = jnp.arange(0, num_rows, block_rows, dtype=jnp.int32)
    return Tiles(jnp.zeros_like(row), row, jnp.full_like(row, num_rows))


def _one(*products: jax.Array) -> jax.Array:
    return products[0]


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Sizes of a program, chosen per kind of step.

    rows, outputs: of a tile. num_warps, num_stages: of Triton, the latter where they fit.
    """

    rows: int
    outputs: int
    num_warps: int
    num_stages: int


# The fastest of those tried on an H100 (tools/bench_gpu_kernels.py), for one product and for two at
# once (gate and up).
PREFILL_TILING = Tiling(PREFILL_ROWS, 128, 8, 3)
PREFILL_PAIR_TILING = Tiling(PREFILL_ROWS, 128, 8, 3)
DECODE_TILING = Tiling(DECODE_ROWS, 32, 4, 4)


def narrowed(tiling: Tiling, dtype: Any) -> Tiling:
    """For activations of `dtype`: float32 takes twice the shared memory, so half the tile, and no
    tensor core, so no deep pipeline.
    """
    if jnp.dtype(dtype).itemsize == 2:
        return tiling
    return Tiling(min(tiling.rows, 64), min(tiling.outputs, 32), 4, 2)


def grouped_matmul(
    x: jax.Array,
    weights: tuple[jax.Array, ...],
    scales: tuple[jax.Array, ...] | None,
    tiles: Tiles,
    *,
    combine: Callable[..., jax.Array] = _one,
    columns: tuple[jax.Array, ...] = (),
    out_dtype: Any = jnp.float32,
    tiling: Tiling = PREFILL_TILING,
    interpret: bool = False,
) -> jax.Array:
    """`x [M, K]` times each of `weights [E, N, K]` transposed, per tile; `[M, N]`.

    Args:
        x: rows sorted as `tiles` says; rows of no tile give rows that were never written.
        weights: one, or several of one shape whose products `combine` joins (gate and up); of
            four-bit formats uint8 `[E, N, K/2]`.
        scales: of each weight, with E before the shape that quant/formats.py has; None for float
            weights.
        columns: float32 `[E, N]` each, handed to `combine` after the products as `[1, N]` parts
            (biases).
    """
    num_rows, k = x.shape
    _, n, _ = weights[0].shape
    block_m, block_n = tiling.rows, tiling.outputs
    assert BLOCK % block_n == 0, "a tile must not cross a scale block"
    num_w = len(weights)
    weight_format = _format(weights[0], None if scales is None else scales[0])
    info = FORMATS[weight_format]
    # Every step has one scale a row.
    columns_a_step = info.group_cols or BLOCK
    packed = info.bits == 4
    ragged_k = k % columns_a_step != 0

    def kernel(expert_ref, row_ref, end_ref, x_ref, *refs):
        weight_refs, rest = refs[:num_w], refs[num_w:]
        scale_refs = rest[:num_w] if scales is not None else ()
        column_refs = rest[len(scale_refs) : -1]
        y_ref = rest[-1]
        tile, n_block = pl.program_id(1), pl.program_id(0)
        row, end = row_ref[tile], end_ref[tile]

        @pl.when(row < end)
        def _():
            expert = expert_ref[tile]
            rows = row + jnp.arange(block_m)
            outputs = n_block * block_n + jnp.arange(block_n)
            row_mask = (rows < end)[:, None]
            output_mask = (outputs < n)[:, None]
            scale_row = n_block * block_n // BLOCK

            def of_rows(ref, *column):
                """A number for each output, as a row."""
                at = ref.at[expert, pl.ds(n_block * block_n, block_n), *column]
                nothing = 0 if ref.dtype == jnp.uint8 else 0.0
                return plgpu.load(at, mask=outputs < n, other=nothing)[None]

            def scaled(product, ref, b):
                if weight_format == "fp8_block":
                    return product * ref[expert, scale_row, b]
                if info.group_cols == 0:
                    return product  # one for all columns: at the end
                return product * _scale_values(of_rows(ref, b))

            def step(b, sums):
                cols = b * columns_a_step + jnp.arange(columns_a_step)
                x_mask, w_mask = row_mask, output_mask
                if ragged_k:
                    x_mask, w_mask = x_mask & (cols < k)[None], w_mask & (cols < k)[None]
                a = plgpu.load(
                    x_ref.at[pl.ds(row, block_m), pl.ds(b * columns_a_step, columns_a_step)],
                    mask=jnp.broadcast_to(x_mask, (block_m, columns_a_step)),
                    other=0.0,
                )
                stored = columns_a_step // 2 if packed else columns_a_step
                out = []
                for i, w_ref in enumerate(weight_refs):
                    w = plgpu.load(
                        w_ref.at[
                            expert, pl.ds(n_block * block_n, block_n), pl.ds(b * stored, stored)
                        ],
                        mask=jnp.broadcast_to(w_mask, (block_n, stored)),
                        other=0 if packed else 0.0,
                    )
                    product = jax.lax.dot_general(
                        a,
                        _nibbles(w, weight_format, a.dtype) if packed else w.astype(a.dtype),
                        (((1,), (1,)), ((), ())),
                        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
                        preferred_element_type=jnp.float32,
                    )
                    if scale_refs:
                        product = scaled(product, scale_refs[i], b)
                    out.append(sums[i] + product)
                return tuple(out)

            zeros = tuple(jnp.zeros((block_m, block_n), jnp.float32) for _ in range(num_w))
            sums = jax.lax.fori_loop(0, pl.cdiv(k, columns_a_step), step, zeros)
            if weight_format == "fp8_channel":
                sums = [
                    s * of_rows(ref, jnp.int32(0)) for s, ref in zip(sums, scale_refs, strict=True)
                ]
            extra = [of_rows(ref) for ref in column_refs]
            plgpu.store(
                y_ref.at[pl.ds(row, block_m), pl.ds(n_block * block_n, block_n)],
                combine(*sums, *extra).astype(y_ref.dtype),
                mask=row_mask & (outputs < n)[None],
            )

    stage_bytes = columns_a_step * (block_m * x.dtype.itemsize + block_n * num_w * info.bits // 8)
    stages = num_stages(tiling.num_stages, 0, stage_bytes, interpret=interpret)
    operands = [tiles.expert, tiles.row, tiles.end, x, *weights, *(scales or ()), *columns]
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(n, block_n), tiles.row.shape[0]),
        out_shape=jax.ShapeDtypeStruct((num_rows, n), out_dtype),
        compiler_params=plgpu.CompilerParams(num_warps=tiling.num_warps, num_stages=stages),
        interpret=interpret,
        name="grouped_matmul",
    )(*operands)


def _format(weight: jax.Array, scale: jax.Array | None) -> WeightFormat:
    return format_of(
        str(weight.dtype),
        weight.shape,
        None if scale is None else str(scale.dtype),
        None if scale is None else scale.shape,
    )


def _scale_values(scale: jax.Array) -> jax.Array:
    """Float32; bytes are exponents of two, of which 0 is float32's largest subnormal power."""
    if scale.dtype != jnp.uint8:
        return scale.astype(jnp.float32)
    bits = jnp.where(scale == 0, 1 << 22, scale.astype(jnp.int32) << 23)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _nibbles(packed: jax.Array, weight_format: WeightFormat, dtype: Any) -> jax.Array:
    """uint8 `[N, S]` to the values `[N, 2 S]` without scales: the low nibble is the first."""
    packed = packed.astype(jnp.int32)
    # Two arrays with one element in the last dim: the one concatenation that Triton has.
    codes = jnp.concatenate([(packed & 15)[..., None], (packed >> 4)[..., None]], axis=-1)
    codes = codes.reshape(packed.shape[0], -1)
    if weight_format != "mxfp4":
        return (codes - 8).astype(jnp.float32).astype(dtype)
    size = (codes & 7).astype(jnp.float32)  # of E2M1: 0 0.5 1 1.5 2 3 4 6
    size = jnp.where(size < 4, size * 0.5, jnp.where(size < 6, size - 2, size * 2 - 8))
    return jnp.where(codes >= 8, -size, size).astype(dtype)
