"""The shapes of steps: all that there can be, and which come first."""

import pytest

from jaxmoe.decode.batch import (
    compiled_ahead,
    decode_size,
    likely_first,
    prefill_size,
    step_shapes,
)


@pytest.mark.parametrize("seqs", [1, 2, 3, 5, 8, 9, 64, 70, 300])
@pytest.mark.parametrize("chunk", [16, 100, 512])
def test_steps_have_these_shapes_and_no_others(seqs, chunk):
    shapes = step_shapes(seqs, chunk)
    met = {("decode", decode_size(n), decode_size(n)) for n in range(1, seqs + 1)}
    for rows in range(1, min(seqs, chunk) + 1):
        for tokens in range(rows, chunk + 1):
            met.add(("prefill", *prefill_size(tokens, rows, chunk=chunk, max_rows=seqs)))
    assert set(shapes) == met and len(shapes) == len(met)


def test_one_users_programs_come_first():
    order = likely_first(step_shapes(9, 512))
    assert order[:6] == [
        ("prefill", 512, 1),
        ("decode", 1, 1),
        ("prefill", 256, 1),
        ("prefill", 64, 1),
        ("prefill", 16, 1),
        ("decode", 2, 2),
    ]
    assert order[-4:] == [("decode", 16, 16), *(("prefill", t, 16) for t in (256, 64, 16))]
    assert sorted(order) == sorted(step_shapes(9, 512))
    assert likely_first(step_shapes(1, 16)) == [("prefill", 16, 1), ("decode", 1, 1)]


def test_what_one_masked_biased_or_scored_request_needs_comes_after_everything_plain():
    shapes = step_shapes(9, 512)
    order = compiled_ahead(shapes, 512)
    plain, extra = order[: len(shapes)], order[len(shapes) :]
    assert plain == [(*shape, "") for shape in likely_first(shapes)]
    alone = likely_first(shapes)[:5]
    assert extra == [
        *((*shape, "masks") for shape in alone),
        *((*shape, "biases") for shape in alone),
        ("prefill", 64, 1, "targets"),
    ]
    assert compiled_ahead(step_shapes(1, 16), 16)[-1] == ("prefill", 16, 1, "targets")
