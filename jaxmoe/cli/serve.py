"""jaxmoe_serve: an OpenAI-compatible server.

    jaxmoe_serve                      the embedded demo model on http://127.0.0.1:8000
    jaxmoe_serve --model=DIR          a checkpoint

Endpoints: /v1/chat/completions, /v1/completions, /v1/responses, /v1/messages, /v1/models,
/tokenize, /detokenize, /health, /ready, /metrics, /props, /version, /openapi.json, and a chat page
at /. API keys come from the variable JAXMOE_API_KEY or --api_key_file. The report goes to stdout,
the log to stderr. SIGTERM lets running requests finish.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from jaxmoe.cli import command
from jaxmoe.cli import flags as option_flags
from jaxmoe.common import logs
from jaxmoe.config.engine_config import EngineConfig
from jaxmoe.engine.async_engine import AsyncEngine, EngineStatus
from jaxmoe.serving.server_config import ServerConfig, read_api_keys

NAME = "jaxmoe_serve"
TABLES = (option_flags.SERVER, option_flags.ENGINE)


def define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    command.define_plan_only(values)
    flags.DEFINE_boolean("quiet", False, "only warnings and errors in the log", flag_values=values)
    command.define_help(values)
    option_flags.define(values, TABLES)
    return values


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the server; the exit code is 0 after a drain, 1 after one line on stderr, and as
    command.py says with --plan_only.
    """
    values = define_flags()
    return command.run(
        NAME,
        values,
        lambda rest: _run(values, rest),
        lambda: option_flags.usage(values, __doc__ or "", TABLES),
        argv,
    )


def _run(values: flags.FlagValues, rest: list[str]) -> int:
    command.no_arguments(rest, "options; see --help")
    command.check_plan_flags(values)
    given = option_flags.collect(values, os.environ, TABLES)
    engine_config = EngineConfig.of(
        {"show_progress": sys.stderr.isatty(), "warm_up": True, **given.engine}
    )
    config = ServerConfig.of(given.server)
    if values["plan_only"].value:
        return command.print_plan(engine_config, values["gpu_memory_gb"].value)
    return _serve(engine_config, config, quiet=bool(values["quiet"].value))


def _serve(engine_config: EngineConfig, config: ServerConfig, *, quiet: bool) -> int:
    keys = read_api_keys(config, os.environ)
    from jaxmoe.engine.directory import model_path, read_directory
    from jaxmoe.serving.server import Server
    from jaxmoe.serving.state import ServerState, Texts
    from jaxmoe.text.output_parser import OutputFormats

    level = logging.WARNING if quiet else logging.INFO
    logs.set_up(config.log_format, level)
    path = model_path(engine_config)
    directory = read_directory(path, dummy=engine_config.load_format == "dummy")
    template = directory.chat_template
    formats = OutputFormats.of(
        None if template is None else template.source,
        reasoning=config.reasoning_format,
        tools=config.tool_format,
    )
    guarded = None if template is None else template.guarded()
    texts = Texts(directory.tokenizer, guarded, formats)
    model = "jaxmoe-demo" if engine_config.model is None else Path(path).resolve().name

    async def run() -> int:
        engine = _engine(engine_config, config, level)
        most = engine_config.max_num_seqs + engine_config.max_queued_requests
        state = ServerState(engine, texts, config, model=model, max_requests=most)

        def on_listening(url: str) -> None:
            guarded = f"{len(keys)} API keys" if keys else "no API key needed"
            _say(f"jaxmoe {state.model} at {url} ({guarded}); chat page at {url}/")
            _say(f"base URL for OpenAI clients: {url}/v1   for Anthropic clients: {url}")

        def on_status(status: EngineStatus) -> None:
            if status.state == "ready":
                _say(state.engine.info.report)
                _say("ready")
            elif status.state == "dead" and not server.stopping:
                command.fail(NAME, status.error or "the engine died")
            elif status.state == "loading":
                _say(f"{status.stage or 'starting'}: {status.percent:.0f} %")

        server = Server(state, keys)
        return await server.run(on_listening=on_listening, on_status=on_status)

    return asyncio.run(run())


def _engine(engine_config: EngineConfig, config: ServerConfig, level: int) -> AsyncEngine:
    """Begins to load."""
    if config.engine_process:
        from jaxmoe.engine.process_engine import ENGINE_COMMAND, ProcessEngine, Supervision
        from jaxmoe.engine.watchdog import Patience

        command = (*ENGINE_COMMAND, config.log_format, str(level))
        supervision = Supervision(
            patience=Patience(least_s=config.hang_timeout_s),
            max_restarts=config.max_engine_restarts,
        )
        return ProcessEngine(engine_config, supervision, command=command)
    from jaxmoe.engine.thread_engine import ThreadEngine  # imports jax into this process

    return ThreadEngine.load(engine_config)


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
