"""jaxmoe_bench: measures this machine's kernels and steps, or a server that speaks OpenAI's API.

    jaxmoe_bench machine                                          memory, bus and kernel rates, kept
    jaxmoe_bench kernel --json=kernel.json --plot=kernel.png      bare kernels, cold weights
    jaxmoe_bench layer                                            the routed-experts operation
    jaxmoe_bench decode --model=DIR_OR_CONFIG.json                whole steps, one token each
    jaxmoe_bench prefill --model=... --against=llama-bench:PATH --against_model=FILE.gguf

machine takes seconds; what it finds is kept for the engine, which chooses prompts' paths by it.
The others state every figure beside the read ceiling and the peak of arithmetic, measured in the
same minute. A server, this one or any other:

    jaxmoe_bench serve --request_rate=0.5,1,2 --slo_ttft_ms=2000 --plot=sweep.png
    jaxmoe_bench serve --url=http://HOST:8000 --concurrency=1,4,16 --json=sweep.json
    jaxmoe_bench throughput --requests=200      all requests at once
    jaxmoe_bench latency --requests=20          one request after the other

Prompts are made up (--input_tokens) or come from --prompts; every point of a sweep sends --requests
of them. The key, if the server wants one, is read from JAXMOE_API_KEY or OPENAI_API_KEY.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from jaxmoe.cli import bench_client, bench_load, bench_local, bench_plot, bench_report, command
from jaxmoe.cli import flags as option_flags
from jaxmoe.cli.bench_load import Point
from jaxmoe.common.errors import ConfigError, JaxMoeError

KINDS = ("serve", "throughput", "latency")
_KEYS = ("JAXMOE_API_KEY", "OPENAI_API_KEY")  # from the environment: flags show in `ps`


def define_flags() -> flags.FlagValues:
    values = flags.FlagValues()

    def said(words: str, default: object) -> str:
        return words if default is None else f"{words} (default {default})"

    def text(name: str, default: str | None, words: str) -> None:
        flags.DEFINE_string(name, default, said(words, default), flag_values=values)

    def whole(name: str, default: int, words: str) -> None:
        words = said(words, default)
        flags.DEFINE_integer(name, default, words, lower_bound=0, flag_values=values)

    def number(name: str, default: float | None, words: str) -> None:
        words = said(words, default)
        flags.DEFINE_float(name, default, words, lower_bound=0.0, flag_values=values)

    flags.DEFINE_enum(
        "suite",
        None,
        [*bench_local.KINDS, *KINDS],
        "what to measure, instead of its name as an argument",
        flag_values=values,
    )
    text("url", "http://127.0.0.1:8000", "of the server, with or without /v1")
    text("model", None, "decode, prefill: a checkpoint, or a config.json for random weights; of a "
         "server: default the first that it names")  # fmt: skip
    flags.DEFINE_enum(
        "endpoint",
        "chat",
        list(bench_client.PATHS),
        "which API to use (default chat)",
        flag_values=values,
    )
    whole("requests", 50, "requests of every point")
    whole("warmup", 2, "requests sent before, one after the other, that do not count")
    whole("input_tokens", 256, "about how long made-up prompts are")
    whole("output_tokens", 128, "max_tokens of every request")
    text("prompts", None, 'JSONL file of {"prompt": ...} or {"messages": ...} to use instead')
    flags.DEFINE_boolean(
        "ignore_eos",
        True,
        "ask for output_tokens whatever the model says; turn off for servers that refuse the field "
        "(default true)",
        flag_values=values,
    )
    number("temperature", 0.0, "of every request")
    text("request_rate", None, "serve: requests per second, or several with commas; inf: at once")
    text("concurrency", None, "serve: most requests in flight, or several with commas")
    number("slo_ttft_ms", None, "goodput counts requests whose first token came within this")
    number("slo_tpot_ms", None, "goodput counts requests whose later tokens took at most this each")
    number("timeout_s", 600.0, "longest silence of the server before a request counts as failed")
    whole("seed", 0, "of prompts and of the moments they are sent at")
    text("json", None, "file for all figures and every request's times")
    text("plot", None, "PNG file for the curves")
    bench_local.define_flags(values)
    flags.DEFINE_boolean("quiet", False, "no progress on stderr", flag_values=values)
    command.define_help(values)
    return values


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command: 0, or 1 after an error or if no request was answered."""
    values = define_flags()
    return command.run(
        "jaxmoe_bench",
        values,
        lambda rest: _run(values, rest),
        lambda: option_flags.usage(values, __doc__ or ""),
        argv,
    )


def _run(values: flags.FlagValues, rest: list[str]) -> int:
    given: dict[str, Any] = {name: values[name].value for name in values}
    if given["suite"]:
        rest = [given["suite"], *rest]
    if len(rest) != 1 or rest[0] not in (*bench_local.KINDS, *KINDS):
        raise ConfigError(
            f"got {' '.join(rest) or 'nothing'}, wanted one of "
            + ", ".join((*bench_local.KINDS, *KINDS))
        )
    for name in ("json", "plot"):
        folder = Path(given[name] or ".").parent
        if not folder.is_dir():
            raise ConfigError(f"--{name}: there is no directory {folder}")
    named = {name for name in values if values[name].present} - {"suite"}
    if rest[0] in bench_local.KINDS:
        return bench_local.run(rest[0], given, named)
    for name in sorted(named & bench_local.OWN):
        raise ConfigError(f"--{name}: {rest[0]} does not take it")
    points = sweep(rest[0], given["request_rate"], given["concurrency"])
    for name in ("requests", "output_tokens", "input_tokens"):
        if not given[name]:
            raise ConfigError(f"--{name}: got 0, wanted at least 1")
    if given["plot"]:
        bench_plot.require()
    slo = bench_report.Slo(
        *(ms if ms is None else ms / 1e3 for ms in (given["slo_ttft_ms"], given["slo_tpot_ms"]))
    )
    model, found = asyncio.run(_measure(given, points))
    summaries = [bench_report.summarize(p, results, s, slo) for p, results, s in found]
    print(f"{given['url']}: {model}")
    for summary in summaries:
        print(bench_report.describe(summary, slo))
    requests = [bench_report.records(results) for _, results, _ in found]
    if given["json"]:
        told = {n: given[n] for n in given if n not in ("help", "h", "?", "quiet")}
        content = {
            "kind": rest[0],
            "model": model,
            "options": told,
            "points": [s | {"records": r} for s, r in zip(summaries, requests, strict=True)],
        }
        Path(given["json"]).write_text(json.dumps(content, indent=1) + "\n")
    if all(s["errors"] == s["requests"] for s in summaries):
        raise JaxMoeError("no request was answered; the errors are listed above")
    if given["plot"]:
        bench_plot.plot(Path(given["plot"]), f"{model}, {rest[0]}", summaries, requests[0])
    return 0


def sweep(kind: str, rates: str | None, concurrencies: str | None) -> list[Point]:
    """The points of a run; only `serve` has more than one."""
    if kind != "serve":
        if rates or concurrencies:
            raise ConfigError(f"{kind}: takes no --request_rate or --concurrency; wanted serve")
        return [Point(concurrency=1 if kind == "latency" else None)]
    rate_list = _numbers("--request_rate", rates, float) if rates else [math.inf]
    most = _numbers("--concurrency", concurrencies, int) if concurrencies else [None]
    if len(rate_list) > 1 and len(most) > 1:
        raise ConfigError("--request_rate and --concurrency: only one of them may have several")
    if not rates and not concurrencies:
        most = [8]
    return [Point(rate, concurrency) for rate in rate_list for concurrency in most]


def _numbers(name: str, text: str, kind: type) -> list[Any]:
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(n > 0 for n in numbers):
        raise ConfigError(f"{name}: got {text!r}, wanted numbers above 0 with commas between")
    return numbers


async def _measure(
    given: Mapping[str, Any], points: Sequence[Point]
) -> tuple[str, list[tuple[Point, list[bench_client.Timed], float]]]:
    from tqdm import tqdm

    count, warmup, seed = given["requests"], given["warmup"], given["seed"]
    total = count * len(points) + warmup
    if given["prompts"]:
        prompts = bench_load.read_prompts(Path(given["prompts"]), total)
    else:
        prompts = bench_load.made_up_prompts(total, given["input_tokens"], seed)
    common: dict[str, Any] = {
        "max_tokens": given["output_tokens"],
        "temperature": given["temperature"],
    }
    if given["ignore_eos"]:
        common["ignore_eos"] = True
    key = next((os.environ[name] for name in _KEYS if os.environ.get(name)), None)
    found = []
    async with bench_client.http_client(given["url"], key, given["timeout_s"]) as client:
        model = given["model"] or await bench_client.first_model(client)
        requests = bench_load.bodies(prompts, given["endpoint"], model, common)

        async def send(body: dict[str, Any], due_s: float) -> bench_client.Timed:
            return await bench_client.send(client, given["endpoint"], body, due_s)

        await bench_load.run_load(send, requests[:warmup], Point(concurrency=1), seed)
        with tqdm(total=total - warmup, unit="req", disable=given["quiet"], file=sys.stderr) as bar:
            for i, point in enumerate(points):
                bar.set_postfix_str(point.describe(), refresh=False)
                begin = warmup + i * count
                results, seconds = await bench_load.run_load(
                    send, requests[begin : begin + count], point, seed + i, bar.update
                )
                found.append((point, results, seconds))
    return model, found


if __name__ == "__main__":
    sys.exit(main())
