"""jaxmoe_batch: answers a file of requests in OpenAI's batch format.

    jaxmoe_batch --input=REQUESTS.jsonl --output=ANSWERS.jsonl
    jaxmoe_batch --model=DIR --input=REQUESTS.jsonl --output=ANSWERS.jsonl --errors=ERRORS.jsonl

A line of the input is {"custom_id", "method": "POST", "url", "body"} for /v1/chat/completions or
/v1/completions, with the fields and answers of the server (jaxmoe_serve), except that the model's
name does not matter and nothing is streamed; a line of the output is {"id", "custom_id",
"response", "error"} in the order the answers were finished. Lines that cannot be answered go to
--errors, or to the output without it. Run the same command again after an interruption and it goes
on where it stopped; lines that ended with an error count as done, unless --retry_errors is given.

Made for throughput: many sequences are decoded together (--max_num_seqs), so that an expert's
weights are read once for all of them. Sampling options are the defaults of bodies that say nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from jaxmoe.cli import command
from jaxmoe.cli import flags as option_flags
from jaxmoe.common.errors import ConfigError
from jaxmoe.common.fields import rules
from jaxmoe.serving.server_config import ServerConfig

# Nobody waits for a single answer: at 64 rows most experts of a large model are read for several
# tokens at once, and more rows add little (their KV cache is then what is read).
MAX_NUM_SEQS = 64
_FORMATS = ("reasoning_format", "tool_format")  # the server's options of these names


def define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_string("input", None, "JSONL file of requests, one a line", flag_values=values)
    flags.DEFINE_string("output", None, "JSONL file that answers are added to", flag_values=values)
    flags.DEFINE_string(
        "errors", None, "JSONL file for lines with an error; default: --output", flag_values=values
    )
    flags.DEFINE_boolean(
        "retry_errors",
        False,
        "ask lines again that ended with an error in an earlier run; their old records are taken "
        "out of the files",
        flag_values=values,
    )
    for name in _FORMATS:
        rule = rules(ServerConfig)[name]
        flags.DEFINE_enum(name, "auto", list(rule.choices), rule.help, flag_values=values)
    command.define_model_flags(values)
    return values


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see command.py for the exit codes."""
    values = define_flags()
    doc = f"{__doc__}\nHere --max_num_seqs is {MAX_NUM_SEQS} where nothing else is said."
    return command.run(
        "jaxmoe_batch",
        values,
        lambda rest: _run(values, rest),
        lambda: option_flags.usage(values, doc),
        argv,
    )


def _run(values: flags.FlagValues, rest: list[str]) -> int:
    wanted = "--input=FILE.jsonl --output=FILE.jsonl"
    command.no_arguments(rest, wanted)
    in_path: Any = values["input"].value
    out_path: Any = values["output"].value
    errors: Any = values["errors"].value
    if not values["plan_only"].value and not (in_path and out_path):
        raise ConfigError(f"--{'output' if in_path else 'input'}: missing; wanted {wanted}")
    config, sampling = command.collect(values, {"max_num_seqs": MAX_NUM_SEQS})
    if values["plan_only"].value:
        return command.print_plan(config, values["gpu_memory_gb"].value)
    errors_path = Path(errors) if errors else None
    return command.run_batch(
        values,
        config,
        sampling,
        Path(in_path),
        Path(out_path),
        errors_path,
        retry_errors=bool(values["retry_errors"].value),
        **{name: str(values[name].value) for name in _FORMATS},
    )


if __name__ == "__main__":
    sys.exit(main())
