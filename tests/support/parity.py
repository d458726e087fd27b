"""The committed reference logits of a case."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import ml_dtypes
import numpy as np

FIXTURE_DIR = Path(__file__).parents[1] / "parity" / "fixtures"


@dataclasses.dataclass(frozen=True)
class ParityFixture:
    """See tools/make_parity_fixtures.py, which writes it.

    prompts: token lists of different lengths.
    logits: float32 `[T, V]`, all positions of all prompts in order.
    logits_bf16: the same from transformers' bfloat16 run.
    greedy_tokens `[P, 16]`, greedy_logits `[P, 16, V]`: the continuation of every prompt and the
        logits each token was chosen from.
    """

    prompts: list[list[int]]
    logits: np.ndarray
    logits_bf16: np.ndarray
    greedy_tokens: np.ndarray
    greedy_logits: np.ndarray
    digest: str


def load_fixture(case: str) -> ParityFixture:
    with np.load(FIXTURE_DIR / f"{case}.npz") as f:
        ends = np.cumsum(f["prompt_lengths"])[:-1]
        return ParityFixture(
            prompts=[part.tolist() for part in np.split(f["prompt_tokens"], ends)],
            logits=f["logits"],
            logits_bf16=f["logits_bf16_bits"].view(ml_dtypes.bfloat16).astype(np.float32),
            greedy_tokens=f["greedy_tokens"],
            greedy_logits=f["greedy_logits"],
            digest=str(f["digest"]),
        )
