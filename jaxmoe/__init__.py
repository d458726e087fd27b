"""jaxmoe: Mixture-of-Experts language models in their original precision, experts in host memory.

`LLM` is the door for Python programs, `jaxmoe_generate` the one for the command line. The names
below are loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxmoe.config.engine_config import EngineConfig
    from jaxmoe.llm import LLM
    from jaxmoe.request import CompletionOutput, Delta, RequestOutput
    from jaxmoe.sampling_params import SamplingParams
    from jaxmoe.structured_output import StructuredOutput

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "CompletionOutput",
    "Delta",
    "EngineConfig",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutput",
]

_HOME = {
    "LLM": "jaxmoe.llm",
    "EngineConfig": "jaxmoe.config.engine_config",
    "SamplingParams": "jaxmoe.sampling_params",
    "StructuredOutput": "jaxmoe.structured_output",
    "RequestOutput": "jaxmoe.request",
    "CompletionOutput": "jaxmoe.request",
    "Delta": "jaxmoe.request",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'jaxmoe' has no attribute {name!r}")
