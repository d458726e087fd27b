"""Shapes and types of the stored formats, and the format that shapes and types say."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.quant.formats import FORMATS, check_columns, data_shape, format_of, scale_shape


@pytest.mark.parametrize(
    "word, data, scale",
    [
        ("bf16", (200, 384), None),
        ("f32", (200, 384), None),
        ("fp8_block", (200, 384), (2, 3)),
        ("fp8_channel", (200, 384), (200, 1)),
        ("int4_g32", (200, 192), (200, 12)),
        ("int4_g128", (200, 192), (200, 3)),
        ("mxfp4", (200, 192), (200, 12)),
        ("mxfp8", (200, 384), (200, 12)),
        ("uint4_g32", (200, 192), (200, 12)),
        ("uint4_g128", (200, 192), (200, 3)),
        ("nvfp4", (200, 192), (200, 24 + 4)),
    ],
)
def test_shapes_and_the_format_they_say(word, data, scale):
    info = FORMATS[word]
    assert data_shape(word, 200, 384) == data and scale_shape(word, 200, 384) == scale
    assert np.prod(data) * jnp.dtype(info.data_dtype).itemsize * 8 == 200 * 384 * info.bits
    for lead in ((), (5,), (3, 5)):
        stored = None if scale is None else (*lead, *scale)
        assert format_of(info.data_dtype, (*lead, *data), info.scale_dtype, stored) == word


def test_codes_are_their_own():
    assert sorted(info.code for info in FORMATS.values()) == list(range(len(FORMATS)))


def test_partial_blocks_and_whole_groups():
    assert scale_shape("fp8_block", 129, 1) == (2, 1)
    assert scale_shape("fp8_channel", 129, 1) == (129, 1)
    check_columns("fp8_block", 1)
    for word in ("int4_g32", "int4_g128", "mxfp4", "mxfp8", "uint4_g32", "uint4_g128"):
        for call in (check_columns, lambda w, k: data_shape(w, 8, k)):
            with pytest.raises(ValueError, match=f"{word} wants rows of a multiple of .* given 48"):
                call(word, 48)


@pytest.mark.parametrize(
    "data, data_dims, scale, scale_dims, match",
    [
        (
            "float8_e4m3fn",
            (200, 384),
            None,
            None,
            "without scales; wanted fp8_block: float32 .2, 3",
        ),
        (
            "float8_e4m3fn",
            (200, 384),
            "float32",
            (3, 2),
            r"\[3, 2\]; .*fp8_channel: float32 .200, 1",
        ),
        ("float8_e4m3fn", (200, 384), "bfloat16", (2, 3), "with bfloat16"),
        ("bfloat16", (8, 32), "float32", (1, 1), "wanted bf16: no scales"),
        (
            "uint8",
            (8, 32),
            "uint8",
            (8, 1),
            r"int4_g32: bfloat16 \[8, 2\]; or mxfp4: uint8 \[8, 2\]",
        ),
        ("uint8", (2, 8, 32), "uint8", (8, 2), r"mxfp4: uint8 \[2, 8, 2\]"),
        (
            "float16",
            (8, 32),
            None,
            None,
            "wanted a type of bfloat16, float32, float8_e4m3fn, uint8",
        ),
    ],
)
def test_what_no_format_has_is_an_error(data, data_dims, scale, scale_dims, match):
    with pytest.raises(ValueError, match=match):
        format_of(data, data_dims, scale, scale_dims)
