"""Which rows of a step with guesses count, and how they are packed."""

import numpy as np
import pytest

from jaxmoe.decode.batch import StepRow, pack_drafts, with_guesses
from jaxmoe.decode.drafting import last_counted
from jaxmoe.sampling.inputs import RowSettings
from jaxmoe.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("guesses", "drawn", "last"),
    [
        ([-1], [5], [0]),
        ([5, -1], [5, 9], [1]),  # the guess was right: its row's draw counts too
        ([5, -1], [6, 9], [0]),
        ([5, 6, -1], [5, 6, 7], [2]),
        ([5, 6, -1], [5, 8, 7], [1]),
        ([5, 6, -1], [4, 6, 7], [0]),  # right after a wrong one is nothing
        ([5, -1, 7, -1, -1], [5, 1, 7, 2, 3], [1, 3, 4]),
        ([5, -1, 7, -1, -1], [4, 1, 7, 2, 3], [0, 3, 4]),
        ([-1, -1, 7, 8, 9, -1], [4, 1, 7, 8, 9, 3], [0, 1, 5]),
        ([-1, -1, 7, 8, 9, -1], [4, 1, 7, 8, 3, 9], [0, 1, 4]),
    ],
)
def test_the_last_row_that_counts(guesses, drawn, last):
    got = last_counted(np.array(guesses, np.int32), np.array(drawn, np.int32), 3)
    assert np.flatnonzero(np.asarray(got)).tolist() == last


def row(start, guesses=(), tokens=(1,), following=-1):
    params = SamplingParams(temperature=0)
    settings = RowSettings(params, 0, 0, 0, token_idx=start - 2, slot=-1, num_prompt=3)
    return StepRow(tokens, start, [0, 1], 0, settings, guesses=guesses, following=following)


def test_each_guess_is_a_row_at_the_next_position():
    rows = [row(4), row(7, (8, 9)), row(5, following=6)]
    made = with_guesses(rows)
    assert [(r.token_ids, r.start) for r in made] == [
        ((1,), 4),
        ((1,), 7),
        ((8,), 8),
        ((9,), 9),
        ((1,), 5),
    ]
    assert [r.settings.logit_index for r in made] == [0, 1, 2, 3, 4]
    # Draws of a seed go by the token's index in the text.
    assert [r.settings.token_idx for r in made] == [2, 5, 6, 7, 3]
    following, guesses = pack_drafts(rows, 8, 8)
    assert following.tolist() == [-1, -1, -1, -1, 6, -1, -1, -1]
    assert guesses.tolist() == [-1, 8, 9, -1, -1, -1, -1, -1]


def test_a_prompts_tokens_are_followed_by_the_next_ones():
    rows = [row(0, tokens=(3, 4, 5), following=6), row(2, tokens=(7, 8))]
    following, guesses = pack_drafts(rows, 8, 2)
    assert following.tolist() == [4, 5, 6, 8, -1, -1, -1, -1]
    assert guesses.tolist() == [-1, -1]
