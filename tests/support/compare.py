"""How two sets of logits are compared."""

from __future__ import annotations

import numpy as np


def relative_error(logits: np.ndarray, reference: np.ndarray) -> float:
    """The largest error as a share of the reference's whole range of logits."""
    spread = float(reference.max() - reference.min())
    return float(np.abs(logits.astype(np.float64) - reference).max()) / spread


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def mean_kl(logits: np.ndarray, reference: np.ndarray) -> float:
    """KL(reference || logits) of the next-token distributions, mean over positions, in nats."""
    p, q = _log_softmax(reference), _log_softmax(logits)
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())
