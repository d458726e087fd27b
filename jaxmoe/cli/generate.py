"""jaxmoe_generate: text from a model, on the command line.

    jaxmoe_generate --prompt="In the beginning"            the embedded demo model
    jaxmoe_generate --model=DIR --chat --prompt="Hello"    a checkpoint, through its chat template
    jaxmoe_generate --input=IN.jsonl --output=OUT.jsonl    many requests, decoded together

The text goes to stdout, everything else to stderr. An offline batch takes one request a line, in
OpenAI's batch format or plain ({"prompt": ...} or {"messages": ...} with sampling parameters beside
it). A line that cannot be served gets a record that says why, and the exit code is 0 all the same;
run the same command again after an interruption and it goes on where it stopped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from jaxmoe.cli import command
from jaxmoe.cli import flags as option_flags
from jaxmoe.cli.prefill_bar import PrefillBar
from jaxmoe.common.errors import ConfigError, JaxMoeError
from jaxmoe.config.engine_config import EngineConfig
from jaxmoe.request import failure
from jaxmoe.sampling_params import SamplingParams


def define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_multi_string(
        "prompt", None, "a prompt; may be given more than once", flag_values=values
    )
    flags.DEFINE_boolean(
        "chat",
        False,
        "take prompts as a user's messages, through the chat template",
        flag_values=values,
    )
    flags.DEFINE_string("input", None, "JSONL file of requests, one a line", flag_values=values)
    flags.DEFINE_string(
        "output", None, "JSONL file that the answers to --input are appended to", flag_values=values
    )
    command.define_model_flags(values)
    return values


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see command.py for the exit codes."""
    values = define_flags()
    return command.run(
        "jaxmoe_generate",
        values,
        lambda rest: _run(values, rest),
        lambda: option_flags.usage(values, __doc__ or ""),
        argv,
    )


def _run(values: flags.FlagValues, rest: list[str]) -> int:
    command.no_arguments(rest, "--prompt=TEXT or --input=FILE")
    prompts: Any = values["prompt"].value
    in_path: Any = values["input"].value
    out_path: Any = values["output"].value
    plan_only = values["plan_only"].value
    if not plan_only:
        if (prompts is None) == (in_path is None):
            raise ConfigError(
                "wanted either --prompt=TEXT or --input=FILE.jsonl --output=FILE.jsonl"
            )
        if (in_path is None) != (out_path is None):
            raise ConfigError("--input and --output go together")
    if prompts is not None and "" in prompts:
        raise ConfigError("--prompt: got an empty text, wanted at least one character")
    config, sampling = command.collect(values)
    if prompts is not None and sampling.get("logprobs") is not None:
        raise ConfigError(
            "logprobs: the text of a --prompt has no place for them; use --input and --output"
        )
    if plan_only:
        return command.print_plan(config, values["gpu_memory_gb"].value)
    if prompts is None:
        return command.run_batch(values, config, sampling, Path(in_path), Path(out_path))
    return _run_prompts(values, config, sampling, prompts)


def _run_prompts(
    values: flags.FlagValues,
    config: EngineConfig,
    sampling: Mapping[str, Any],
    prompts: Sequence[str],
) -> int:
    chat, quiet = bool(values["chat"].value), values["quiet"].value
    _check_lengths(config, sampling, prompts, chat=chat)
    with command.load(values, config) as llm:
        params = SamplingParams.of(sampling, llm.default_params)
        ids = [
            llm.chat_prompt([{"role": "user", "content": p}]) if chat else llm.prompt_ids(p)
            for p in prompts
        ]
        start = time.perf_counter()
        bar = PrefillBar(sum(map(len, ids)), show=False if quiet else None)
        if len(ids) == 1 and params.n == 1:
            with bar:
                for delta in llm.stream(ids[0], params, on_prefill=bar):
                    sys.stdout.write(delta.text)
                    sys.stdout.flush()
                    output = delta.output
            assert output is not None
            outputs = [output]
            print()
        else:
            with bar:
                outputs = llm.generate(ids, params, on_prefill=bar)
            for prompt, output in zip(prompts, outputs, strict=True):
                for c in output.outputs:
                    choice = f" [{c.index}]" if params.n > 1 else ""
                    print(f"=== {prompt}{choice}\n{c.text}")
        seconds = time.perf_counter() - start
        completions = [c for o in outputs for c in o.outputs]
        for c in completions:
            if c.finish_reason == "error":
                raise JaxMoeError(failure(c))
        if not quiet:
            count = sum(len(c.token_ids) for c in completions)
            ttft_s = min(c.timings.ttft_s for c in completions)
            print(
                f"{sum(len(i) for i in ids)} prompt + {count} output tokens in {seconds:.2f} s, "
                f"{count / max(seconds, 1e-9):.1f} tok/s, first token after {ttft_s:.2f} s",
                file=sys.stderr,
            )
        if llm.engine.profile is not None and not quiet:
            print(llm.engine.profile.describe(), file=sys.stderr)
    return 0


def _check_lengths(
    config: EngineConfig, sampling: Mapping[str, Any], prompts: Sequence[str], *, chat: bool
) -> None:
    """Refuses what cannot fit before a weight is read; RequestError names the prompt."""
    from jaxmoe.engine.checks import resolve_max_tokens
    from jaxmoe.engine.directory import model_path, read_directory
    from jaxmoe.engine.start import cache_layout

    directory = read_directory(model_path(config), dummy=config.load_format == "dummy")
    tokenizer, template = directory.tokenizer, directory.chat_template
    if tokenizer is None or (chat and template is None):
        return  # said where the model is loaded
    params = SamplingParams.of(sampling, directory.defaults.params)
    longest = cache_layout(config, directory.model_config).max_model_len
    for prompt in prompts:
        text = prompt
        if chat and template is not None:
            text = template.render([{"role": "user", "content": prompt}])
        ids = tokenizer.encode(text, add_special_tokens=not chat)
        resolve_max_tokens(
            len(ids), params, max_model_len=longest, default=directory.defaults.max_tokens
        )


if __name__ == "__main__":
    sys.exit(main())
