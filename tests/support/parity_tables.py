"""The README's tables of what runs, from the registry and what the parity tests wrote down.

    JAXMOE_PARITY_RESULTS=1 pytest tests/parity/test_parity.py -m "slow or not slow"

writes tests/parity/results.json anew, one entry a case that passed both tests on the CPU kernels.
Only what has an entry made of the fixture as it is now is called supported.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmoe.config.model_config import ModelConfig
from jaxmoe.models.registry import SUPPORTED
from support import tiny_models
from support.parity import load_fixture

RESULTS = Path(__file__).parents[1] / "parity" / "results.json"
# Formats as the tables call them.
WORDS = {
    "bf16": "BF16",
    "fp8_block": "FP8 block",
    "fp8_channel": "FP8 channel",
    "int4_g32": "INT4 experts in groups of 32",
    "int4_g128": "INT4 in groups of 128",
    "mxfp4": "MXFP4",
    "mxfp8": "MXFP8",
    "nvfp4": "NVFP4",
}
# Of INT4 values with zero points, which are held in two formats, by how they are stored.
LAYOUTS = {"awq": "AWQ", "gptq": "GPTQ", "compressed-tensors": "INT4 with zero points"}
FIGURES = ("float32_error", "bfloat16_kl", "transformers_kl")


def note(case: str, **figures: float) -> None:
    """Writes a passed test's figures down, if asked to by the environment."""
    if not os.environ.get("JAXMOE_PARITY_RESULTS"):
        return
    results = load_results()
    fixture = load_fixture(case).digest[:16]
    entry = results.get(case, {})
    if entry.get("fixture") != fixture:  # figures of another fixture say nothing
        entry = {"fixture": fixture}
    results[case] = entry | {name: float(f"{value:.2g}") for name, value in figures.items()}
    ordered = {case: results[case] for case in tiny_models.CASES if case in results}
    RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")


def load_results() -> dict[str, dict[str, Any]]:
    return json.loads(RESULTS.read_text())


def supported(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A row an architecture: models, and the formats it was held to transformers in."""
    formats: dict[str, list[str]] = {architecture: [] for architecture in SUPPORTED}
    for case in tiny_models.CASES:
        if case in results and all(figure in results[case] for figure in FIGURES):
            architecture = ModelConfig.from_hf(tiny_models.hf_config(case)).architecture
            word = _word(case)
            if word not in formats[architecture]:
                formats[architecture].append(word)
    lines = ["| `architectures` in config.json | models | weights |", "|---|---|---|"]
    lines += [
        f"| `{architecture}` | {family.models} | {', '.join(formats[architecture])} |"
        for architecture, family in SUPPORTED.items()
    ]
    return "\n".join(lines) + "\n"


def _word(case: str) -> str:
    """What a case's weights are, with the size of groups that was held to transformers."""
    config = tiny_models.hf_config(case)
    held = tiny_models.FORMATS.get(case, "bf16")
    if held.startswith("uint4"):
        word = LAYOUTS[ModelConfig.from_hf(config).quant.layout]
        size = config.get("quantization_config", {}).get("group_size")
        return f"{word} in groups of {size}" if size else word
    word = WORDS[held]
    return f"FP8 block with {word} experts" if config["model_type"] == "deepseek_v4" else word


def held(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A row a case: how near it comes to transformers."""
    lines = [
        "| case | float32: largest error, of the logit range (limit 1e-4) | BF16: mean KL to the "
        "float32 reference | transformers' own BF16 run |",
        "|---|---|---|---|",
    ]
    for case, entry in results.items():
        figures = " | ".join(_short(entry.get(figure)) for figure in FIGURES)
        lines.append(f"| {tiny_models.TITLES[case]} | {figures} |")
    return "\n".join(lines) + "\n"


def _short(value: float | None) -> str:
    """1.5e-6, as short as it goes."""
    return "" if value is None else f"{value:.1e}".replace("e-0", "e-")
