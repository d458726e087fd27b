"""jaxmoe_bench kernel, layer, decode and prefill at sizes that take no time, and a rival that is a
script. Speeds are not looked at, only how figures are made of what was measured.
"""

from __future__ import annotations

import functools
import json
import shlex
import stat

import pytest
from support.tiny_models import CONFIG_DIR

from jaxmoe.cli import bench, bench_against, bench_kernel, bench_machine, bench_roofline
from jaxmoe.common.errors import ConfigError, JaxMoeError
from jaxmoe.engine import machine_bench, machine_rates

SMALL = ["--threads=2", "--repeats=2", "--ceiling_mb=8", "--cold_mb=1"]


@pytest.fixture
def run(capsys, tmp_path):
    def run(*argv, want=0):
        out = tmp_path / "out.json"
        code = bench.main(["jaxmoe_bench", *argv, f"--json={out}"])
        text, errors = capsys.readouterr()
        assert code == want, errors
        return text, errors, json.loads(out.read_text()) if code == 0 else None

    return run


def check_figure(f):
    assert len(f["seconds"]) == 2 and min(f["seconds"]) > 0
    assert len(f["read_ceiling_samples"]) >= 5
    assert all(len(rates) >= 5 for rates in f["peak_samples"].values())
    assert f["bytes_per_s"] == pytest.approx(f["bytes"] / f["median_seconds"])
    assert f["fraction_of_read_ceiling"] == pytest.approx(
        f["bytes_per_s"] / f["read_ceiling_bytes_per_s"]
    )
    assert f["fraction_of_peak"] == pytest.approx(f["flops_per_s"] / f["peak_flops_per_s"])
    assert f["fraction_of_roofline"] == pytest.approx(
        max(f["fraction_of_read_ceiling"], f["fraction_of_peak"])
    )


def test_kernels(run, tmp_path):
    picture = tmp_path / "roofline.png"
    text, _, told = run("kernel", *SMALL, "--dims=256x128:2", "--formats=fp8_block,bf16",
                        "--rows=1,100", f"--plot={picture}")  # fmt: skip
    (machine,) = told["machines"]
    assert machine["threads"] == 2 and machine["isa"] in text and machine["cpu"] in text
    assert {(f["format"], f["rows"]) for f in told["figures"]} == {
        (name, rows) for name in ("fp8_block", "bf16") for rows in (1, 100)
    }
    for f in told["figures"]:
        check_figure(f)
        per_matrix = 128 * 256 * (1 if f["format"] == "fp8_block" else 2)
        per_matrix += 8 if f["format"] == "fp8_block" else 0  # two blocks' scales
        matrices = f["bytes"] / per_matrix
        assert matrices == int(matrices) > 1
        assert f["flops"] == 2 * matrices * f["rows"] * 128 * 256
        assert f["kernel"] in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_layers(run):
    text, _, told = run("layer", *SMALL, "--dims=256x128:2", "--formats=bf16", "--rows=1,3,70")
    assert [f["tokens"] for f in told["figures"]] == [1, 3, 70]
    expert = 3 * 128 * 256 * 2
    for f in told["figures"]:
        check_figure(f)
        assert f["family"] == ("vector" if f["tokens"] <= 64 else "matrix")
        assert f["flops"] == f["calls"] * f["tokens"] * 2 * 6 * 128 * 256
        # Distinct experts: at most every chosen one, at least those of one token.
        assert f["bytes"] % expert == 0
        assert 2 * f["calls"] <= f["bytes"] / expert <= 2 * f["calls"] * f["tokens"]
    (overheads,) = told["overheads"]
    assert all(value > 0 for name, value in overheads.items() if name.endswith("_us"))
    assert "empty experts call ffi" in text


def test_calls_of_one_token_walk_through_all_experts():
    import numpy as np

    ids = bench_kernel.chosen_experts(np.random.default_rng(0), 20, 3, 4)
    assert ids.shape == (5, 3, 4)
    assert sorted(ids[:, 0].reshape(-1)) == list(range(20))
    assert all(len(set(row)) == 4 for row in ids.reshape(-1, 4).tolist())


def rival(tmp_path, told, code=0):
    """A llama-bench that says what it is told to, and notes how it was called."""
    script, log = tmp_path / "llama-bench", tmp_path / "calls"
    script.write_text(
        f'#!/bin/sh\necho "$@" >> {log}\necho loading...\n'
        f"cat <<'END'\n{json.dumps(told)}\nEND\nexit {code}\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    return script, log


def arguments(script, tmp_path):
    return [f"--against=llama-bench:{script}", f"--against_model={tmp_path / 'model.gguf'}"]


def test_decode_and_prefill_beside_a_rival(run, tmp_path):
    path = CONFIG_DIR / "qwen3_moe_fp8.json"
    tiny = ["--threads=2", "--repeats=2", "--ceiling_mb=8", f"--model={path}"]
    # First what our own model is, so that the rival can be equal to it.
    text, _, told = run("decode", *tiny, "--tokens=3", "--batch=1,2", "--profile=seconds")
    assert [f["batch"] for f in told["figures"]] == [1, 2]
    one, two = told["figures"]
    for f in told["figures"]:
        check_figure(f)
        assert f["tokens_per_s"] == pytest.approx(f["batch"] / f["median_seconds"])
    assert one["bytes"] > 0 and two["flops"] == pytest.approx(2 * one["flops"], rel=0.05)
    assert "experts read" in text and "dispatch" in text
    weights, each = one["num_weights"], one["bytes_per_weight"]

    answer = [{"avg_ts": 10.0, "model_size": int(weights * each), "model_n_params": weights,
               "model_type": "tiny Q8_0", "build_commit": "abc"}]  # fmt: skip
    script, log = rival(tmp_path, answer)
    _, _, told = run("prefill", *tiny, "--prompt_tokens=20", "--chunk_tokens=16", "--context=40",
                     *arguments(script, tmp_path), "--against_args=-rtr 1")  # fmt: skip
    prefill, attention = told["figures"]
    check_figure(prefill)
    check_figure(attention)
    assert (prefill["op"], attention["op"]) == ("prefill", "attention")
    assert prefill["tokens_per_s"] == pytest.approx(20 / prefill["median_seconds"])
    (compared,) = told["comparisons"]
    assert compared["rival_tokens_per_s"] == [10.0, 10.0] and len(compared["tokens_per_s"]) == 2
    assert compared["ratios"] == [rate / 10 for rate in compared["tokens_per_s"]]
    calls = [shlex.split(line) for line in log.read_text().splitlines()]
    assert len(calls) == 3  # one to see that the models are equal, then one a round
    assert calls[0] == shlex.split(
        f"-m {tmp_path / 'model.gguf'} -p 20 -n 0 -r 1 -t 2 -o json -rtr 1"
    )
    assert compared["command"].endswith("-rtr 1")


@pytest.mark.parametrize(
    ("size", "weights", "word"), [(2.1, 1.0, "bytes per weight"), (1.0, 1.2, "weights")]
)
def test_unequal_rivals_are_refused(size, weights, word):
    told = bench_against.Told(5.0, 1.0 * size, int(1e6 * weights), "big F16, build x")
    with pytest.raises(JaxMoeError, match=f"big F16, build x has .* {word}"):
        bench_against.check_equal(told, 1_000_000, 1.0)
    bench_against.check_equal(bench_against.Told(5.0, 1.0625, 1_001_000, "Q8_0"), 1_000_000, 1.0)


def test_rivals_that_fail(tmp_path):
    script, _ = rival(tmp_path, [], code=3)
    tool = bench_against.make(f"llama-bench:{script}", str(tmp_path / "model.gguf"), "")
    with pytest.raises(JaxMoeError, match="ended with 3"):
        tool.run(threads=1, generate=4)
    script, _ = rival(tmp_path, [{"avg_ts": 1.0}])
    with pytest.raises(JaxMoeError, match="wanted llama-bench's JSON"):
        tool.run(threads=1, generate=4)
    for against, model, word in (
        ("vllm:x", "m", "wanted llama-bench:PATH"),
        (f"llama-bench:{script}", None, "--against_model"),
        ("llama-bench:/no/such/tool", str(tmp_path / "model.gguf"), "there is no file /no/such"),
    ):
        with pytest.raises(ConfigError, match=word):
            bench_against.make(against, model, "")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["kernel", "--batch=2"], "--batch: kernel does not take it"),
        (["kernel", "--url=http://x"], "--url: kernel does not take it"),
        (["latency", "--rows=2"], "--rows: latency does not take it"),
        (["kernel", "--rows=1,x"], "--rows: got '1,x', wanted whole numbers above 0"),
        (["layer", "--dims=5x"], "--dims: got '5x', wanted HIDDENxINTERMEDIATE"),
        (["layer", "--formats=q4"], "--formats: got 'q4', wanted one of"),
        (["kernel", "--isa=mmx"], "--isa: got 'mmx', wanted one of"),
        (["decode"], "--model: wanted a config.json"),
        (["decode", "--model=/no/such"], "--model: there is no /no/such"),
        (["layer", "--plot=/no/such/x.png"], "--plot: there is no directory /no/such"),
    ],
)
def test_errors(capsys, argv, words):
    assert bench.main(["jaxmoe_bench", *argv]) == 1
    assert words in capsys.readouterr().err


def test_a_figure_is_stated_against_the_medians_of_its_roofs():
    roofs = bench_machine.Roofs([1.0, 100.0, 10.0], {"slow": [5.0] * 3, "fast": [90.0, 50.0, 1.0]})
    work = bench_machine.Work([2.0, 1.0, 4.0], bytes=10, flops=25, tokens=6)
    f = bench_machine.figure_of("x", 2, {"op": "kernel"}, work, roofs)
    assert (f["read_ceiling_bytes_per_s"], f["peak"], f["peak_flops_per_s"]) == (10.0, "fast", 50.0)
    assert f["median_seconds"] == 2.0 and f["tokens_per_s"] == 3.0
    assert f["fraction_of_read_ceiling"] == 0.5 and f["fraction_of_peak"] == 0.25
    assert f["fraction_of_roofline"] == 0.5 and "0.50 of the roofline (bytes)" in (
        bench_machine.describe(f)
    )


def test_a_roofline_without_figures_is_a_picture_all_the_same(tmp_path):
    bench_roofline.plot(tmp_path / "x.png", "nothing", [])
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_machine(run, tmp_path, monkeypatch):
    """Kept and told again; the suite may be named by a flag too."""
    sizes = {"copy_bytes": 1 << 16, "least_bytes": 1 << 20}
    monkeypatch.setattr(
        machine_bench, "MachineBench", functools.partial(machine_bench.MachineBench, **sizes)
    )
    monkeypatch.setattr(machine_bench, "last_level_bytes", lambda: 0)
    monkeypatch.setattr(machine_rates, "LEAST_SHARE", 0.0)
    arguments = ["--threads=1", "--formats=fp8_block,mxfp4", f"--cache_dir={tmp_path}"]
    text, errors, told = run("machine", *arguments)
    assert "measuring: products in mxfp4" in errors and "kept in" in told["source"]
    assert "1 threads" in told["key"] and told["key"] in text
    assert sorted(told["rates"]["gemv_bytes"]) == ["fp8_block", "mxfp4"]
    text, errors, again = run("--suite=machine", *arguments)
    assert again["rates"] == told["rates"] and " ago, " in again["source"] and not errors
    _, _, anew = run("machine", "--anew", *arguments)
    assert anew["rates"] != told["rates"]
    _, errors, _ = run("machine", "--threads=1,2", want=1)
    assert "--threads: got '1,2', wanted one whole number" in errors
    _, errors, _ = run("machine", "--dims=256x128:2", want=1)
    assert "--dims: machine does not take it" in errors
    _, errors, _ = run("--suite=machine", "layer", want=1)
    assert "got machine layer" in errors
