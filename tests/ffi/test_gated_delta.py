"""`gated_delta` against the oracle, and against itself in other packings: convolution, recurrence,
kept states.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.native import bits

from jaxmoe.config.model_config import GatedDeltaConfig
from jaxmoe.ffi.native_ops import NativeOps
from jaxmoe.ffi.ops import GatedDeltaWeights, StepInputs
from jaxmoe.ffi.reference import ReferenceOps
from jaxmoe.ffi.registry import NATIVE_ERRORS

CONFIG = GatedDeltaConfig(2, 4, 128, 128, 4, fused_projections=True)
ODD = GatedDeltaConfig(3, 3, 16, 48, 3, fused_projections=False)
NUM_SLOTS = 7


@dataclasses.dataclass
class Text:
    """The inputs of all tokens of a sequence."""

    qkv: np.ndarray
    decay: np.ndarray
    rate: np.ndarray

    @classmethod
    def random(cls, rng: np.random.Generator, config: GatedDeltaConfig, length: int) -> Text:
        shapes = config.conv_channels, config.num_value_heads, config.num_value_heads
        return cls(*(rng.standard_normal((length, n)).astype(np.float32) for n in shapes))


class Machine:
    """States of some slots, and steps over them. Slots nobody wrote hold NaN."""

    def __init__(self, ops: Any, config: GatedDeltaConfig):
        c = config
        rng = np.random.default_rng(1)
        self.weights = GatedDeltaWeights(
            jnp.array(0.5 * rng.standard_normal((c.conv_width, c.conv_channels)), jnp.float32),
            jnp.array(rng.standard_normal(c.num_value_heads) - 2, jnp.float32),
            jnp.array(rng.standard_normal(c.num_value_heads), jnp.float32),
        )
        delta = (NUM_SLOTS, c.num_value_heads, c.key_head_dim, c.value_head_dim)
        conv = (NUM_SLOTS, c.conv_width - 1, c.conv_channels)
        self.cache = tuple(jnp.full(shape, jnp.nan, jnp.float32) for shape in (conv, delta))
        self._run = jax.jit(lambda *args: ops.gated_delta(*args, config), donate_argnums=4)

    def step(self, parts: list[tuple[Text, int, int, int]], *, padding=0, source=None, saves=()):
        """One step of `(text, start, end, slot)`; the outputs of each.

        source: slots read instead of the rows' own. saves: (token of the step, slot).
        """
        counts = [end - start for _, start, end, _ in parts]
        total = sum(counts) + padding

        def packed(which: str) -> jax.Array:
            rows = np.concatenate([getattr(t, which)[s:e] for t, s, e, _ in parts])
            pad = np.full((padding, rows.shape[1]), np.nan, np.float32)
            return jnp.array(np.concatenate([rows, pad]))

        token_rows = np.concatenate([np.repeat(np.arange(len(parts)), counts), [-1] * padding])
        positions = np.concatenate([np.arange(s, e) for _, s, e, _ in parts] + [[0] * padding])
        slots = [slot for *_, slot in parts]
        kept = np.full(total, -1, np.int32)
        for token, slot in saves:
            kept[token] = slot
        nothing = jnp.zeros(total, jnp.int32)
        step = StepInputs(
            nothing,
            jnp.array(positions, jnp.int32),
            jnp.array(token_rows, jnp.int32),
            nothing,
            jnp.zeros((len(parts), 1), jnp.int32),
            jnp.array([*(source or slots), -1], jnp.int32),
            jnp.array([*slots, -1], jnp.int32),
            jnp.array(kept),
        )
        inputs = packed("qkv"), packed("decay"), packed("rate")
        out, self.cache = self._run(*inputs, self.weights, self.cache, step)
        assert not np.asarray(out)[sum(counts) :].any()
        return np.split(np.asarray(out)[: sum(counts)], np.cumsum(counts)[:-1])


@pytest.mark.parametrize("config", [CONFIG, ODD], ids=["real", "odd"])
def test_agrees_with_the_reference(isa_runtime, config):
    rng = np.random.default_rng(0)
    texts = [Text.random(rng, config, n) for n in (70, 5, 1)]
    native = Machine(NativeOps(isa_runtime, None, "vector"), config)
    want = Machine(ReferenceOps(), config)
    steps = [
        dict(parts=[(texts[0], 0, 40, 2), (texts[1], 0, 3, 0)], padding=5, saves=[(31, 5)]),
        dict(parts=[(texts[1], 3, 4, 0), (texts[2], 0, 1, 6), (texts[0], 40, 41, 2)]),
        dict(parts=[(texts[0], 41, 70, 2), (texts[1], 4, 5, 0)]),
        dict(parts=[(texts[0], 32, 50, 1)], source=[5]),
    ]
    for step in steps:
        for got, wanted in zip(native.step(**step), want.step(**step), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=2e-4, atol=2e-6)
    for got, wanted in zip(native.cache, want.cache, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-4, atol=2e-5)


def test_a_token_is_the_same_bits_however_its_text_is_cut_and_packed(isa_runtime):
    rng = np.random.default_rng(0)
    text, other = Text.random(rng, CONFIG, 90), Text.random(rng, CONFIG, 90)
    whole = Machine(NativeOps(isa_runtime, None, "vector"), CONFIG)
    (want,) = whole.step([(text, 0, 90, 0)])
    cut = Machine(NativeOps(isa_runtime, None, "matrix"), CONFIG)
    ends, got = [0, 1, 2, 7, 64, 65, 89, 90], []
    for i, (start, end) in enumerate(zip(ends, ends[1:], strict=False)):
        mine, theirs = (text, start, end, 3), (other, i, i + 1, 1)
        parts = cut.step([theirs, mine] if i % 2 else [mine, theirs], padding=i)
        got.append(parts[i % 2])
    np.testing.assert_array_equal(bits(np.concatenate(got)), bits(want))
    for a, b in zip(whole.cache, cut.cache, strict=True):
        np.testing.assert_array_equal(bits(a)[0], bits(b)[3])


def test_kept_states_go_on_where_they_were_kept(isa_runtime):
    """Kept between and at the ends of steps, read by two at once, and left as they were."""
    rng = np.random.default_rng(0)
    text = Text.random(rng, CONFIG, 20)
    machine = Machine(NativeOps(isa_runtime, None, "vector"), CONFIG)
    first = machine.step([(text, 0, 9, 0)], saves=[(0, 4), (6, 5), (8, 6)])[0]
    rest = machine.step([(text, 9, 20, 0)])[0]
    want = np.concatenate([first, rest])
    kept = [bits(a)[4:].copy() for a in machine.cache]
    for start, slot in ((1, 4), (7, 5), (9, 6)):
        got = machine.step([(text, start, 20, 1), (text, start, 15, 2)], source=[slot, slot])
        np.testing.assert_array_equal(bits(got[0]), bits(want[start:]))
        np.testing.assert_array_equal(bits(got[1]), bits(want[start:15]))
    for a, b in zip(machine.cache, kept, strict=True):
        np.testing.assert_array_equal(bits(a)[4:], b)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (dict(parts=[(0, 0, 2, 7)], source=[0]), "state_to"),
        (dict(parts=[(0, 0, 2, -1)]), "state_from"),
        (dict(parts=[(0, 0, 2, 1), (1, 0, 2, 1)]), "nothing else"),
        (dict(parts=[(0, 0, 2, 1)], saves=[(0, 1)]), "nothing else"),
        (dict(parts=[(0, 0, 2, 1)], saves=[(1, 9)]), "state_saves"),
        (dict(parts=[(0, 1, 2, 1), (1, 0, 1, 2)], source=[2, 2]), "no other row writes"),
    ],
)
def test_slots_that_cannot_be_are_refused(isa_runtime, step, words):
    rng = np.random.default_rng(0)
    texts = [Text.random(rng, CONFIG, 4) for _ in range(2)]
    parts = [(texts[i], start, end, slot) for i, start, end, slot in step["parts"]]
    machine = Machine(NativeOps(isa_runtime, None, "vector"), CONFIG)
    with pytest.raises(NATIVE_ERRORS, match=words):
        machine.step(**(step | {"parts": parts}))


def test_a_step_without_state_slots_is_refused(isa_runtime):
    nothing = jnp.zeros(1, jnp.int32)
    step = StepInputs(nothing, nothing, nothing, nothing, nothing[None])
    for ops in (NativeOps(isa_runtime, None, "vector"), ReferenceOps()):
        machine = Machine(ops, CONFIG)
        x = jnp.zeros((1, CONFIG.conv_channels))
        heads = jnp.zeros((1, CONFIG.num_value_heads))
        with pytest.raises(ValueError, match="no state slots"):
            ops.gated_delta(x, heads, heads, machine.weights, machine.cache, step, CONFIG)
