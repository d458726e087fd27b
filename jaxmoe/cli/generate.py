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

import io
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from jaxmoe.cli import flags as option_flags
from jaxmoe.cli import interrupt
from jaxmoe.common.errors import ConfigError, JaxMoeError
from jaxmoe.config.engine_config import EngineConfig
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
    flags.DEFINE_boolean("quiet", False, "nothing on stderr but errors", flag_values=values)
    flags.DEFINE_boolean("verbose", False, "log every step of the way", flag_values=values)
    flags.DEFINE_boolean("help", False, "show this help", short_name="h", flag_values=values)
    option_flags.define(values)
    return values


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; the exit code is 0, or 1 after one line on stderr."""
    argv = list(sys.argv if argv is None else argv)
    if isinstance(
        sys.stdout, io.TextIOWrapper
    ):  # a terminal that is not UTF-8 gets "?" for the rest
        sys.stdout.reconfigure(errors="replace")
    values = define_flags()
    if {"-h", "--help", "-help", "--helpfull", "--helpshort"} & set(argv[1:]):
        argv = [argv[0], "--help"]
    try:
        with interrupt.kept():
            code = _run(values, argv)
        sys.stdout.flush()
        return code
    except JaxMoeError as e:
        return _fail(str(e))
    except KeyboardInterrupt:
        return _fail("interrupted")
    except BrokenPipeError:  # the reader of stdout left; no complaint of Python's at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as e:
        return _fail(f"{e.filename or 'file'}: {e.strerror or e}")


def _value(values: flags.FlagValues, name: str) -> Any:
    return values[name].value


def _run(values: flags.FlagValues, argv: Sequence[str]) -> int:
    rest = option_flags.parse_args(values, argv)
    if rest:
        raise ConfigError(f"unexpected argument {rest[0]!r}; wanted --prompt=TEXT or --input=FILE")
    if _value(values, "help"):
        print(option_flags.usage(values, __doc__ or ""))
        return 0
    prompts, in_path, out_path = (
        _value(values, "prompt"),
        _value(values, "input"),
        _value(values, "output"),
    )
    if (prompts is None) == (in_path is None):
        raise ConfigError("wanted either --prompt=TEXT or --input=FILE.jsonl --output=FILE.jsonl")
    if (in_path is None) != (out_path is None):
        raise ConfigError("--input and --output go together")
    if prompts is not None and "" in prompts:
        raise ConfigError("--prompt: got an empty text, wanted at least one character")
    given = option_flags.collect(values, os.environ)
    if prompts is not None and given.sampling.get("logprobs") is not None:
        raise ConfigError(
            "logprobs: the text of a --prompt has no place for them; use --input and --output"
        )
    quiet, verbose = _value(values, "quiet"), _value(values, "verbose")
    logging.basicConfig(
        level=logging.ERROR if quiet else logging.WARNING,
        format="%(levelname).1s %(asctime)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    if verbose:  # our own steps; jax's tell of TPUs that were looked for
        logging.getLogger("jaxmoe").setLevel(logging.INFO)
    engine = dict(given.engine)
    if quiet:
        engine.setdefault("show_progress", False)
    config = EngineConfig.of(engine)
    SamplingParams.of(given.sampling)  # refuse before a model is loaded
    if prompts is None:
        return _run_batch(config, given.sampling, Path(in_path), Path(out_path), quiet, verbose)
    return _run_prompts(config, given.sampling, prompts, _value(values, "chat"), quiet, verbose)


def _load(config: EngineConfig, quiet: bool, verbose: bool):
    from jaxmoe.llm import LLM  # imports jax, which --help and refusals need not wait for

    llm = LLM.of(config)
    if not quiet and not verbose:  # verbose: the log has it
        print(llm.report, file=sys.stderr)
    return llm


def _run_prompts(
    config: EngineConfig,
    sampling: Mapping[str, Any],
    prompts: Sequence[str],
    chat: bool,
    quiet: bool,
    verbose: bool,
) -> int:
    with _load(config, quiet, verbose) as llm:
        params = SamplingParams.of(sampling, llm.default_params)
        ids = [
            llm.chat_prompt([{"role": "user", "content": p}]) if chat else llm.prompt_ids(p)
            for p in prompts
        ]
        start = time.perf_counter()
        if len(ids) == 1 and params.n == 1:
            for delta in llm.stream(ids[0], params):
                sys.stdout.write(delta.text)
                sys.stdout.flush()
                output = delta.output
            assert output is not None
            outputs = [output]
            print()
        else:
            outputs = llm.generate(ids, params)
            for prompt, output in zip(prompts, outputs, strict=True):
                for c in output.outputs:
                    choice = f" [{c.index}]" if params.n > 1 else ""
                    print(f"=== {prompt}{choice}\n{c.text}")
        seconds = time.perf_counter() - start
        completions = [c for o in outputs for c in o.outputs]
        if any(c.finish_reason == "error" for c in completions):
            raise JaxMoeError("the model's logits are not finite; the checkpoint may be damaged")
        if not quiet:
            count = sum(len(c.token_ids) for c in completions)
            ttft_s = min(c.timings.ttft_s for c in completions)
            print(
                f"{sum(len(i) for i in ids)} prompt + {count} output tokens in {seconds:.2f} s, "
                f"{count / max(seconds, 1e-9):.1f} tok/s, first token after {ttft_s:.2f} s",
                file=sys.stderr,
            )
    return 0


def _run_batch(
    config: EngineConfig,
    sampling: Mapping[str, Any],
    in_path: Path,
    out_path: Path,
    quiet: bool,
    verbose: bool,
) -> int:
    from tqdm import tqdm

    from jaxmoe.cli.batch_output import BatchOutput
    from jaxmoe.cli.batch_run import BatchRun, Totals, count_lines

    total = count_lines(in_path)
    if out_path.exists() and in_path.resolve() == out_path.resolve():
        raise ConfigError(f"--output: {out_path} is the input; wanted another file")
    with BatchOutput(out_path) as output, _load(config, quiet, verbose) as llm:
        params = SamplingParams.of(sampling, llm.default_params)
        model = Path(config.model).name if config.model else "jaxmoe-demo"
        with tqdm(total=total, unit="req", disable=quiet, file=sys.stderr) as bar:

            def done(totals: Totals) -> None:
                bar.n = totals.answered + totals.errors + totals.skipped
                rate = totals.output_tokens / max(totals.seconds, 1e-9)
                bar.set_postfix_str(f"{rate:.1f} tok/s", refresh=False)
                bar.update(0)

            totals = BatchRun(llm, output, params, model, done).run(in_path)
        if not quiet:
            print(totals.describe(), file=sys.stderr)
    return 0


def _fail(message: str) -> int:
    print(f"jaxmoe_generate: error: {' '.join(message.split())}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
