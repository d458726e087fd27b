"""Rates of the machine: kept with what they hold for, measured where there are none."""

import dataclasses
import json

import jax
import pytest
from support import tiny_models

from jaxmoe import LLM
from jaxmoe.common.machine import memory_topology
from jaxmoe.engine import machine_bench, machine_rates, prompt_rates
from jaxmoe.engine.machine_bench import MachineBench, copy_rates, device_flops
from jaxmoe.engine.machine_rates import MachineRates, identity, known_rates
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.ffi.native_ops import NativeOps

DEVICES = jax.local_devices(backend="cpu")
RATES = MachineRates(
    read_bytes=(2e11, 1.9e11),
    read_all_bytes=3.8e11,
    copy_bytes=(5e10,),
    copy_joint_bytes=(5e10,),
    gemm_flops={"fp8_block": 4e12},
    gemv_bytes={"fp8_block": 3e11},
    device_flops={},
    measured_unix_s=1e9,
)


class Scripted:
    """Finds RATES for what it is asked, and counts."""

    def __init__(self, share=1.0, **changes):
        self.asked, self.share, self.changes = [], share, changes

    def __call__(self, formats):
        self.asked.append(list(formats))
        rates = {name: 4e12 for name in formats}
        found = dataclasses.replace(RATES, gemm_flops=rates, gemv_bytes=rates, **self.changes)
        return found, self.share


@pytest.fixture(scope="module")
def runtime():
    with CpuRuntime(num_threads=1) as runtime:
        yield runtime


def ask(runtime, folder, measure, formats=("fp8_block",), **more):
    return known_rates(
        runtime, DEVICES, folder, formats, measure, now_unix_s=lambda: 1e9 + 7200, **more
    )


def test_measured_once_and_kept_with_its_key(runtime, tmp_path):
    measure = Scripted()
    first = ask(runtime, tmp_path / "new", measure)
    assert measure.asked == [["fp8_block"]] and "kept in" in first.source
    file = tmp_path / "new" / "machine.json"
    assert list(json.loads(file.read_text())) == [first.key] == [identity(runtime, DEVICES)]
    again = ask(runtime, tmp_path / "new", measure)
    assert len(measure.asked) == 1 and again.rates == first.rates
    assert again.source == f"measured 2 hours ago, {file}"
    assert "memory 200.0 + 190.0 GB/s a node, 380.0 together" in again.describe()
    ask(runtime, tmp_path / "new", measure, anew=True)
    assert len(measure.asked) == 2
    assert ask(runtime, tmp_path / "new", None).rates == first.rates


def test_another_format_is_added(runtime, tmp_path):
    measure = Scripted()
    ask(runtime, tmp_path, measure)
    both = ask(runtime, tmp_path, measure, ["bf16"])
    assert measure.asked == [["fp8_block"], ["bf16"]]
    assert sorted(both.rates.gemm_flops) == ["bf16", "fp8_block"]
    ask(runtime, tmp_path, measure, ["bf16", "fp8_block"])
    assert len(measure.asked) == 2


class FakeDevice:
    platform, device_kind = "gpu", "NVIDIA GeForce RTX 5090"


@pytest.mark.parametrize(
    "change",
    ["cpu_name", "cpu_id", "memory_topology", "devices", "more devices", "threads", "version"],
)
def test_another_machine_is_measured_anew(runtime, tmp_path, monkeypatch, change):
    measure = Scripted()
    ask(runtime, tmp_path, measure)
    devices, threads = DEVICES, 1
    if change == "devices":
        devices = [FakeDevice()]
    elif change == "more devices":
        devices = [*DEVICES, *DEVICES]
    elif change == "threads":
        threads = 2
    elif change == "version":
        monkeypatch.setattr(machine_rates.metadata, "version", lambda name: "9.9")
    else:
        monkeypatch.setattr(machine_rates, change, lambda: "another")
    with CpuRuntime(num_threads=threads) as other:
        known_rates(other, devices, tmp_path, ["fp8_block"], measure)
    assert len(measure.asked) == 2
    assert len(json.loads((tmp_path / "machine.json").read_text())) == 2  # both are kept


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1]",
        '{"KEY": 7}',
        '{"KEY": {"read_bytes": [1]}}',
        json.dumps({"KEY": RATES.as_json() | {"read_all_bytes": -1}}),
        json.dumps({"KEY": RATES.as_json() | {"read_all_bytes": "much"}}),
        json.dumps({"KEY": RATES.as_json() | {"copy_bytes": []}}),
        json.dumps({"KEY": RATES.as_json() | {"gemm_flops": {"fp8_block": None}}}),
        json.dumps({"KEY": RATES.as_json() | {"copy_bytes": [float("nan")]}}),
    ],
)
def test_what_is_not_ours_is_measured_anew(runtime, tmp_path, text):
    file = tmp_path / "machine.json"
    file.write_text(text.replace("KEY", identity(runtime, DEVICES)))
    assert ask(runtime, tmp_path, None) is None
    measure = Scripted()
    found = ask(runtime, tmp_path, measure)
    assert len(measure.asked) == 1
    assert MachineRates.from_json(json.loads(file.read_text())[found.key]) == found.rates


def test_what_a_busy_machine_says_is_used_and_not_kept(runtime, tmp_path):
    found = ask(runtime, tmp_path, Scripted(share=0.6))
    assert "not kept: other processes had 40% of the CPUs' time" in found.source
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_no_error(runtime, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert ask(runtime, tmp_path / "file", Scripted()).rates.read_all_bytes == 3.8e11
    assert "is not kept" in caplog.text
    assert ask(runtime, None, Scripted()).source.startswith("measured in")


def test_joint_copies_count_where_several_devices_are_fed():
    two = dataclasses.replace(RATES, copy_bytes=(5e10, 4e10), copy_joint_bytes=(3e10, 2.9e10))
    assert [two.copy_rate(n) for n in (1, 2)] == [5e10, 2.9e10]


def test_it_measures(tmp_path):
    """On sizes that say nothing: every figure is there."""
    with CpuRuntime(2, [[0], [0]]) as runtime:
        stages = []
        bench = MachineBench(
            runtime, DEVICES, copy_bytes=1 << 16, least_bytes=1 << 20, on_stage=stages.append
        )
        bench._cold_bytes = 1 << 20  # whatever the caches are
        rates, share = bench(["fp8_block", "int4_g32"])
        assert len(rates.read_bytes) == 2 and 0 < share
        assert sorted(rates.gemm_flops) == sorted(rates.gemv_bytes) == ["fp8_block", "int4_g32"]
        assert MachineRates.from_json(json.loads(json.dumps(rates.as_json()))) == rates
        assert "products in int4_g32" in stages
        ops = NativeOps(runtime, None, "matrix")
        assert device_flops(DEVICES[0], ops, "fp8_block", rows=8, n=128, k=128) > 0


def test_copies_alone_and_together():
    alone, joint = copy_rates([DEVICES[0], DEVICES[0]], 1 << 16)
    assert len(alone) == len(joint) == 2 and min(*alone, *joint) > 0


def test_memory_topology(tmp_path):
    for node, kib in ((0, 527_000_000), (1, 528_000_000), (10, 1 << 20)):
        folder = tmp_path / f"sys/devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{node * 8}-{node * 8 + 7}\n")
        (folder / "meminfo").write_text(f"Node {node} MemTotal:       {kib} kB\nNode 0 MemFree: 5")
    assert memory_topology(tmp_path) == (
        "node0: CPUs 0-7, 503 GiB; node1: CPUs 8-15, 504 GiB; node10: CPUs 80-87, 1 GiB"
    )
    assert memory_topology(tmp_path / "nothing") == ""


def test_the_engine_reads_them_for_its_choice(tmp_path, monkeypatch, caplog):
    """An engine that streams measures once, and says what it goes by; the next one reads it."""
    caplog.set_level("INFO")
    tiny_models.write_checkpoint(tmp_path / "model", "qwen3_moe")
    made = []

    def bench(*args, **options):
        made.append(Scripted())
        return made[-1]

    monkeypatch.setattr(prompt_rates, "MachineBench", bench)
    monkeypatch.setattr(prompt_rates, "LEAST_EXPERT_BYTES", 0)
    options = {
        "prefill": "slp", "device": "cpu", "compute_dtype": "float32", "max_model_len": 96,
        "max_num_seqs": 1, "num_threads": 1, "show_progress": False, "calibrate": True,
        "cache_dir": str(tmp_path / "cache"),
    }  # fmt: skip
    for start in range(2):
        with LLM(str(tmp_path / "model"), **options) as llm:
            assert sum(len(m.asked) for m in made) == 1
            source = "measured in" if start == 0 else " ago, "
            assert source in next(
                line for line in llm.report.splitlines() if line.startswith("machine: ")
            )
            llm.generate([[5] * 40])
    assert "(slp, predicted 0." in caplog.text


def test_the_tools_own_sizes_are_beyond_caches(runtime, monkeypatch):
    monkeypatch.setattr(machine_bench, "last_level_bytes", lambda: 384 << 20)
    assert MachineBench(runtime, DEVICES)._cold_bytes == 768 << 20
