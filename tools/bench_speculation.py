"""What guesses of the draft head cost and gain: decode without, and with each number of guesses.

Weights are random, at the dimensions of --config, or those of the checkpoint --model. Rounds
alternate between engines without and with the head (--speculative=mtp), each started anew. For
every number of guesses it prints the bytes of routed experts that a step reads, what a guess adds
to them (its share of the head's own included), a step's time, the share of right guesses from which
the step pays, and what was gained with those that were right: tokens a second over those without.
Random weights guess nothing right, so there the last is the whole loss.

    tools/bench_speculation.py --config=configs/bench/glm_4_7_flash_narrow.json --batch 1 4
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from jaxmoe import SamplingParams
from jaxmoe.config.engine_config import EngineConfig
from jaxmoe.engine.start import Started, start
from jaxmoe.scheduler.draft_policy import expected_tokens

_WARM_STEPS = 6  # compile, and make the first guesses


@dataclasses.dataclass(frozen=True)
class Run:
    """Decode steps of one engine. step_s: median. expert_bytes: a step's. tokens: a step's."""

    step_s: float
    expert_bytes: float
    tokens: float
    verified: int
    right: int


@dataclasses.dataclass(frozen=True)
class Figures:
    """guesses: verified in a step, of each sequence. added_bytes: of routed experts, by a guess.
    pays_from: the share of right guesses at which a step with them is as fast a token; None: never.
    gain: tokens a second over those without guesses. Of single rounds: gains.
    """

    batch: int
    guesses: int
    step_ms: float
    expert_mb: float
    added_mb: float
    pays_from: float | None
    right: float
    gain: float
    gains: tuple[float, ...]


def pays_from(guesses: int, ratio: float) -> float | None:
    """The chance of a guess to be right, if those before it are, from which steps that take `ratio`
    times as long pay. 0 where they take no longer.
    """
    if ratio <= 1:
        return 0.0
    if expected_tokens(guesses, 1.0) < ratio:
        return None
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_tokens(guesses, middle) < ratio else (low, middle)
    return high


def figures(batch: int, guesses: int, plain: Sequence[Run], guessing: Sequence[Run]) -> Figures:
    """Of rounds in pairs, one without guesses and one with."""
    ratios = [g.step_s / p.step_s for p, g in zip(plain, guessing, strict=True)]
    gains = tuple(
        g.tokens / p.tokens / ratio - 1 for p, g, ratio in zip(plain, guessing, ratios, strict=True)
    )
    plain_bytes, with_bytes = (
        statistics.median(run.expert_bytes for run in runs) for runs in (plain, guessing)
    )
    verified = sum(run.verified for run in guessing)
    return Figures(
        batch=batch,
        guesses=guesses,
        step_ms=statistics.median(run.step_s for run in guessing) * 1e3,
        expert_mb=with_bytes / 1e6,
        added_mb=(with_bytes - plain_bytes) / (batch * guesses) / 1e6,
        pays_from=pays_from(guesses, statistics.median(ratios)),
        right=sum(run.right for run in guessing) / verified if verified else 0.0,
        gain=statistics.median(gains),
        gains=gains,
    )


def measure(started: Started, batch: int, steps: int, context: int) -> Run:
    engine, rng = started.engine, np.random.default_rng(batch)
    most = (steps + _WARM_STEPS + 2) * (1 + started.config.max_draft_tokens)
    params = SamplingParams(temperature=0.0, max_tokens=most, ignore_eos=True)
    for i in range(batch):
        prompt = rng.integers(1, started.model_config.vocab_size, context).tolist()
        engine.add_request(prompt, params, request_id=str(i))
    times: list[float] = []
    before = after = (0.0, 0, 0, 0)
    while len(times) < steps + _WARM_STEPS:
        begin = time.perf_counter()
        engine.step()
        elapsed = time.perf_counter() - begin
        running = engine.scheduler.running
        if len(running) != batch or not all(s.output_token_ids for s in running):
            continue
        times.append(elapsed)
        after = _counts(started)
        if len(times) == _WARM_STEPS:
            before = after
    for i in range(batch):
        engine.abort(str(i))
    read, tokens, verified, right = (b - a for a, b in zip(before, after, strict=True))
    measured = times[_WARM_STEPS:]
    return Run(
        statistics.median(measured), read / len(measured), tokens / len(measured), verified, right
    )


def _counts(started: Started) -> tuple[float, int, int, int]:
    stats = started.engine.stats()
    return (
        started.runtime.stats()["experts_weight_bytes"],
        sum(len(s.output_token_ids) for s in started.engine.scheduler.running),
        int(stats["draft_tokens_total"]),
        int(stats["draft_tokens_accepted_total"]),
    )


@contextlib.contextmanager
def engine_of(model: str, is_random: bool, batch: int, guesses: int) -> Iterator[Started]:
    """guesses: 0 is without the head."""
    config = EngineConfig(
        model=model,
        load_format="dummy" if is_random else "auto",
        speculative="mtp" if guesses else "off",
        max_draft_tokens=max(guesses, 1),
        device="cpu",
        max_num_seqs=batch,
        max_model_len=1024,
        prefix_cache=False,
        show_progress=False,
    )
    started = start(config)
    try:
        yield started
    finally:
        started.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", type=Path)
    source.add_argument("--model", type=Path)
    parser.add_argument("--moe_layers", type=int, help="of --config; default: as many as it has")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--guesses", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--context", type=int, default=32)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = args.model
        if model is None:
            hf = json.loads(args.config.read_text())
            if args.moe_layers is not None:
                dense = min(hf.get("first_k_dense_replace", 0), 1)
                hf |= {"first_k_dense_replace": dense, "num_hidden_layers": dense + args.moe_layers}
            model = Path(folder)
            (model / "config.json").write_text(json.dumps(hf | {"num_nextn_predict_layers": 1}))
        rows = []
        for batch in args.batch:
            for guesses in args.guesses:
                runs: dict[int, list[Run]] = {0: [], guesses: []}
                for _ in range(args.rounds):
                    for number, of_number in runs.items():
                        with engine_of(str(model), args.model is None, batch, number) as started:
                            of_number.append(measure(started, batch, args.steps, args.context))
                rows.append(figures(batch, guesses, runs[0], runs[guesses]))
                print(line(rows[-1], runs[0]), flush=True)
    if args.json:
        args.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))


def line(row: Figures, plain: Sequence[Run]) -> str:
    before = statistics.median(run.step_s for run in plain) * 1e3
    read = statistics.median(run.expert_bytes for run in plain) / 1e6
    needed = "never" if row.pays_from is None else f"{row.pays_from:.0%}"
    return (
        f"{row.batch} sequences, {row.guesses} guesses: step {before:.1f} -> {row.step_ms:.1f} ms, "
        f"experts {read:.0f} -> {row.expert_mb:.0f} MB, a guess adds {row.added_mb:.0f} MB; pays "
        f"from {needed} right; {row.right:.0%} were: {row.gain:+.0%} tokens a second "
        f"({min(row.gains):+.0%} to {max(row.gains):+.0%})"
    )


if __name__ == "__main__":
    main()
