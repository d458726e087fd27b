"""The scenarios of prefill beside decode, against a server whose times are a script."""

import importlib.util
import json
import sys
import threading
import time
from pathlib import Path

import pytest
from support import fake_openai
from support.fake_openai import Refusal, piece, serving, usage

from jaxmoe.cli.bench_client import Timed

TOOL = Path(__file__).parents[2] / "tools" / "bench_concurrency.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_concurrency", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def timed(times, tokens_each=1, due_s=0.0):
    result = Timed(due_s, end_s=times[-1], chunk_s=list(times))
    result.output_tokens = tokens_each * len(times)
    return result


@pytest.mark.parametrize(
    "times, begin, end, want",
    [
        ([0, 1, 2, 3, 4], 1, 3, (1.0, 1.0)),
        # Stood still from 2 to 8, in the middle of which the window lies.
        ([0, 1, 2, 8, 9], 4, 6, (6.0, 1.0)),
        ([0, 1, 2, 8, 9], 1.5, 8.5, (8 / 3, 1.0)),
        ([0, 1, 2], 5, 6, (None, None)),
        ([0, 1, 2], 1.5, 9, (1.0, 1.0)),
        ([0, 1, 2], -1, 9, (1.0, None)),
    ],
)
def test_time_per_token_in_a_window(bench, times, begin, end, want):
    assert bench.tpot_between(timed(times), begin, end) == want


def test_pieces_of_several_tokens(bench):
    assert bench.tpot_between(timed([0, 1, 2, 3], tokens_each=4), 1, 2) == (0.25, 0.25)


def test_figures(bench):
    scenario = bench.Scenario(1, 2)
    assert scenario.name == "1P+2D" and bench.Scenario(0, 16).name == "16D"
    prompt = timed([4.0, 4.5], due_s=2.0)
    prompt.prompt_tokens = 900
    texts = [timed([0, 1, 2, 4, 5]), timed([0, 1, 2, 3, 3.5])]
    found = bench.figures(scenario, [prompt], texts)
    assert found["ttft_s"] == 2.0 and found["prompt_tokens"] == 900
    assert found["beside_tpot_s"] == pytest.approx((2.0 + 0.75) / 2)
    assert found["apart_tpot_s"] == 1.0 and found["rise"] == pytest.approx(0.375)
    assert found["tok_per_s"] == 2.0
    assert found["texts_ended_early"] == 1
    assert "raise --output_tokens" in bench.row({"scenario": "1P+2D", **found})
    prompt.error = "status 400: no"
    with pytest.raises(bench.BenchError, match=r"1P\+2D: status 400: no"):
        bench.figures(scenario, [prompt], texts)


class Machine:
    """Answers like one that cannot do two things at once: a long prompt stops every text."""

    def __init__(self):
        self.prefill = threading.Lock()
        self.most, self.running, self.lock = {}, [0, 0], threading.Lock()

    def _count(self, long, by):
        with self.lock:
            self.running[long] += by
            if by > 0:
                key = tuple(self.running)
                self.most[key] = self.most.get(key, 0) + 1

    def script(self, path, body):
        assert path == "/v1/completions" and body["ignore_eos"] is True
        long = len(body["prompt"].split()) > 100
        self._count(long, 1)
        try:
            if long:
                with self.prefill:
                    time.sleep(0.15)
            for i in range(body["max_tokens"]):
                if not long:
                    with self.prefill:
                        pass
                    yield 0.004
                yield piece("a ", "length" if i + 1 == body["max_tokens"] else None)
            yield usage(len(body["prompt"].split()), body["max_tokens"])
            yield fake_openai.DONE
        finally:
            self._count(long, -1)


def test_against_an_endpoint(bench, tmp_path, capsys):
    machine, file = Machine(), tmp_path / "found.json"
    with serving(machine.script) as server:
        argv = [f"--url={server.url}", "--prompt_tokens=200", "--output_tokens=40", "--repeats=1"]
        assert bench.main([*argv, "--batch=1,4", f"--json={file}"]) == 0
    found = json.loads(file.read_text())
    of = {f["scenario"]: f for f in found["scenarios"]}
    assert list(of) == ["1P", "1D", "1P+1D", "2D", "1P+2D", "4D"]
    # The long prompts came while one and two texts were being written, and four ran at once.
    assert machine.most[0, 1] and (1, 1) in machine.most and (2, 1) in machine.most
    assert (4, 0) in machine.most
    assert of["1P"]["prompt_tokens"] == pytest.approx(200, abs=3)
    assert of["1P"]["tpot_s"] is None and of["1D"]["ttft_s"] is None
    assert of["1P+1D"]["beside_tpot_s"] > 0 and of["1P+2D"]["texts_ended_early"] == 0
    out = capsys.readouterr().out
    assert "1P+1D: time per token while the prompt is computed +" in out
    assert "tok/s against 1D: 1D 1.00, 2D" in out


def test_what_is_refused_is_said(bench, capsys):
    with serving(lambda path, body: Refusal(400, "max_tokens is too large")) as server:
        assert bench.main([f"--url={server.url}", "--repeats=1", "--batch=1"]) == 1
    assert "1P: status 400: max_tokens is too large" in capsys.readouterr().err
    assert bench.main(["--url=http://x", "--", "--model=m"]) == 1
    assert "wanted one of them" in capsys.readouterr().err
