"""jaxmoe_bench against a server whose answers and pauses are scripted."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time

import pytest
from support.fake_openai import DONE, MODEL, Refusal, chunk, finish, piece, serving, usage

from jaxmoe.cli import bench, bench_load, bench_plot, bench_report
from jaxmoe.cli.bench_client import Timed, http_client, send
from jaxmoe.cli.bench_load import Point
from jaxmoe.cli.bench_report import Slo
from jaxmoe.common.errors import ConfigError


def answer(path, body):
    """A first token after 50 ms, two more after 20 ms each."""
    if path == "/v1/completions":
        return [0.05, piece("a"), 0.02, piece("b"), 0.02, piece("c", "length"), usage(5, 3), DONE]
    return [chunk(role="assistant", content=""), 0.05, chunk("a"), 0.02, chunk("b"), 0.02,
            chunk("c"), finish("length"), usage(5, 3), DONE]  # fmt: skip


@pytest.fixture
def server():
    with serving(answer) as s:
        yield s


@pytest.fixture
def run(server, capsys):
    def run(*argv):
        code = bench.main(["jaxmoe_bench", f"--url={server.url}", "--quiet", "--warmup=0", *argv])
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_what_is_sent_and_what_is_reported(run, server, tmp_path, endpoint):
    out = tmp_path / "out.json"
    code, text, _ = run("latency", f"--endpoint={endpoint}", "--requests=3", f"--json={out}",
                        "--input_tokens=20", "--output_tokens=3")  # fmt: skip
    assert code == 0 and f"{server.url}: {MODEL}" in text and "0 errors" in text
    told = json.loads(out.read_text())
    assert told["kind"] == "latency" and told["model"] == MODEL
    (point,) = told["points"]
    assert (point["requests"], point["errors"], point["concurrency"]) == (3, 0, 1)
    assert (point["output_tokens"], point["prompt_tokens"]) == (9, 15)
    assert point["token_counts"] == "usage"
    # Pauses bound what is counted from the request on from below: a busy machine makes it longer,
    # never shorter. Between tokens it does both: a token that comes late is nearer to the next.
    assert point["ttft_s"]["min"] >= 0.05 and point["tpot_s"]["min"] > 0
    assert point["itl_s"]["count"] == 6 and point["e2e_s"]["min"] >= 0.09
    assert point["seconds"] >= 3 * 0.09
    for record in point["records"]:
        assert record["output_tokens"] == 3 and record["error"] is None
        assert record["finish_reason"] == "length"
    bodies = [body for _, body in server.requests]
    assert len(bodies) == 3 and all(b["stream"] and b["ignore_eos"] for b in bodies)
    assert all(b["max_tokens"] == 3 and b["temperature"] == 0 for b in bodies)
    assert all(b["stream_options"] == {"include_usage": True} for b in bodies)
    prompts = [b["prompt"] if endpoint == "completions" else b["messages"][0]["content"]
               for b in bodies]  # fmt: skip
    assert len(set(prompts)) == 3 and all(15 <= len(p.split()) <= 20 for p in prompts)


def test_throughput_sends_all_at_once(run, server):
    waiting = threading.Barrier(12, timeout=30)

    def script(path, body):
        waiting.wait()
        yield from answer(path, body)

    server.script = script
    code, text, _ = run("throughput", "--requests=12")
    assert code == 0 and "all at once: 12 requests" in text and "0 errors" in text


def test_concurrency_is_never_exceeded(run, server):
    lock, now, most = threading.Lock(), [0], [0]

    def script(path, body):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        yield 0.02
        yield chunk("x")
        yield finish()
        with lock:
            now[0] -= 1
        yield DONE

    server.script = script
    code, text, _ = run("serve", "--concurrency=2,3", "--requests=9", "--noignore_eos")
    assert code == 0 and "2 in flight: 9" in text and "3 in flight: 9" in text
    assert most[0] <= 3 and len(server.requests) == 18
    assert all("ignore_eos" not in body for _, body in server.requests)
    assert "tokens are pieces of the stream" in text


def test_goodput_counts_what_met_the_objective(run, server, tmp_path):
    slow = iter([0.0, 0.0, 0.6, 0.0])

    def script(path, body):
        yield next(slow)
        yield from answer(path, body)

    server.script = script
    out = tmp_path / "out.json"
    code, text, _ = run("latency", "--requests=4", "--slo_ttft_ms=500", "--slo_tpot_ms=5000",
                        f"--json={out}")  # fmt: skip
    (point,) = json.loads(out.read_text())["points"]
    good = sum(r["ttft_s"] <= 0.5 for r in point["records"])
    assert good <= 3
    assert point["goodput_requests_per_s"] == pytest.approx(good / point["seconds"])
    assert code == 0 and "at TTFT <= 500 ms, TPOT <= 5000 ms" in text


def test_figures_of_known_times():
    fast = Timed(10.0, 10.9, [10.5, 10.6, 10.9], 4, 3, True, "stop")
    slow = Timed(10.0, 13.0, [12.0, 13.0], 4, 2, True, "stop")
    lost = Timed(10.0, 10.1, error="status 429: full")
    slo = Slo(ttft_s=1.0, tpot_s=0.3)
    s = bench_report.summarize(Point(2.0, None), [fast, slow, lost], 4.0, slo)
    assert (s["requests"], s["errors"], s["error_messages"]) == (3, 1, {"status 429: full": 1})
    assert s["ttft_s"]["p50"] == pytest.approx(1.25) and s["ttft_s"]["max"] == pytest.approx(2.0)
    assert s["tpot_s"]["min"] == pytest.approx(0.2) and s["tpot_s"]["max"] == pytest.approx(1.0)
    assert s["itl_s"]["count"] == 3 and s["itl_s"]["mean"] == pytest.approx(1.4 / 3)
    assert s["output_tokens_per_s"] == 5 / 4 and s["requests_per_s"] == 0.5
    assert s["goodput_requests_per_s"] == 0.25
    text = bench_report.describe(s, slo)
    assert "2 requests/s: 2 requests in 4.00 s, 1 errors" in text
    assert "error, 1 times: status 429: full" in text
    ten = bench_report.distribution([float(i) for i in range(11)])
    assert ten is not None and (ten["p50"], ten["p90"], ten["mean"]) == (5.0, 9.0, 5.0)


def test_a_late_answer_to_a_waiting_request_counts_from_when_it_was_due():
    """A rate beyond what a server takes must show in TTFT, though requests wait in the client."""

    async def slow(body, due_s):
        await asyncio.sleep(0.05)
        return Timed(due_s, time.perf_counter(), [time.perf_counter()], 1, 1, True, "stop")

    results, seconds = asyncio.run(
        bench_load.run_load(slow, [{}] * 8, Point(rate=1e6, concurrency=1), seed=0)
    )
    waits = [t.ttft_s for t in results]
    assert max(waits) >= 7 * 0.05 and seconds >= 8 * 0.05
    results, _ = asyncio.run(bench_load.run_load(slow, [{}] * 8, Point(concurrency=1), seed=0))
    assert results[-1].due_s - results[0].due_s >= 6 * 0.05


def test_arrivals_are_at_the_rate_and_repeatable():
    times = bench_load.due_times(4000, 5.0, seed=3)
    assert times == bench_load.due_times(4000, 5.0, seed=3) and times == sorted(times)
    assert times != bench_load.due_times(4000, 5.0, seed=4)
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
    mean = sum(gaps) / len(gaps)
    # Of an exponential distribution the deviation is the mean: 4000 samples give 1.6 % of each.
    assert mean == pytest.approx(0.2, rel=0.06)
    deviation = math.sqrt(sum((g - mean) ** 2 for g in gaps) / len(gaps))
    assert deviation == pytest.approx(mean, rel=0.1)
    assert bench_load.due_times(3, math.inf, 0) == [0.0, 0.0, 0.0]


FAILURES = [
    (lambda p, b: Refusal(429, "queue full"), "status 429: queue full"),
    (lambda p, b: [chunk("a"), {"error": {"message": "engine died"}}, DONE], "engine died"),
    (lambda p, b: [chunk("a")], "the stream ended without a finish_reason"),
    (lambda p, b: [finish(), DONE], "the answer has no text"),
    (lambda p, b: [b"data: {broken\n\n"], "JSONDecodeError"),
    (lambda p, b: [b"data: [1]\n\n"], "wanted an object"),
]


@pytest.mark.parametrize(("script", "words"), FAILURES)
def test_requests_that_fail_are_counted_and_named(run, server, script, words):
    server.script = script
    code, text, err = run("latency", "--requests=2")
    assert code == 1 and "no request was answered" in err and err.count("\n") == 1
    assert "2 errors" in text and words in text


def test_some_failures_do_not_hide_the_rest(run, server):
    scripts = iter([FAILURES[0][0], answer, answer])
    server.script = lambda path, body: next(scripts)(path, body)
    code, text, _ = run("latency", "--requests=3")
    assert code == 0 and "2 requests in" in text and "error, 1 times: status 429" in text


def test_text_may_hold_any_line_separator(server):
    raw = json.dumps(chunk("a\u2028b\x85c"), ensure_ascii=False).encode()
    server.script = lambda p, b: [b": ping\n\ndata: " + raw[:40], raw[40:] + b"\r\n\r\n", finish()]

    async def one():
        async with http_client(server.url + "/v1/", None, 30) as client:
            return await send(client, "chat", {}, time.perf_counter())

    timed = asyncio.run(one())
    assert timed.error == "" and len(timed.chunk_s) == 1 and timed.finish_reason == "stop"


def test_prompts_from_a_file(run, server, tmp_path):
    file = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "hi"}]
    lines = [{"prompt": "one"}, {"messages": messages}, {"body": {"messages": messages}}]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert run("latency", "--requests=4", f"--prompts={file}")[0] == 0
    sent = [body["messages"][0]["content"] for _, body in server.requests]
    assert sent == ["one", "hi", "hi", "one"]
    code, _, err = run("latency", f"--prompts={file}", "--endpoint=completions")
    assert code == 1 and "wanted --endpoint=chat" in err


def test_the_key_comes_from_the_environment(run, server, monkeypatch):
    server.key = "k1"
    code, _, err = run("latency", "--requests=1")
    assert code == 1 and "status 401: Incorrect API key" in err
    monkeypatch.setenv("OPENAI_API_KEY", "k1")
    assert run("latency", "--requests=1")[0] == 0


@pytest.mark.parametrize(
    "argv", [["serve", "--concurrency=1,2,4", "--slo_ttft_ms=900"], ["latency"]]
)
def test_the_plot_is_a_png(run, tmp_path, argv):
    file = tmp_path / "plot.png"
    assert run(*argv, "--requests=4", f"--plot={file}")[0] == 0
    data = file.read_bytes()
    assert data.startswith(b"\x89PNG\r\n") and len(data) > 10_000


def test_missing_extras_are_named_before_any_load(run, server, monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run("latency", f"--plot={tmp_path}/x.png")
    assert code == 1 and "pip install 'jaxmoe[bench]'" in err and server.requests == []
    with pytest.raises(ConfigError, match="matplotlib"):
        bench_plot.require()
    monkeypatch.setitem(sys.modules, "httpx", None)
    code, _, err = run("latency")
    assert code == 1 and "needs httpx" in err and "jaxmoe[bench]" in err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            [],
            "got nothing, wanted one of machine, kernel, layer, decode, prefill, serve, "
            "throughput, latency",
        ),
        (["serv"], "got serv, wanted one of"),
        (["serve", "--concurrency=0"], "--concurrency: got '0', wanted numbers above 0"),
        (["serve", "--request_rate=1,x"], "--request_rate: got '1,x'"),
        (["serve", "--request_rate=nan"], "--request_rate: got 'nan'"),
        (["serve", "--request_rate=1,2", "--concurrency=1,2"], "only one of them"),
        (["latency", "--concurrency=2"], "latency: takes no"),
        (["latency", "--requests=0"], "--requests: got 0"),
        (["latency", "--url=ftp://x"], "--url: got 'ftp://x'"),
        (["latency", "--url=http://127.0.0.1:9"], "does not answer"),
        (["latency", "--prompts=/no/such"], "--prompts: /no/such: No such file"),
        (["latency", "--json=/no/such/x.json"], "--json: there is no directory /no/such"),
        (["latency", "--endpoint=responses"], "--endpoint"),
        (["latency", "--request=3"], "did you mean 'requests'?"),
    ],
)
def test_bad_command_lines_are_one_line_and_exit_code_1(run, argv, words):
    code, out, err = run(*argv)
    assert code == 1 and out == "" and words in err
    assert err.startswith("jaxmoe_bench: error: ") and err.count("\n") == 1


def test_help(run):
    code, out, _ = run("--help")
    assert code == 0 and "--slo_ttft_ms" in out and "(default 256)" in out
