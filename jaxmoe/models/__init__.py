"""Models: the decoder, the architectures it covers and their tensor names."""

from jaxmoe.models.decoder import Decoder, PageArraySpec, cache_spec
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
    "build_model",
    "cache_spec",
    "configured_formats",
    "describe_model",
    "name_map",
    "stored_formats",
]
