"""The files by which a prepared checkpoint (prepared.py) is known, finished or not."""

from __future__ import annotations

from pathlib import Path

from jaxmoe.weights.safetensors_header import fail

MANIFEST = "jaxmoe_prepared.json"  # of the prepared form (prepared.py), which `open` tells apart
UNFINISHED = "jaxmoe_unfinished.json"  # its place while a conversion is under way
ROUNDING = "jaxmoe_rounding.jsonl"  # meanwhile, what rounding changed in the pieces there are


def refuse_unfinished(directory: Path) -> None:
    """Raises CheckpointError where a conversion was interrupted."""
    if (directory / UNFINISHED).exists() and not (directory / MANIFEST).exists():
        fail(
            directory,
            "the conversion into this directory was not finished; run jaxmoe_convert with the "
            "same --model and --output again, it goes on where it stopped",
        )
