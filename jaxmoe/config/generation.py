"""What a checkpoint's generation_config.json recommends: sampling defaults and end-of-text ids.

Used where a request says nothing. `do_sample` is ignored, as other servers do: temperature 0 is
greedy.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from jaxmoe.common.errors import CheckpointError, RequestError
from jaxmoe.sampling_params import SamplingParams

# Sampling parameters that generation_config.json calls by the same name.
RECOMMENDED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """params: the defaults of requests. eos_token_ids: None where the file names none.

    max_tokens: the longest completion where a request names no length; kept apart from `params`
    since it gives way to a context that has less room, which a request's own number does not.
    """

    params: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    max_tokens: int | None = None
    eos_token_ids: tuple[int, ...] | None = None

    @classmethod
    def from_dir(cls, path: str | Path) -> GenerationDefaults:
        """Reads generation_config.json; the plain defaults where there is none."""
        file = Path(path) / "generation_config.json"
        if not file.is_file():
            return cls()
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as e:
            raise CheckpointError(f"{file}: not valid JSON: {e}") from None
        if not isinstance(values, dict):
            raise CheckpointError(f"{file}: holds a {type(values).__name__}, wanted an object")
        given = {k: values[k] for k in RECOMMENDED if values.get(k) is not None}
        try:
            params = SamplingParams(**given)
            longest = SamplingParams(max_tokens=values.get("max_new_tokens")).max_tokens
        except RequestError as e:
            raise CheckpointError(f"{file}: {e}") from None
        return cls(params, longest, _ids(file, values.get("eos_token_id")))


def _ids(file: Path, given: Any) -> tuple[int, ...] | None:
    if given is None:
        return None
    ids = given if isinstance(given, list) else [given]
    if not ids or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
        raise CheckpointError(
            f"{file}: eos_token_id is {given!r}, wanted a token id or a list of them"
        )
    return tuple(ids)
