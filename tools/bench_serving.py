"""What serving costs: tokens a second and the time to the first token through HTTP, beside the same
engine driven directly; and what the second turn of a chat costs after a first one of 4K tokens.

    .venv/bin/python tools/bench_serving.py --json=serving.json

A jaxmoe_serve process and an engine in this process take turns, a round each, so that other work
on the machine meets both; medians of rounds are compared. The client counts bytes and no more, for
it shares the cores with the server. --realtime runs everything at a real-time priority (SCHED_FIFO,
as root), which a machine with other work needs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests")]

from reliability.client import CHAT, ask, encode  # noqa: E402
from reliability.figures import machine  # noqa: E402
from reliability.server import Server, running  # noqa: E402
from support.serve_process import DEMO  # noqa: E402

from jaxmoe import LLM, SamplingParams  # noqa: E402

CLIENTS = (1, 8)
_PREFILLED = 'step_tokens_total{kind="prefill"}'
_REPEATS = 270  # of the words: 4K tokens
WORDS = "And it came to pass in those days that the king said unto the people"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=384)
    parser.add_argument(
        "--first_tokens", type=int, default=40, help="requests timed to their first"
    )
    parser.add_argument("--realtime", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.realtime:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
    with (
        LLM(show_progress=False, prefix_cache=False) as llm,
        running("--quiet", "--noprefix_cache") as server,
    ):
        found = measure(llm, server, given)
    found["turns"] = asyncio.run(turns())
    for line in describe(found):
        print(line)
    if given.json is not None:
        given.json.write_text(json.dumps({"machine": machine(), **found}, indent=1) + "\n")
    return 0


def measure(llm: LLM, server: Server, given: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"rounds": given.rounds, "tokens": given.tokens}
    for clients in CLIENTS:
        direct(llm, clients, given.tokens)
        asyncio.run(through_http(server, clients, given.tokens))
    for clients in CLIENTS:
        speeds: dict[str, list[float]] = {"direct": [], "http": []}
        for _ in range(given.rounds):
            speeds["direct"].append(direct(llm, clients, given.tokens))
            speeds["http"].append(asyncio.run(through_http(server, clients, given.tokens)))
        found[f"{clients}_clients"] = {
            "direct_tok_per_s": statistics.median(speeds["direct"]),
            "http_tok_per_s": statistics.median(speeds["http"]),
            # Of neighbouring rounds: what the machine does to both at once drops out.
            "ratio": statistics.median(
                h / d for h, d in zip(speeds["http"], speeds["direct"], strict=True)
            ),
        }
    firsts: dict[str, list[float]] = {"direct": [], "http": []}
    for _ in range(given.first_tokens):
        firsts["direct"].append(direct_first_s(llm))
        firsts["http"].append(asyncio.run(http_first_s(server)))
    found["first_token"] = {
        "direct_ms": 1e3 * statistics.median(firsts["direct"]),
        "http_ms": 1e3 * statistics.median(firsts["http"]),
        "added_ms": 1e3
        * statistics.median(h - d for h, d in zip(firsts["http"], firsts["direct"], strict=True)),
    }
    return found


async def turns() -> dict[str, Any]:
    """A chat whose first turn has 4K tokens: what each turn computes, and how long to its first
    token. The demo model's limit of 2048 tokens is lifted, for what it writes is no matter here.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "demo"
        shutil.copytree(DEMO, model)
        config = json.loads((model / "config.json").read_text())
        config["max_position_embeddings"] = 8192
        (model / "config.json").write_text(json.dumps(config))
        with running("--quiet", f"--model={model}", "--max_model_len=8192") as server:
            rows = [await two_turns(server, attempt) for attempt in range(4)]
    return {
        turn: {
            name: statistics.median(row[turn][name] for row in rows[1:])  # the first one compiles
            for name in ("prompt_tokens", "computed_tokens", "first_ms")
        }
        for turn in ("first", "second")
    }


async def two_turns(server: Server, number: int) -> dict[str, dict[str, float]]:
    messages = [{"role": "user", "content": f"{number} " + f"{WORDS}, " * _REPEATS}]
    found = {}
    for turn in ("first", "second"):
        before = server.metrics()[_PREFILLED]
        body = {"messages": messages, "temperature": 0, "max_tokens": 32, "ignore_eos": True}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        answer = await ask(server.port, CHAT, body)
        events = [e for e in answer.events if e != "[DONE]"]
        found[turn] = {
            "prompt_tokens": events[-1]["usage"]["prompt_tokens"],
            "computed_tokens": server.metrics()[_PREFILLED] - before,
            "first_ms": 1e3 * answer.first_s,
        }
        text = "".join(c["delta"].get("content", "") for e in events for c in e["choices"])
        messages += [
            {"role": "assistant", "content": text},
            {"role": "user", "content": "And what came to pass after that?"},
        ]
    return found


def describe(found: dict[str, Any]) -> list[str]:
    lines = []
    for clients in CLIENTS:
        f = found[f"{clients}_clients"]
        lines.append(
            f"{clients} clients: {f['http_tok_per_s']:.0f} tok/s through HTTP, "
            f"{f['direct_tok_per_s']:.0f} directly: {100 * f['ratio']:.0f} % (wanted 90 %)"
        )
    f = found["first_token"]
    lines.append(
        f"first token: {f['http_ms']:.1f} ms through HTTP, {f['direct_ms']:.1f} ms directly: "
        f"{f['added_ms']:+.1f} ms at p50 (wanted 5 ms)"
    )
    for turn, f in found["turns"].items():
        lines.append(
            f"{turn} turn: {f['prompt_tokens']:.0f} prompt tokens, {f['computed_tokens']:.0f} of "
            f"them computed, first token after {f['first_ms']:.0f} ms"
        )
    return lines


def messages(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{number} {WORDS}"}]


def direct(llm: LLM, clients: int, tokens: int) -> float:
    """Tokens a second of so many requests at once."""
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    start = time.perf_counter()
    for number in range(clients):
        llm.engine.add_request(llm.chat_prompt(messages(number)), params)
    while llm.engine.has_work:
        llm.engine.step()
    return clients * tokens / (time.perf_counter() - start)


def direct_first_s(llm: LLM) -> float:
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    start = time.perf_counter()
    llm.engine.add_request(llm.chat_prompt(messages(1)), params)
    while not llm.engine.step():
        pass
    seconds = time.perf_counter() - start
    while llm.engine.has_work:
        llm.engine.step()
    return seconds


async def through_http(server: Server, clients: int, tokens: int) -> float:
    start = time.perf_counter()
    counts = await asyncio.gather(*(stream(server.port, i, tokens) for i in range(clients)))
    seconds = time.perf_counter() - start
    assert all(f'"completion_tokens":{tokens},'.encode() in tail for tail in counts)
    return clients * tokens / seconds


async def stream(port: int, number: int, tokens: int) -> bytes:
    """Reads a stream to its end; the last bytes of it, with the usage."""
    body = {
        "messages": messages(number),
        "temperature": 0,
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(encode(CHAT, body))
    tail = b""
    while piece := await reader.read(1 << 16):
        tail = (tail + piece)[-600:]
    writer.close()
    return tail


async def http_first_s(server: Server) -> float:
    """From the request to the first text."""
    body = {"messages": messages(1), "temperature": 0, "max_tokens": 2, "ignore_eos": True}
    data = encode(CHAT, {**body, "stream": True})
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    start = time.perf_counter()
    writer.write(data)
    got = b""
    while b'"content":"' not in got.replace(b'"content":""', b""):
        got += await reader.read(1 << 16)
    seconds = time.perf_counter() - start
    while await reader.read(1 << 16):
        pass
    writer.close()
    return seconds


if __name__ == "__main__":
    sys.exit(main())
