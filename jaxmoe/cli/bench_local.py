"""jaxmoe_bench machine, kernel, layer, decode and prefill: what this machine does of what it could.

Figures are medians of --repeats, each stated against the read ceiling and the peak of arithmetic
that the same threads reached in the seconds before and after it.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags

from jaxmoe.cli import bench_against, bench_plot
from jaxmoe.common.errors import ConfigError
from jaxmoe.config.engine_config import ISAS, EngineConfig

KINDS = ("machine", "kernel", "layer", "decode", "prefill")
# What each kind takes beside the common flags.
_COMMON = {"threads", "isa", "repeats", "ceiling_mb", "json", "plot", "quiet", "help"}
_MODEL = {"model", "batch", "context", "against", "against_model", "against_args"}
_TAKES = {
    "machine": {"threads", "isa", "formats", "cache_dir", "anew", "json", "quiet", "help"},
    "kernel": _COMMON | {"dims", "formats", "rows", "cold_mb"},
    "layer": _COMMON | {"dims", "formats", "rows", "cold_mb"},
    "decode": _COMMON | _MODEL | {"tokens", "profile"},
    "prefill": _COMMON | _MODEL - {"batch"} | {"prompt_tokens", "chunk_tokens", "profile"},
}
# Flags that only these kinds know.
OWN = {name for takes in _TAKES.values() for name in takes} - {
    "model", "json", "plot", "quiet", "help",
}  # fmt: skip
CACHE_DIR = EngineConfig().cache_dir
_ROWS = {"kernel": "1,2,4,8,256", "layer": "1,2,4,8,256,1024"}


def define_flags(values: flags.FlagValues) -> None:
    def text(name: str, words: str) -> None:
        flags.DEFINE_string(name, None, words, flag_values=values)

    def whole(name: str, default: int, words: str) -> None:
        words = f"{words} (default {default})"
        flags.DEFINE_integer(name, default, words, lower_bound=1, flag_values=values)

    text("threads", "threads of the CPU kernels, or several with commas (default: 1 and all cores)")
    text("isa", f"instruction sets to use, with commas between, of {', '.join(ISAS)}; default: the "
         "best")  # fmt: skip
    whole("repeats", 5, "how often a figure is measured; its median counts")
    whole("ceiling_mb", 1024, "memory read for the ceiling, far beyond the last-level cache")
    text("dims", "kernel, layer: names of models or HIDDENxINTERMEDIATE:EXPERTS_A_TOKEN, with "
         "commas (default deepseek_v3,qwen3_30b)")  # fmt: skip
    text("formats", "machine, kernel, layer: weight formats, with commas (default fp8_block,bf16; "
         "machine: all)")  # fmt: skip
    text("cache_dir", f"machine: where rates are kept for the engine (default {CACHE_DIR})")
    flags.DEFINE_boolean("anew", False, "machine: measure although rates are kept (default false)",
                         flag_values=values)  # fmt: skip
    text("rows", f"kernel: activation rows (default {_ROWS['kernel']}); layer: tokens "
         f"({_ROWS['layer']})")  # fmt: skip
    whole("cold_mb", 1024, "kernel, layer: weights that a repeat walks through, in MiB")
    text("batch", "decode: sequences decoded together, or several with commas (default 1)")
    text("context", "decode: tokens that sequences begin with (default 1); prefill: lengths whose "
         "attention is measured alone (default 2048,16384)")  # fmt: skip
    whole("tokens", 32, "decode: tokens decoded a repeat")
    text("prompt_tokens", "prefill: lengths of prompts, with commas (default 512,2048)")
    whole("chunk_tokens", 512, "prefill: tokens of a step at most (prefill_chunk_tokens)")
    text("profile", "decode, prefill: \"seconds\" says where the time of steps goes; a .json file "
         "gets a trace for ui.perfetto.dev too; figures then include what that costs")  # fmt: skip
    text("against", "decode, prefill: llama-bench:PATH runs that tool in turn with every repeat")
    text("against_model", "the rival's model: a GGUF of the same dims and bytes per weight")
    text("against_args", 'more arguments for the rival, such as "-rtr 1"')


def run(kind: str, given: Mapping[str, Any], given_names: set[str]) -> int:
    """given: every flag's value; given_names: of those that stand on the command line."""
    said = [
        f"--{name}={given[name]}"
        for name in given
        if name in given_names - {"json", "plot", "quiet"}
    ]
    for name in sorted(given_names - _TAKES[kind]):
        raise ConfigError(f"--{name}: {kind} does not take it")
    if kind == "machine":
        from jaxmoe.cli import bench_rates

        return bench_rates.run(given)
    if given["plot"]:
        bench_plot.require()
    numbers = _Numbers(given)
    isas = (given["isa"] or "").split(",")
    for isa in isas:
        if isa and isa not in ISAS:
            raise ConfigError(f"--isa: got {isa!r}, wanted one of {', '.join(ISAS)}")
    content: dict[str, Any] = {
        "kind": kind,
        "command": shlex.join(["jaxmoe_bench", kind, *said]),
        "options": {n: given[n] for n in sorted(_TAKES[kind] - {"help", "quiet"})},
        "machines": [],
        "figures": [],
        "comparisons": [],
        "overheads": [],
    }
    rival = None
    if given["against"]:
        rival = bench_against.make(
            given["against"], given["against_model"], given["against_args"] or ""
        )
    for isa in isas:
        for threads in numbers.of("threads", _default_threads()):
            _measure(kind, given, numbers, isa or None, threads, rival, content)
    if given["json"]:
        Path(given["json"]).write_text(json.dumps(content, indent=1) + "\n")
    if given["plot"]:
        from jaxmoe.cli import bench_roofline

        m = content["machines"][-1]
        title = f"{m['cpu']}, {m['isa']}: jaxmoe_bench {kind}"
        bench_roofline.plot(Path(given["plot"]), title, content["figures"])
    return 0


def _default_threads() -> str:
    from jaxmoe.ffi.cpu_runtime import CpuRuntime

    with CpuRuntime() as runtime:
        return ",".join(str(n) for n in sorted({1, runtime.num_threads}))


class _Numbers:
    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = given

    def of(self, name: str, default: str) -> list[int]:
        """A flag's whole numbers, commas between."""
        text = self._given[name] or default
        try:
            numbers = [int(part) for part in text.split(",")]
        except ValueError:
            numbers = [0]
        if min(numbers) < 1:
            raise ConfigError(f"--{name}: got {text!r}, wanted whole numbers above 0, with commas")
        return numbers


def _measure(
    kind: str,
    given: Mapping[str, Any],
    numbers: _Numbers,
    isa: str | None,
    threads: int,
    rival: bench_against.LlamaBench | None,
    content: dict[str, Any],
) -> None:
    from jaxmoe.cli import bench_kernel, bench_machine
    from jaxmoe.ffi.cpu_runtime import CpuRuntime

    def on_figure(figure: dict[str, Any]) -> None:
        content["figures"].append(figure)
        print(bench_machine.describe(figure), flush=True)

    def report(runtime: CpuRuntime) -> bench_machine.Bench:
        facts = bench_machine.machine(runtime)
        content["machines"].append(facts)
        print(f"{facts['cpu']}, {facts['description']}; load {facts['load_average']:.1f}")
        return bench_machine.Bench(runtime, given["ceiling_mb"] << 20, on_figure)

    if kind in ("decode", "prefill"):
        _measure_model(kind, given, numbers, isa, threads, rival, content, report)
        return
    with CpuRuntime(num_threads=threads, isa=isa) as runtime:
        bench = report(runtime)
        arguments = (
            bench_kernel.parse_dims(given["dims"] or "deepseek_v3,qwen3_30b"),
            bench_kernel.parse_formats(given["formats"] or "fp8_block,bf16"),
            numbers.of("rows", _ROWS[kind]),
        )
        sizes = {"cold_bytes": given["cold_mb"] << 20, "repeats": given["repeats"]}
        if kind == "kernel":
            bench_kernel.kernels(bench, *arguments, **sizes)
            return
        bench_kernel.layers(bench, *arguments, **sizes)
        found = bench_kernel.overheads(runtime, given["repeats"])
        content["overheads"].append({"threads": threads, "isa": runtime.isa, **found})
        for name, value in found.items():
            print(f"{name.removesuffix('_us').replace('_', ' ')}: {value:.2f} us")


def _measure_model(
    kind: str,
    given: Mapping[str, Any],
    numbers: _Numbers,
    isa: str | None,
    threads: int,
    rival: bench_against.LlamaBench | None,
    content: dict[str, Any],
    report: Any,
) -> None:
    from jaxmoe.cli import bench_model

    if not given["model"]:
        raise ConfigError("--model: wanted a config.json (random weights) or a checkpoint")
    model = Path(given["model"])
    if not model.exists():
        raise ConfigError(f"--model: there is no {model}")
    batches = numbers.of("batch", "1") if kind == "decode" else [1]
    prompts = numbers.of("prompt_tokens", "512,2048")
    contexts = numbers.of("context", "1" if kind == "decode" else "2048,16384")
    longest = max(contexts) + given["tokens"] if kind == "decode" else max(prompts)
    options = {
        "max_num_seqs": max(batches),
        "max_model_len": longest + 16,
        "prefill_chunk_tokens": given["chunk_tokens"],
        "profile": given["profile"],
    }
    started = bench_model.start_model(model, threads, isa, options)
    try:
        bench = report(started.runtime)
        runner = bench_model.ModelBench(started)
        num_weights, bytes_per_weight = bench_model.model_weights(started)
        name = model.stem if model.is_file() else model.name
        what = {
            "op": kind,
            "model": name,
            "num_weights": num_weights,
            "bytes_per_weight": bytes_per_weight,
            **bench_model.shapes(started.model_config),
        }

        def against(label: str, ours: Any, **sizes: int) -> None:
            if rival is None:
                return
            tool = rival
            bench_against.check_equal(
                tool.run(threads=threads, **sizes), num_weights, bytes_per_weight
            )
            mine, told = bench_against.alternate(
                given["repeats"], ours, lambda: tool.run(threads=threads, **sizes)
            )
            depth = {"depth": 0, "prompt": 0, "generate": 0} | sizes
            found = bench_against.compare(
                label, threads, mine, told, tool.command(threads=threads, **depth)
            )
            content["comparisons"].append(found)
            print(bench_against.describe(found), flush=True)

        def rate(work: Any) -> float:
            return work.tokens / work.seconds[0]

        if kind == "decode":
            count = given["tokens"]
            for batch in batches:
                for context in contexts:
                    runner.warm_decode(batch, context)
                    label = f"decode {name} batch={batch} context={context}"
                    bench.figure(
                        label,
                        {**what, "batch": batch, "context": context},
                        lambda b=batch, c=context: runner.decode(b, c, count, given["repeats"]),
                    )
                    if batch == 1:
                        against(
                            label,
                            lambda c=context: rate(runner.decode(1, c, count, 1)),
                            generate=count,
                            depth=context if context > 1 else 0,
                        )
        else:
            for length in prompts:
                runner.warm_prefill(length)
                label = f"prefill {name} prompt={length}"
                bench.figure(
                    label,
                    {**what, "prompt_tokens": length, "chunk_tokens": given["chunk_tokens"]},
                    lambda n=length: runner.prefill(n, given["repeats"]),
                )
                against(label, lambda n=length: rate(runner.prefill(n, 1)), prompt=length)
            for context in contexts:
                tokens = min(context, given["chunk_tokens"])
                bench.figure(
                    f"attention {name} tokens={tokens} context={context}",
                    {**what, "op": "attention", "tokens": tokens, "context": context},
                    bench_model.attention_chunk(
                        started.runtime, started.model_config, tokens, context, given["repeats"]
                    ),
                )
        if given["profile"]:
            assert started.engine.profile is not None
            print(started.engine.profile.describe())
    finally:
        started.close()
