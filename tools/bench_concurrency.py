"""What prefill and decode cost each other, and what a batch gains: the scenarios of the paper's
section 3.3, sent to any OpenAI-compatible endpoint, or to a jaxmoe_serve started for it.

    tools/bench_concurrency.py --url=http://127.0.0.1:8080 --json=rival.json
    tools/bench_concurrency.py --json=ours.json -- --model=/models/mine --disaggregate=on

What stands behind `--` are flags of the server. Scenarios: 1P, a long prompt alone; 1D, one text
being written; 1P+1D and 1P+2D, a long prompt that comes while one or two texts are being written;
2D; and batches of texts. No prompt begins like another, so that no cache of prefixes helps.

ttft: to the prompt's first token. tpot: of the texts, over all of their tokens. beside: tpot from
the moment the long prompt was sent to its first token, with the gaps that reach into that time;
apart: of the same texts' other tokens, so that a machine that is busy with more meets both. tok/s:
of all texts together. Medians of --repeats. A key is read from JAXMOE_API_KEY or OPENAI_API_KEY.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import contextlib
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests")]

from reliability.figures import machine  # noqa: E402

from jaxmoe.cli import bench_client, bench_load  # noqa: E402
from jaxmoe.cli.bench_client import Timed  # noqa: E402
from jaxmoe.common.errors import ConfigError  # noqa: E402

# Pieces of a text before the long prompt is sent: by then its own prompt is long computed.
_SETTLED_PIECES = 6
_TEXT_PROMPT_TOKENS = 16  # of texts being written: next to nothing


@dataclasses.dataclass(frozen=True)
class Scenario:
    """So many long prompts beside so many texts being written."""

    prompts: int
    texts: int

    @property
    def name(self) -> str:
        parts = [f"{n}{kind}" for n, kind in ((self.prompts, "P"), (self.texts, "D")) if n]
        return "+".join(parts)


PAPER = (Scenario(1, 0), Scenario(0, 1), Scenario(1, 1), Scenario(0, 2), Scenario(1, 2))


class BenchError(Exception):
    """A request of a scenario was not answered."""


def tpot_between(text: Timed, begin_s: float, end_s: float) -> tuple[float | None, float | None]:
    """Seconds per token of a text between two moments, by all gaps that reach into that time (a
    text that stood still meanwhile shows it), and of its other tokens. None where there are none.
    """
    times = text.chunk_s
    first = max(bisect.bisect_right(times, begin_s) - 1, 0)
    last = min(bisect.bisect_left(times, end_s), len(times) - 1)
    if last <= first:
        return None, None
    per_piece = text.output_tokens / len(times)
    inside, outside = last - first, len(times) - 1 - (last - first)
    seconds = times[last] - times[first]
    apart = times[-1] - times[0] - seconds
    return seconds / inside / per_piece, apart / outside / per_piece if outside else None


def figures(scenario: Scenario, prompts: Sequence[Timed], texts: Sequence[Timed]) -> dict[str, Any]:
    """Of one run. Raises BenchError where a request failed."""
    for timed in (*prompts, *texts):
        if timed.error:
            raise BenchError(f"{scenario.name}: {timed.error}")
    found: dict[str, Any] = {"ttft_s": None, "prompt_tokens": None, "beside_tpot_s": None}
    found |= {
        "apart_tpot_s": None,
        "rise": None,
        "tpot_s": None,
        "tok_per_s": None,
        "texts_ended_early": 0,
    }
    if prompts:
        found["ttft_s"] = statistics.mean(t.ttft_s for t in prompts)
        known = [t.prompt_tokens for t in prompts if t.prompt_tokens is not None]
        found["prompt_tokens"] = statistics.mean(known) if known else None
    if texts:
        each = [t.tpot_s for t in texts if t.tpot_s is not None]
        found["tpot_s"] = statistics.mean(each) if each else None
        begin, end = min(t.due_s for t in texts), max(t.end_s for t in texts)
        found["tok_per_s"] = sum(t.output_tokens for t in texts) / (end - begin)
    if prompts and texts:
        begin, end = min(t.due_s for t in prompts), max(t.chunk_s[0] for t in prompts)
        pairs = [tpot_between(t, begin, end) for t in texts]
        known = [(b, a) for b, a in pairs if b is not None and a is not None]
        if known:
            found["beside_tpot_s"] = statistics.mean(b for b, _ in known)
            found["apart_tpot_s"] = statistics.mean(a for _, a in known)
            found["rise"] = statistics.mean(b / a for b, a in known) - 1
        found["texts_ended_early"] = sum(t.chunk_s[-1] < end for t in texts)
    return found


def median(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of every figure; None where no run has it."""
    out: dict[str, Any] = {}
    for name in runs[0]:
        values = [run[name] for run in runs if run[name] is not None]
        out[name] = statistics.median(values) if values else None
    return out


class Bench:
    """Sends scenarios to one endpoint."""

    def __init__(self, client: Any, given: argparse.Namespace, model: str) -> None:
        self._client, self._given, self._model = client, given, model
        self._seed = given.seed

    def _body(self, prompt_tokens: int, max_tokens: int) -> dict[str, Any]:
        self._seed += 1
        prompts = bench_load.made_up_prompts(1, prompt_tokens, self._seed)
        common: dict[str, Any] = {"max_tokens": max_tokens, "temperature": 0.0}
        if self._given.ignore_eos:
            common["ignore_eos"] = True
        return bench_load.bodies(prompts, self._given.endpoint, self._model, common)[0]

    def _send(self, body: dict[str, Any]) -> tuple[Timed, asyncio.Task[Timed]]:
        timed = Timed(time.perf_counter())
        sending = bench_client.send(self._client, self._given.endpoint, body, timed.due_s, timed)
        return timed, asyncio.ensure_future(sending)

    async def run(self, scenario: Scenario) -> dict[str, Any]:
        given = self._given
        started = [
            self._send(self._body(_TEXT_PROMPT_TOKENS, given.output_tokens))
            for _ in range(scenario.texts)
        ]
        texts, tasks = [t for t, _ in started], [task for _, task in started]
        while scenario.prompts and any(
            len(t.chunk_s) < _SETTLED_PIECES and not task.done() for t, task in started
        ):
            await asyncio.sleep(0.002)
        sent = [self._send(self._body(given.prompt_tokens, 2)) for _ in range(scenario.prompts)]
        await asyncio.gather(*(task for _, task in sent), *tasks)
        return figures(scenario, [t for t, _ in sent], texts)


async def measure(url: str, given: argparse.Namespace) -> dict[str, Any]:
    """Every scenario's medians and runs, and the model that was asked."""
    key = os.environ.get("JAXMOE_API_KEY") or os.environ.get("OPENAI_API_KEY")
    batches = [Scenario(0, n) for n in given.batch if n > 2]
    async with bench_client.http_client(url, key, given.timeout_s) as client:
        model = given.served_model or await bench_client.first_model(client)
        bench = Bench(client, given, model)
        scenarios = [*PAPER, *batches]
        found = []
        for scenario in scenarios:
            await bench.run(scenario)  # compiles, where something has to be compiled
            runs = [await bench.run(scenario) for _ in range(given.repeats)]
            found.append({"scenario": scenario.name, **median(runs), "runs": runs})
            print(row(found[-1]), flush=True)
    return {"url": url, "model": model, "scenarios": found}


_COLUMNS = ("scenario", "prompt", "ttft s", "tpot ms", "beside ms", "apart ms", "tok/s")


def row(found: dict[str, Any]) -> str:
    def text(name: str, factor: float, form: str) -> str:
        value = found[name]
        return "-" if value is None else format(value * factor, form)

    cells = (
        text("prompt_tokens", 1, ".0f"),
        text("ttft_s", 1, ".3f"),
        text("tpot_s", 1e3, ".2f"),
        text("beside_tpot_s", 1e3, ".2f"),
        text("apart_tpot_s", 1e3, ".2f"),
        text("tok_per_s", 1, ".1f"),
    )
    note = "  (a text ended before the prompt: raise --output_tokens)"
    return (
        f"{found['scenario']:>8}"
        + "".join(f"{cell:>11}" for cell in cells)
        + (note if found["texts_ended_early"] else "")
    )


def header() -> str:
    return f"{_COLUMNS[0]:>8}" + "".join(f"{name:>11}" for name in _COLUMNS[1:])


def summary(found: dict[str, Any]) -> list[str]:
    """What the scenarios say about each other."""
    of = {f["scenario"]: f for f in found["scenarios"]}
    lines = []
    for beside in ("1P+1D", "1P+2D"):
        if of[beside]["rise"] is not None:
            rise = of[beside]["rise"]
            lines.append(f"{beside}: time per token while the prompt is computed {rise:+.1%}")
        if of["1P"]["ttft_s"] and of[beside]["ttft_s"]:
            rise = of[beside]["ttft_s"] / of["1P"]["ttft_s"] - 1
            lines.append(f"{beside}: the prompt's time to first token {rise:+.1%}")
    one = of["1D"]["tok_per_s"]
    texts = [
        f for f in found["scenarios"] if f["scenario"].endswith("D") and "+" not in f["scenario"]
    ]
    gains = [f"{f['scenario']} {f['tok_per_s'] / one:.2f}" for f in texts if one]
    if gains:
        lines.append("tok/s against 1D: " + ", ".join(gains))
    return lines


@contextlib.contextmanager
def endpoint(given: argparse.Namespace) -> Iterator[str]:
    """The given URL, or that of a server of our own, which ends with this."""
    if given.url is not None:
        if given.server:
            raise ConfigError("flags of the server behind -- and --url: wanted one of them")
        yield given.url
        return
    from reliability.server import running

    with running("--quiet", *given.server) as server:
        yield server.url


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", help="of a running server; default: one is started")
    parser.add_argument("--served_model", help="default: the first that the server names")
    parser.add_argument("--endpoint", choices=tuple(bench_client.PATHS), default="completions")
    parser.add_argument("--prompt_tokens", type=int, default=1024, help="words of a long prompt")
    parser.add_argument("--output_tokens", type=int, default=256, help="of a text")
    parser.add_argument(
        "--batch",
        type=lambda text: [int(n) for n in text.split(",")],
        default=[4, 8, 16],
        help="texts at once, beside the scenarios with one and two",
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout_s", type=float, default=600.0)
    parser.add_argument(
        "--noignore_eos", dest="ignore_eos", action="store_false", help="for servers without it"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("server", nargs="*", help="behind --: flags of the server to start")
    given = parser.parse_args(argv)
    if given.repeats < 1 or min(given.batch, default=1) < 1 or given.output_tokens < 2:
        parser.error("--repeats and --batch are at least 1, --output_tokens at least 2")
    return given


def main(argv: Sequence[str] | None = None) -> int:
    given = parse(sys.argv[1:] if argv is None else argv)
    try:
        with endpoint(given) as url:
            print(header(), flush=True)
            found = asyncio.run(measure(url, given))
    except (BenchError, ConfigError) as error:
        print(f"bench_concurrency: {error}", file=sys.stderr)
        return 1
    for line in summary(found):
        print(line)
    if given.json is not None:
        options = {k: v for k, v in vars(given).items() if k not in ("json", "url")}
        found = {"machine": machine(), "options": options, **found}
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
