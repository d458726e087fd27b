import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.sampling.inputs import RowSettings, pack_biases, pack_rows
from jaxmoe.sampling.logits import TokenCounts, adjust, clear_slot, count_tokens
from jaxmoe.sampling_params import SamplingParams

VOCAB = 50


def by_hand(logits, prompt, output, params):
    out = logits.astype(np.float64)
    for token in set(prompt) | set(output):
        r = params.repetition_penalty
        out[token] = out[token] / r if out[token] > 0 else out[token] * r
    for token in set(output):
        out[token] -= params.presence_penalty + params.frequency_penalty * output.count(token)
    for token, bias in params.logit_bias:
        out[token] += bias
    return out


def test_adjustments_follow_the_text_of_each_row():
    rng = np.random.default_rng(0)
    params = [
        SamplingParams(repetition_penalty=1.3, presence_penalty=0.5),
        SamplingParams(),
        SamplingParams(frequency_penalty=-0.7, logit_bias={3: 5, 49: -100}),
    ]
    prompts = [[1, 2, 2, 7], [4, 5], [9]]
    outputs = [[2, 8, 8], [5, 5, 5], [3, 3, 11]]
    slots = [4, -1, 0]
    counts = TokenCounts.zeros(5, VOCAB)
    step = jax.jit(count_tokens)

    def rows():
        return pack_rows(
            [
                RowSettings(p, 0, 0, 0, 0, slot, len(prompt))
                for p, slot, prompt in zip(params, slots, prompts, strict=True)
            ],
            4,
        )

    # All prompts packed in one step, with two tokens of padding, then the outputs one by one.
    ids = sum(prompts, []) + [0, 0]
    positions = sum([list(range(len(p))) for p in prompts], []) + [0, 0]
    token_rows = sum([[i] * len(p) for i, p in enumerate(prompts)], []) + [-1, -1]
    counts = step(counts, np.int32(ids), np.int32(positions), np.int32(token_rows), rows())
    for t in range(3):
        counts = step(
            counts,
            np.int32([o[t] for o in outputs] + [0]),
            np.int32([len(p) + t for p in prompts] + [0]),
            np.int32([0, 1, 2, -1]),
            rows(),
        )
    logits = rng.normal(size=(4, VOCAB)).astype(np.float32)
    biases = pack_biases([dict(p.logit_bias) for p in params], 4)
    got = np.asarray(jax.jit(adjust)(logits, counts, rows(), biases))
    for i, p in enumerate(params):
        np.testing.assert_allclose(got[i], by_hand(logits[i], prompts[i], outputs[i], p), rtol=1e-5)
    np.testing.assert_array_equal(got[1], logits[1])
    np.testing.assert_array_equal(got[3], logits[3])
    cleared = clear_slot(counts, jnp.int32(4))
    assert int(cleared.written[4].sum()) == 0 and not bool(cleared.in_prompt[4].any())
    assert int(cleared.written[0].sum()) == 3


def test_minus_infinity_bans_a_token():
    counts = TokenCounts.zeros(1, VOCAB)
    rows = pack_rows([RowSettings(SamplingParams(), 0, 0, 0, 0, 0, 1)], 1)
    biases = pack_biases([{7: -np.inf}], 1)
    got = np.asarray(jax.jit(adjust)(np.zeros((1, VOCAB), np.float32), counts, rows, biases))
    assert got[0, 7] == -np.inf and np.count_nonzero(got) == 1
