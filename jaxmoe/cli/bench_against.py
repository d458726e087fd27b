"""A rival's own benchmark beside ours: in turn, in the same minutes, at equal bytes per weight.

    --against=llama-bench:PATH    llama.cpp's or ik_llama.cpp's, on --against_model (a GGUF)

Every round runs ours once and then the rival's tool once, so that both meet the same machine. What
the rival counts is its own: llama-bench leaves out tokenizing and sampling.
"""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxmoe.common.errors import ConfigError, JaxMoeError

# FP8 with block scales is 1.0002 bytes a weight, Q8_0 1.0625, Q4_0 and INT4 group-32 0.5625.
_MOST_BYTES_APART = 1.15
# Of the number of weights: the same dims, give or take norms and what a format pads.
_MOST_WEIGHTS_APART = 1.05
_TIMEOUT_S = 3600.0  # one round of a rival that has to read a large model from disk


class Told(NamedTuple):
    """What one run of a rival's tool said. bytes_per_weight, num_weights: of its model."""

    tokens_per_s: float
    bytes_per_weight: float
    num_weights: int
    name: str


class LlamaBench:
    """llama-bench, of llama.cpp or of a fork that kept its JSON."""

    def __init__(self, path: Path, model: Path, arguments: str = "") -> None:
        self.path, self.model = path, model
        self.arguments = shlex.split(arguments)
        for what, file in (("--against", path), ("--against_model", model)):
            if not file.is_file():
                raise ConfigError(f"{what}: there is no file {file}")

    def command(self, *, threads: int, prompt: int, generate: int, depth: int) -> list[str]:
        sizes = ["-p", str(prompt), "-n", str(generate), "-r", "1", "-t", str(threads)]
        if depth:
            sizes += ["-d", str(depth)]
        return [str(self.path), "-m", str(self.model), *sizes, "-o", "json", *self.arguments]

    def run(self, *, threads: int, prompt: int = 0, generate: int = 0, depth: int = 0) -> Told:
        """One repetition; JaxMoeError with the tool's own words where it fails."""
        command = self.command(threads=threads, prompt=prompt, generate=generate, depth=depth)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired) as e:
            raise JaxMoeError(f"--against: {shlex.join(command)}: {e}") from None
        if done.returncode:
            words = done.stderr.strip().splitlines()[-3:]
            raise JaxMoeError(
                f"--against: {shlex.join(command)} ended with {done.returncode}: {' '.join(words)}"
            )
        return parse(done.stdout, shlex.join(command))


def parse(text: str, command: str) -> Told:
    """llama-bench's JSON; some builds write other lines around it."""
    begin, end = text.find("["), text.rfind("]")
    try:
        (run,) = json.loads(text[begin : end + 1])
        return Told(
            float(run["avg_ts"]),
            run["model_size"] / run["model_n_params"],
            int(run["model_n_params"]),
            f"{run.get('model_type', 'model')}, build {run.get('build_commit', 'unknown')}",
        )
    except (ValueError, KeyError, TypeError, ZeroDivisionError):
        raise JaxMoeError(
            f"--against: {command} wrote {text.strip()[:200]!r}; wanted llama-bench's JSON of one "
            "test"
        ) from None


def make(against: str, model: str | None, arguments: str) -> LlamaBench:
    """From --against, --against_model and --against_args."""
    kind, colon, path = against.partition(":")
    if kind != "llama-bench" or not colon or not path:
        raise ConfigError(f"--against: got {against!r}, wanted llama-bench:PATH")
    if not model:
        raise ConfigError("--against: wanted --against_model=FILE.gguf too, of the same dims")
    return LlamaBench(Path(path), Path(model), arguments)


def check_equal(told: Told, num_weights: int, bytes_per_weight: float) -> None:
    """Refuses to compare models of other dims, or of other bytes per weight."""
    for what, ours, theirs, most in (
        ("weights", num_weights, told.num_weights, _MOST_WEIGHTS_APART),
        ("bytes per weight", bytes_per_weight, told.bytes_per_weight, _MOST_BYTES_APART),
    ):
        if max(ours, theirs) > most * min(ours, theirs):
            raise JaxMoeError(
                f"--against: {told.name} has {theirs:.10g} {what}, ours {ours:.10g}: wanted the "
                "same dims at equal bytes per weight (FP8 against Q8_0, INT4 against Q4_0)"
            )


def alternate(
    rounds: int, ours: Callable[[], float], theirs: Callable[[], Told]
) -> tuple[list[float], list[Told]]:
    """Tokens per second of ours, and what the rival told; one of each a round."""
    mine: list[float] = []
    told: list[Told] = []
    for _ in range(rounds):
        mine.append(ours())
        told.append(theirs())
    return mine, told


def compare(
    name: str, threads: int, mine: Sequence[float], told: Sequence[Told], command: Sequence[str]
) -> dict[str, Any]:
    """Ready for JSON. ratio: of the medians; ratios: round by round."""
    theirs = [t.tokens_per_s for t in told]
    return {
        "name": name,
        "threads": threads,
        "rival": told[0].name,
        "command": shlex.join(command),
        "tokens_per_s": list(mine),
        "rival_tokens_per_s": theirs,
        "rival_bytes_per_weight": told[0].bytes_per_weight,
        "ratio": statistics.median(mine) / statistics.median(theirs),
        "ratios": [a / b for a, b in zip(mine, theirs, strict=True)],
    }


def describe(c: dict[str, Any]) -> str:
    return (
        f"{c['name']}, {c['threads']} threads: {statistics.median(c['tokens_per_s']):.2f} tok/s "
        f"against {statistics.median(c['rival_tokens_per_s']):.2f} of {c['rival']} = "
        f"{c['ratio']:.2f} times (rounds {min(c['ratios']):.2f} to {max(c['ratios']):.2f})"
    )
