"""Tensor names of Kimi-K2.5's text model: a DeepSeek-V3 within a model that also sees."""

from __future__ import annotations

from jaxmoe.models.deepseek_names import DeepseekNames


class KimiK25Names(DeepseekNames):
    prefix = "language_model."
    other_parts = ("vision_tower.", "mm_projector.")
