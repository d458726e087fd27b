"""How a prompt is dealt to ranks, and attention over pieces of its keys; rings of devices are in
tests/prefill.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.attention.zigzag import ArrayParts, chunk_length, deal, join
from jaxmoe.ffi.ops import Weight
from jaxmoe.kernels.device_ops import DeviceOps
from jaxmoe.kernels.partial_attention import DeviceParts


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 8, 9, 1000])
def test_every_token_has_one_place_and_ranks_equal_work(num_ranks, num_tokens):
    length = chunk_length(num_tokens, num_ranks)
    index = deal(num_tokens, num_ranks, 2 * length + 3)
    assert sorted(index[index >= 0]) == list(range(num_tokens))
    if num_tokens % (2 * num_ranks) == 0:
        keys_seen = [(row[row >= 0] + 1).sum() for row in index]
        assert len(set(keys_seen)) == 1


def plain(q, keys, values, positions, count, scale, window):
    """Softmax over the keys each query sees, float64; and the log of its denominator."""
    shared = q.shape[1] // keys.shape[1]
    keys, values = (np.repeat(np.asarray(a, np.float64), shared, axis=1) for a in (keys, values))
    scores = np.einsum("tnh,snh->tns", np.asarray(q, np.float64), keys) * scale
    at = np.arange(keys.shape[0])
    seen = (at <= positions[:, None]) & (at < count)
    if window is not None:
        seen &= at > positions[:, None] - window
    weights = np.where(seen[:, None], np.exp(scores), 0.0)
    total = weights.sum(axis=-1)
    out = np.einsum("tns,snv->tnv", weights, values) / np.maximum(total, 1e-300)[..., None]
    return out, np.log(np.maximum(total, 1e-300))


PARTS = {
    "array": ArrayParts,
    "device": lambda: DeviceParts(DeviceOps(None, "prefill", one_sequence=True, interpret=True)),
}


@pytest.mark.parametrize(
    ("parts", "kv_heads", "shares_keys", "window", "shift"),
    [
        ("array", 2, False, None, 0),
        ("array", 2, False, 9, 40),
        ("array", 1, True, None, -30),
        ("device", 2, False, 9, 40),  # interpreted, and so slow to compile
        pytest.param("device", 2, False, None, 0, marks=pytest.mark.slow),
        pytest.param("device", 1, True, None, -30, marks=pytest.mark.slow),
        pytest.param("device", 4, False, None, 500, marks=pytest.mark.slow),
    ],
)
def test_a_piece_is_attended_and_joined(parts, kv_heads, shares_keys, window, shift):
    """Queries before, inside and behind a piece; two pieces joined are one."""
    rng, num_heads, dim, v_dim, count = np.random.default_rng(4), 4, 32, 16, 150
    q = rng.standard_normal((70, num_heads, dim)).astype(np.float32)
    keys = rng.standard_normal((160, kv_heads, dim)).astype(np.float32)
    values = None if shares_keys else rng.standard_normal((160, kv_heads, v_dim)).astype(np.float32)
    positions = np.arange(70, dtype=np.int32) + np.int32(shift)

    def part(rows, positions, count):
        return PARTS[parts]().keys(
            jnp.asarray(q),
            jnp.asarray(keys[rows]),
            None if values is None else jnp.asarray(values[rows]),
            jnp.asarray(positions),
            jnp.int32(count),
            scale=0.2,
            v_dim=v_dim,
            window=window,
        )

    of = keys[..., :v_dim] if values is None else values
    want, lse = plain(q, keys, of, positions, count, 0.2, window)
    cut = 61
    whole = part(slice(None), positions, count)
    both = join(
        part(slice(cut), positions, cut), part(slice(cut, None), positions - cut, count - cut)
    )
    for found in (whole, both):
        sees = lse > -600
        np.testing.assert_allclose(np.asarray(found.lse)[sees], lse[sees], atol=1e-4)
        np.testing.assert_allclose(np.where(sees[..., None], found.out, 0.0), want, atol=1e-5)
        assert (np.asarray(found.lse)[~sees] <= -1e29).all()


def test_latents_of_a_piece_are_expanded():
    rng = np.random.default_rng(6)
    heads, nope, rope, latent, v = 2, 32, 16, 64, 32
    q = rng.standard_normal((20, heads, nope + rope)).astype(np.float32)
    rows = rng.standard_normal((100, latent + rope)).astype(np.float32)
    w_uk = rng.standard_normal((heads, latent, nope)).astype(np.float32) / 8
    w_uv = rng.standard_normal((heads, v, latent)).astype(np.float32) / 8
    positions = np.arange(60, 80, dtype=np.int32)
    found = PARTS["device"]().latents(
        jnp.asarray(q),
        jnp.asarray(rows),
        jnp.asarray(positions),
        jnp.int32(75),
        w_uk=Weight(jnp.asarray(w_uk)),
        w_uv=Weight(jnp.asarray(w_uv)),
        scale=0.1,
    )
    keys = np.concatenate(
        [
            np.einsum("sc,ncd->snd", rows[:, :latent], w_uk),
            np.repeat(rows[:, None, latent:], heads, axis=1),
        ],
        axis=-1,
    )
    values = np.einsum("sc,nvc->snv", rows[:, :latent], w_uv)
    want, lse = plain(q, keys, values, positions, 75, 0.1, None)
    np.testing.assert_allclose(found.out, want, atol=1e-4)
    np.testing.assert_allclose(found.lse, lse, atol=1e-4)
