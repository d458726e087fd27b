"""Models: the decoder, the architectures it covers and their tensor names."""

from jaxmoe.models.decoder import Decoder, PageArraySpec, StateArraySpec, cache_spec, state_spec
from jaxmoe.models.registry import (
    SUPPORTED,
    build_model,
    configured_formats,
    describe_model,
    name_map,
    stored_formats,
)

__all__ = [
    "SUPPORTED",
    "Decoder",
    "PageArraySpec",
    "StateArraySpec",
    "build_model",
    "cache_spec",
    "configured_formats",
    "describe_model",
    "name_map",
    "state_spec",
    "stored_formats",
]
