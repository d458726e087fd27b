"""The ceiling of reading: how large a buffer it takes, and the share of it that figures show."""

import pytest

from jaxmoe.engine import read_ceiling
from jaxmoe.engine.stats import Stats
from jaxmoe.scheduler.scheduler import StepPlan
from jaxmoe.weights import memory


class Runtime:
    def read_bandwidth(self, total_bytes, repeats):
        self.asked = total_bytes
        return [3.0, 5.0, 4.0][:repeats]


@pytest.mark.parametrize(
    "cache,free,asked", [(0, 2**40, 2**28), (2**28, 2**40, 2**30), (2**34, 2**40, 2**32)]
)
def test_the_buffer_is_beyond_the_caches(cache, free, asked, monkeypatch):
    monkeypatch.setattr(read_ceiling, "last_level_bytes", lambda: cache)
    monkeypatch.setattr(memory, "available_bytes", lambda: free)
    runtime = Runtime()
    assert read_ceiling.measure(runtime) == 5.0 and runtime.asked == asked


def test_it_takes_no_memory_that_is_short(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 2**29)
    assert read_ceiling.measure(Runtime()) == 0.0


def test_caches_are_counted_once(tmp_path):
    for cpu, shared in ((0, "0-1"), (1, "0-1"), (2, "2-3")):
        folder = tmp_path / f"cpu{cpu}" / "cache" / "index3"
        folder.mkdir(parents=True)
        (folder / "shared_cpu_list").write_text(shared + "\n")
        (folder / "size").write_text("32768K\n")
    assert read_ceiling.last_level_bytes(tmp_path) == 2 * 32768 * 1024
    assert read_ceiling.last_level_bytes(tmp_path / "nothing") == 0


class Nothing:
    running = waiting = ()
    num_pages = num_free = num_idle = 0


def test_the_share_is_of_the_last_decode_step():
    stats = Stats()
    step = StepPlan("decode", ())
    stats.note_step(step, 1.0, {"linear_weight_bytes": 700}, compiled=False)
    counted = {"linear_weight_bytes": 1000, "attention_kv_bytes": 100}
    stats.note_step(step, 2.0, counted, compiled=False)
    found = stats.snapshot(Nothing(), Nothing(), None)
    assert found["dram_fraction_of_ceiling"] == 0.0
    stats.read_ceiling = 1000.0
    found = stats.snapshot(Nothing(), Nothing(), None)
    assert found["dram_fraction_of_ceiling"] == pytest.approx((300 + 100) / 2.0 / 1000)
    assert found["decode_bytes_read_total"] == 1100
