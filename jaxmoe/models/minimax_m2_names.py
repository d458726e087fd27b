"""Tensor names of MiniMax-M2: Mixtral's, and a correction bias beside the router."""

from __future__ import annotations

from jaxmoe.models.mixtral_names import MixtralNames


class MiniMaxM2Names(MixtralNames):
    leaves = {"mlp.router.correction_bias": "block_sparse_moe.e_score_correction_bias"}
