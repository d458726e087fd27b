"""R1: requests made of nonsense. Three makers: schemathesis by the server's own description,
hypothesis in the fields of valid bodies, and a mutator of raw requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from typing import Any

from reliability.client import CHAT, COMPLETIONS, encode
from reliability.figures import Check, Goal
from reliability.server import Server, running

HANG_S = 10.0
_CONNECTIONS = 32
_FLAGS = (
    "--max_model_len=64",
    "--header_timeout_s=2",
    "--body_timeout_s=3",
    "--quiet",
    "--tool_format=hermes",
)
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {
        "model": "jaxmoe-demo",
        "messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I"}],
        "max_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "n": 1,
        "stop": ["x", "yz"],
        "seed": 1,
        "logprobs": True,
        "top_logprobs": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
        "logit_bias": {"5": 1.5},
        "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
        "chat_template_kwargs": {"enable_thinking": False},
    },
    COMPLETIONS: {
        "prompt": ["In the", [5, 6]],
        "max_tokens": 2,
        "echo": True,
        "logprobs": 1,
        "stop": "x",
        "structured_outputs": {"regex": "[a-z]{1,3}"},
    },
    "/v1/messages": {
        "max_tokens": 2,
        "system": "s",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Who?"}]}],
        "stop_sequences": ["x"],
        "tools": [{"name": "f", "input_schema": {"type": "object"}}],
        "stream": True,
    },
    "/v1/responses": {
        "input": [{"role": "user", "content": "Who?"}],
        "max_output_tokens": 2,
        "text": {"format": {"type": "json_object"}},
        "stream": True,
    },
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "Who?"}]},
    "/tokenize": {"prompt": "text", "add_special_tokens": True},
    "/detokenize": {"tokens": [1, 2, 3]},
}
# Names that the server gives templates itself; each is tried on every endpoint.
RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "response_format")
TEMPLATED = (CHAT, "/v1/messages", "/v1/responses", "/v1/messages/count_tokens")
ODD: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 129, 2**31, 2**63, -(2**63), 1.5, -0.0, 1e308, 1e-320),
    *("", "x", "\x00", "\u202e", "\U0001f469\u200d\U0001f680" * 9, "{{ 7 }}", "{% raw %}", "../x"),
    *("a" * 5000, "(a+)+$", "[", "\\", "%s%n", "start: start", [], {}, [[]], [None], {"a": {}}),
    *([1] * 300, [-1], [2**40], {"type": "x"}, {"type": "json_schema"}, {"$ref": "#"}, "file:///x"),
]


def measure(count: int) -> list[Goal]:
    seen = Seen()
    with running(*_FLAGS) as server:
        engine = server.engine_pid
        given = _schemathesis(server, count // 4)
        before = server.metrics()
        rest = max(count - given, count // 2)  # schemathesis makes some for every endpoint
        fields, raw = rest // 2, (rest + 1) // 2
        asyncio.run(_fields(server, fields, seen))
        asyncio.run(_raw(server, raw, seen))
        alive = server.alive and server.status("/health") == 200
        settled = alive and asyncio.run(server.settle())
        after = server.metrics() if alive else {}
        deaths = int(not alive) + int(after.get("engine_restarts_total", 1))
        moved = server.engine_pid != engine
    failures = sum(int(v) for n, v in after.items() if 'status="500"' in n)
    answered = sum(
        int(v - before.get(n, 0)) for n, v in after.items() if n.startswith("http_requests_total")
    )
    statuses = ", ".join(f"{n} x {s}" for s, n in sorted(seen.statuses.items()))
    where = f" (first: {seen.first_hang})" if seen.first_hang else ""
    return [
        Goal("process deaths", "0", str(deaths), deaths == 0 and not moved),
        Goal("hangs over 10 s", "0", f"{seen.hangs}{where}", seen.hangs == 0),
        Goal("answers with status 500", "0", str(failures), failures == 0),
        Goal("requests left in work", "none", "none" if settled else "some", settled),
        Goal(
            "requests sent",
            f"{count:,}, most of them understood as HTTP",
            f"{given} by schemathesis, {fields} of odd fields, {raw} of odd bytes; "
            f"of the latter two {answered} reached the application ({statuses})",
            given + fields + raw >= count and answered > (fields + raw) // 2,
        ),
    ]


class Seen:
    def __init__(self) -> None:
        self.statuses: Counter[str] = Counter()
        self.hangs = 0
        self.first_hang = ""


def _schemathesis(server: Server, count: int) -> int:
    """How many requests it sent; none where it is not installed."""
    if not count or importlib.util.find_spec("schemathesis") is None:
        return 0
    before = _http_requests(server)
    # It sends about 100 requests per example asked for, over all operations and phases.
    examples = str(max(count // 100, 1))
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"),
                *("--max-examples", examples, "--checks", "not_a_server_error"),
                *("--request-timeout", "10", "--phases", "examples,coverage,fuzzing"),
                *("--mode", "all", "--seed", "1", "--suppress-health-check", "all"),
                *("--max-failures", "20", "--workers", "2"),
            ],
            cwd=folder,
            capture_output=True,
            timeout=3600,
        )
    return _http_requests(server) - before


def _http_requests(server: Server) -> int:
    found = server.metrics()
    return int(sum(v for n, v in found.items() if n.startswith("http_requests_total")))


async def _fields(server: Server, count: int, seen: Seen) -> None:
    """Bodies with one to three odd values, found by hypothesis where it is there."""
    bodies = list(_odd_bodies(count))
    assert len(bodies) == count

    async def one(path: str, body: Any) -> None:
        try:
            data = encode(path, body)
        except (ValueError, UnicodeEncodeError):  # not JSON: the raw mutator's matter
            data = encode(path, str(body))
        await _send(server.port, data, seen, f"{path} {str(body)[:200]}")

    await _at_once([lambda p=p, b=b: one(p, b) for p, b in bodies])


def _odd_bodies(count: int) -> list[tuple[str, Any]]:
    import warnings

    from hypothesis import HealthCheck, Phase, given, seed, settings
    from hypothesis import strategies as st

    scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
    values = st.recursive(
        scalars | st.sampled_from(ODD),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=6,
    )
    out: list[tuple[str, Any]] = [
        (path, {**BODIES[path], "chat_template_kwargs": {name: value}})
        for path in TEMPLATED
        for name in RESERVED
        for value in (None, True)
    ]
    talk = {"messages": BODIES[CHAT]["messages"]}
    out += [("/tokenize", {**talk, "chat_template_kwargs": {name: "x"}}) for name in RESERVED]
    rng = random.Random(1)

    @seed(1)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(sorted(BODIES)), st.lists(values, min_size=1, max_size=3))
    def collect(path: str, odd: list[Any]) -> None:
        body = json.loads(json.dumps(BODIES[path]))
        for value in odd:
            _put(rng, body, value)
        out.append((path, body))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        collect()
    while len(out) < count:  # hypothesis stops where it thinks it has seen all
        path = rng.choice(sorted(BODIES))
        body = json.loads(json.dumps(BODIES[path]))
        _put(rng, body, rng.choice(ODD))
        out.append((path, body))
    return out[:count]


def _put(rng: random.Random, body: Any, value: Any) -> None:
    """Somewhere in the tree of a body."""
    node = body
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = rng.choice(keys)
        child = node[key]
        if not isinstance(child, (dict, list)) or not child or rng.random() < 0.4:
            node[key] = value
            return
        node = child


async def _raw(server: Server, count: int, seen: Seen) -> None:
    rng = random.Random(2)
    whole = [encode(path, body) for path, body in BODIES.items()]
    whole += [encode(p) for p in ("/", "/health", "/v1/models/jaxmoe-demo", "/metrics", "/props")]
    requests = []
    for _ in range(count):
        data = rng.choice(whole)
        for _ in range(rng.choice([1, 1, 2, 4])):
            data = mutate(rng, data)
        requests.append(data)
    await _at_once([lambda d=d: _send(server.port, d, seen, repr(d[:200])) for d in requests])


def mutate(rng: random.Random, data: bytes) -> bytes:
    """A request with something wrong in its bytes."""
    if not data:
        return b"\r\n"
    at, length = rng.randrange(len(data)), rng.randrange(1, 20)
    line = rng.choice(data.split(b"\r\n"))
    match rng.randrange(9):
        case 0:
            return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
        case 1:
            return data[:at] + data[at + length :]
        case 2:
            return data[:at] + rng.randbytes(length) + data[at:]
        case 3:
            return data[:at]
        case 4:
            return data.replace(line, line + b"\r\n" + line, 1)
        case 5:
            return data.replace(b"\r\n", rng.choice([b"\n", b"\r", b"\r\n\r\n", b"\0"]), 1)
        case 6:
            odd = [b"-1", b"0", b"99999999999999999999", b"1e3", b"0x10", b"5, 6", b""]
            return re.sub(rb"(content-length: )\d+", rb"\g<1>" + rng.choice(odd), data, count=1)
        case 7:
            extra = [
                b"transfer-encoding: chunked",
                b"expect: 100-continue",
                b"upgrade: h2c",
                b"x: " + b"a" * rng.choice([10, 70_000]),
                b"x-request-timeout: nan",
                b"host: \xff",
                b"content-encoding: gzip",
            ]
            return data.replace(b"\r\n", b"\r\n" + rng.choice(extra) + b"\r\n", 1)
        case _:
            return data[:at] + data[at : at + length] * rng.choice([2, 50]) + data[at:]


async def _send(port: int, data: bytes, seen: Seen, what: str) -> None:
    """One request; the answer is read until it is quiet, for requests of no end have no answer."""
    start = time.monotonic()
    writer = None
    got = b""
    try:
        async with asyncio.timeout(HANG_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(data)
            while piece := await reader.read(1 << 16):
                got += piece[: 64 - len(got)] if len(got) < 64 else b""
        status = got[9:12].decode("latin-1") if got.startswith(b"HTTP/1") else "closed"
    except TimeoutError:
        seen.hangs += 1
        status = "hang"
        seen.first_hang = seen.first_hang or f"{what} after {time.monotonic() - start:.0f} s"
    except OSError:
        status = "reset"
    finally:
        if writer is not None:
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
    seen.statuses[status] += 1


async def _at_once(jobs: list[Any]) -> None:
    turns = asyncio.Semaphore(_CONNECTIONS)

    async def one(job: Any) -> None:
        async with turns:
            await job()

    await asyncio.gather(*map(one, jobs))


CHECK = Check(
    "fuzzed requests", {"short": 400, "ci": 20_000, "release": 1_000_000}, "requests", measure
)
