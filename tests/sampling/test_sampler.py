"""The sampler against numpy oracles that sort, and against the distributions it claims to draw
from.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.sampling.inputs import RowSettings, pack_rows
from jaxmoe.sampling.sampler import BLOCK, argmax, keep_above, sample
from jaxmoe.sampling_params import SamplingParams

SAMPLE = jax.jit(lambda logits, rows: sample(logits, logits, rows))
KEEP = jax.jit(keep_above)
ARGMAX = jax.jit(argmax)


def settings(params, seed=0, token_idx=0, choice_idx=0):
    return RowSettings(params, 0, seed, choice_idx, token_idx, -1, 1)


def run(logits, settings_of_rows):
    return SAMPLE(jnp.asarray(logits, jnp.float32), pack_rows(settings_of_rows, len(logits)))


def kept_by_sorting(scaled, top_k, top_p, min_p):
    """Token ids that survive, with ties at a threshold kept: the definition, by sorting."""
    x = scaled.astype(np.float64)
    keep = np.ones(len(x), bool)
    if 0 < top_k < len(x):
        keep &= scaled >= np.sort(scaled)[-top_k]
    if top_p < 1:
        p = np.where(keep, np.exp(x), 0)
        p /= p.sum()
        order = np.argsort(-p, kind="stable")
        last = order[np.searchsorted(np.cumsum(p[order]), top_p)]
        keep &= scaled >= scaled[last]
    if min_p > 0:
        keep &= scaled >= np.float32(np.log(np.float32(min_p)))
    return set(np.flatnonzero(keep))


@pytest.mark.parametrize("size", [1, 7, BLOCK, 2 * BLOCK, 2 * BLOCK + 300])
def test_argmax_is_numpys_with_the_first_of_equals(size):
    rng = np.random.default_rng(size)
    for values in (rng.normal(size=size), rng.integers(0, 3, size), np.zeros(size)):
        row = values.astype(np.float32)
        assert int(ARGMAX(jnp.asarray(row))) == int(np.argmax(row))


@pytest.mark.parametrize(
    "top_k,top_p,min_p",
    [(0, 1.0, 0.0), (1, 1.0, 0.0), (5, 1.0, 0.0), (2000, 1.0, 0.0), (0, 0.9, 0.0), (0, 1e-6, 0.0)]
    + [(0, 0.999, 0.0), (40, 0.5, 0.0), (0, 1.0, 0.2), (0, 1.0, 1.0), (300, 0.95, 0.01)],
)
@pytest.mark.parametrize("ties", [False, True])
def test_thresholds_keep_what_sorting_keeps(top_k, top_p, min_p, ties):
    rng = np.random.default_rng(3)
    row = (rng.normal(size=1300) * 4).astype(np.float32)
    if ties:
        row = np.round(row)
    scaled = row - row.max()
    least = float(
        KEEP(jnp.asarray(scaled), jnp.int32(top_k), jnp.float32(top_p), jnp.float32(min_p))
    )
    assert set(np.flatnonzero(scaled >= least)) == kept_by_sorting(scaled, top_k, top_p, min_p)


def test_extreme_logits_leave_the_likeliest():
    row = np.full(900, -np.inf, np.float32)
    row[600], row[700] = 3e38, -3e38
    for params in (
        SamplingParams(),
        SamplingParams(temperature=1e-30, top_p=0.5),
        SamplingParams(temperature=100.0, top_k=3),
    ):
        assert int(run([row], [settings(params)]).token_ids[0]) == 600


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_reported(bad, temperature):
    row = np.zeros((2, 40), np.float32)
    row[0, 3] = bad
    out = run(row, [settings(SamplingParams(temperature=temperature))] * 2)
    assert int(out.token_ids[0]) == -1 and int(out.token_ids[1]) >= 0


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=0.5, top_p=0.9)])
def test_draws_follow_the_distribution(params):
    """Chi-square over a vocabulary of several blocks, the last one short."""
    size, draws = 2 * BLOCK + 76, 6000
    rng = np.random.default_rng(0)
    hot = [3, BLOCK - 1, BLOCK, 2 * BLOCK - 1, 2 * BLOCK, size - 1]
    row = np.full(size, -9.0, np.float32)
    row[hot] = rng.normal(size=len(hot))
    rows = pack_rows([settings(params, seed=7, token_idx=i) for i in range(draws)], draws)
    drawn = np.asarray(SAMPLE(jnp.broadcast_to(jnp.asarray(row), (draws, size)), rows).token_ids)
    scaled = (row - row.max()) / np.float32(params.temperature)
    kept = sorted(kept_by_sorting(scaled, 0, params.top_p, 0.0))
    p = np.zeros(size)
    p[kept] = np.exp(scaled[kept].astype(np.float64))
    p /= p.sum()
    assert set(drawn) <= set(kept)
    groups = [i for i in kept if p[i] * draws >= 5]
    seen = np.array([np.sum(drawn == i) for i in groups] + [np.sum(~np.isin(drawn, groups))])
    want = np.array([p[i] for i in groups] + [1 - p[groups].sum()]) * draws
    chi2 = np.sum((seen - want)[want > 1] ** 2 / want[want > 1])
    assert chi2 < 30, chi2  # 6 degrees of freedom: beyond 30 is one in 25,000


def test_seed_choice_and_token_index_decide_the_draw_and_the_batch_does_not():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(5, 1300)).astype(np.float32)
    params = [
        SamplingParams(top_k=50),
        SamplingParams(temperature=0),
        SamplingParams(top_p=0.9, logprobs=3),
        SamplingParams(min_p=0.1),
        SamplingParams(temperature=1.7),
    ]
    for token_idx in range(6):
        rows = [settings(p, seed=2**63 + i, token_idx=token_idx) for i, p in enumerate(params)]
        together = np.asarray(run(logits, rows).token_ids)
        for i in range(5):
            assert int(run(logits[i : i + 1], rows[i : i + 1]).token_ids[0]) == together[i]
        back = np.asarray(run(logits[::-1], rows[::-1]).token_ids)
        assert list(back[::-1]) == list(together)
    flat = np.zeros((40, 1300), np.float32)
    one = SamplingParams()
    for changed in ("seed", "token_idx", "choice_idx"):
        rows = [settings(one, **{changed: i}) for i in range(40)]
        assert len(set(np.asarray(run(flat, rows).token_ids).tolist())) > 35
    rows = [settings(one, seed=s) for s in (1, 1 + 2**32)]
    assert len(set(np.asarray(run(flat[:2], rows).token_ids).tolist())) == 2


def test_logprobs_are_of_the_raw_distribution():
    rng = np.random.default_rng(2)
    raw = rng.normal(size=(2, 700)).astype(np.float32)
    adjusted = raw.copy()
    adjusted[:, 5] = 50.0
    rows = pack_rows(
        [settings(SamplingParams(temperature=0, logprobs=4)), settings(SamplingParams())], 2
    )
    out = jax.jit(sample)(raw, adjusted, rows)
    want = raw[0] - np.log(np.sum(np.exp(raw[0].astype(np.float64))))
    assert int(out.token_ids[0]) == 5
    np.testing.assert_allclose(out.logprobs[0], want[5], rtol=1e-5)
    order = np.argsort(-raw[0])[:20]
    assert list(np.asarray(out.top_ids[0])) == list(order)
    np.testing.assert_allclose(out.top_logprobs[0], want[order], rtol=1e-5)
    assert float(out.logprobs[1]) == 0.0


def test_a_vocabulary_smaller_than_the_number_of_top_logprobs():
    out = run(np.zeros((1, 3), np.float32), [settings(SamplingParams(logprobs=20, top_k=2))])
    assert out.top_ids.shape == (1, 3)
