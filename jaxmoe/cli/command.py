"""What the commands share: help, errors in one line, logging, a model that is loaded or planned.

A command's exit code is 0, 1 after one line on stderr, or 3 where --plan_only finds that the model
does not fit.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from jaxmoe.cli import flags as option_flags
from jaxmoe.cli import interrupt
from jaxmoe.common.errors import ConfigError, JaxMoeError
from jaxmoe.config.engine_config import EngineConfig
from jaxmoe.sampling_params import SamplingParams

if TYPE_CHECKING:
    from jaxmoe.llm import LLM

DOES_NOT_FIT = 3
_HELP = {"-h", "--help", "-help", "--helpfull", "--helpshort"}


def define_help(values: flags.FlagValues) -> None:
    flags.DEFINE_boolean("help", False, "show this help", short_name="h", flag_values=values)


def define_plan_only(values: flags.FlagValues) -> None:
    flags.DEFINE_boolean(
        "plan_only",
        False,
        "say how much memory the model would take, and what to change if that is too much; load "
        "nothing; the exit code is 0 if it fits and 3 if not",
        flag_values=values,
    )
    flags.DEFINE_float(
        "gpu_memory_gb",
        None,
        "with --plan_only: memory in GiB of a GPU to plan for that is not here",
        lower_bound=0.1,
        flag_values=values,
    )


def check_plan_flags(values: flags.FlagValues) -> None:
    if values["gpu_memory_gb"].value is not None and not values["plan_only"].value:
        raise ConfigError(
            "gpu_memory_gb: wanted --plan_only beside it; a start asks the GPU itself"
        )


def define_model_flags(values: flags.FlagValues) -> None:
    """What every command that loads a model takes, the options among it."""
    define_plan_only(values)
    flags.DEFINE_boolean("quiet", False, "nothing on stderr but errors", flag_values=values)
    flags.DEFINE_boolean("verbose", False, "log every step of the way", flag_values=values)
    define_help(values)
    option_flags.define(values)


def run(
    name: str,
    values: flags.FlagValues,
    body: Callable[[list[str]], int],
    usage: Callable[[], str],
    argv: Sequence[str] | None,
) -> int:
    """Parses the command line into `values`, then runs `body` with what is no flag.

    Errors raised on purpose become one line on stderr and exit code 1.
    """
    argv = list(sys.argv if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that is not UTF-8 gets "?" instead
        sys.stdout.reconfigure(errors="replace")
    if _HELP & set(argv[1:]):
        argv = [argv[0], "--help"]
    try:
        rest = option_flags.parse_args(values, argv)
        if values["help"].value:
            print(usage())
            return 0
        if "config" in values:  # the commands that read variables
            for words in option_flags.unknown_variables(os.environ):
                print(f"{name}: warning: {words}", file=sys.stderr)
        with interrupt.kept():
            code = body(rest)
        sys.stdout.flush()
        return code
    except JaxMoeError as e:
        return fail(name, str(e))
    except KeyboardInterrupt:
        return fail(name, "interrupted")
    except BrokenPipeError:  # the reader of stdout left; no complaint of Python's at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as e:
        return fail(name, f"{e.filename or 'file'}: {e.strerror or e}")


def fail(name: str, message: str) -> int:
    print(f"{name}: error: {' '.join(message.split())}", file=sys.stderr)
    return 1


def no_arguments(rest: Sequence[str], wanted: str) -> None:
    if rest:
        raise ConfigError(f"unexpected argument {rest[0]!r}; wanted {wanted}")


def collect(
    values: flags.FlagValues, defaults: Mapping[str, Any] = {}
) -> tuple[EngineConfig, Mapping[str, Any]]:
    """The engine's options and the sampling parameters given, both checked; starts logging.

    defaults: engine options that this command has other defaults for.
    """
    check_plan_flags(values)
    given = option_flags.collect(values, os.environ)
    quiet, verbose = values["quiet"].value, values["verbose"].value
    logging.basicConfig(
        level=logging.ERROR if quiet else logging.WARNING,
        format="%(levelname).1s %(asctime)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    if verbose:  # our own steps; jax's tell of TPUs that were looked for
        logging.getLogger("jaxmoe").setLevel(logging.INFO)
    engine = {**defaults, **given.engine}
    if quiet:
        engine.setdefault("show_progress", False)
    config = EngineConfig.of(engine)
    SamplingParams.of(given.sampling)  # refuse before a model is loaded
    return config, given.sampling


def load(values: flags.FlagValues, config: EngineConfig) -> LLM:
    """The model, after its start-up report on stderr."""
    from jaxmoe.llm import LLM  # imports jax, which --help and refusals need not wait for

    llm = LLM.of(config)
    if not values["quiet"].value and not values["verbose"].value:  # verbose: the log has it
        print(llm.report, file=sys.stderr)
    return llm


def print_plan(config: EngineConfig, gpu_memory_gb: float | None = None) -> int:
    """What --plan_only does; the exit code."""
    from jaxmoe.engine.plan import make_plan

    plan = make_plan(config, gpu_memory_gb)
    print(plan.describe())
    return 0 if plan.fits else DOES_NOT_FIT


def run_batch(
    values: flags.FlagValues,
    config: EngineConfig,
    sampling: Mapping[str, Any],
    in_path: Path,
    out_path: Path,
    errors_path: Path | None = None,
    *,
    retry_errors: bool = False,
    reasoning_format: str = "auto",
    tool_format: str = "auto",
) -> int:
    """Answers the lines of a file; see batch_run.py."""
    from tqdm import tqdm

    from jaxmoe.cli.batch_output import open_outputs
    from jaxmoe.cli.batch_run import BatchRun, Totals, count_lines
    from jaxmoe.text.output_parser import OutputFormats

    total = count_lines(in_path)
    quiet = values["quiet"].value
    files = open_outputs(in_path, out_path, errors_path, retry_errors=retry_errors)
    with files as outputs, load(values, config) as llm:
        params = SamplingParams.of(sampling, llm.default_params)
        model = Path(config.model).resolve().name if config.model else "jaxmoe-demo"
        template = None if llm.chat_template is None else llm.chat_template.source
        formats = OutputFormats.of(template, reasoning=reasoning_format, tools=tool_format)
        with tqdm(total=total, unit="req", disable=quiet, file=sys.stderr) as bar:

            def done(totals: Totals) -> None:
                bar.n = totals.answered + totals.errors + totals.skipped
                rate = totals.output_tokens / max(totals.seconds, 1e-9)
                bar.set_postfix_str(f"{rate:.1f} tok/s", refresh=False)
                bar.update(0)

            totals = BatchRun(llm, outputs, params, model, formats, done).run(in_path)
        if llm.engine.profile is not None and not quiet:
            print(llm.engine.profile.describe(), file=sys.stderr)
        if not quiet:
            print(totals.describe(), file=sys.stderr)
    return 0
