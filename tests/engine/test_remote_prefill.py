"""The prefill worker in another process: its layers arrive, dropped prompts leave nothing behind,
failures are one prompt's, and a process that dies is followed by another one.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from support import prefill_child
from support.prefill_child import LAYERS, OWN_PAGES, SIZE, SPEC

from jaxmoe.common.errors import CapacityError
from jaxmoe.config.engine_config import EngineConfig
from jaxmoe.decode.batch import StepRow
from jaxmoe.engine import remote_prefill
from jaxmoe.engine.remote_prefill import RemotePrefill
from jaxmoe.kv_cache import store
from jaxmoe.kv_cache.shared_pages import SharedPages

CPU = jax.local_devices(backend="cpu")[0]
CONFIG = EngineConfig(page_size=SIZE, disaggregate="process")


class Made:
    """A worker, the decode caches, and what it said of itself."""

    def __init__(self, folder: Path, store_name: str = "/mine", wanted: str = "/mine"):
        self.decode = store.allocate(SPEC, 16, SIZE)
        self.starts = folder / "starts"
        command = [sys.executable, prefill_child.__file__, store_name, str(self.starts)]
        pages = SharedPages.create(SPEC, OWN_PAGES, SIZE)
        caches = lambda: self.decode  # noqa: E731
        self.worker = RemotePrefill(CONFIG, 1, pages, caches, CPU, wanted, command=command)
        self.usable: list[bool] = []
        self.worker.on_usable = self.usable.append

    @property
    def num_starts(self) -> int:
        return self.starts.read_text().count("x")

    def compute(self, tokens, pages, start=0):
        self.worker.begin(row(tokens, pages, start))
        return self.finish()

    def finish(self):
        fractions = []
        while not fractions or fractions[-1] < 1:
            self.worker.wait(60.0)
            fractions.append(self.worker.poll())
        assert fractions == sorted(fractions)
        return fractions

    def held(self, layer, pages):
        return np.asarray(self.decode[layer][1])[list(pages)].reshape(-1, 2)[:, 0].tolist()

    def until_usable(self):
        end = time.monotonic() + 60
        while self.usable[-1:] != [True]:
            assert time.monotonic() < end
            time.sleep(0.005)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    made = Made(tmp_path_factory.mktemp("prefill"))
    yield made
    made.worker.close()


def row(tokens, pages, start=0):
    return StepRow(list(tokens), start, pages, 0, settings=None)


def test_layers_are_put_into_their_pages_and_nothing_else_is(made):
    before = made.worker.handed_over
    made.compute(range(1, 11), [9, 2, 11])
    assert made.worker.handed_over == before + LAYERS
    for layer in range(LAYERS):
        want = [1000.0 * layer + t for t in range(1, 11)]
        assert made.held(layer, [9, 2, 11])[:10] == want
        assert not any(made.held(layer, [0, 1, 3, 8, 10, 12]))


def test_a_prompt_goes_on_from_pages_that_are_known(made):
    pages = [5, 3, 6, 4]
    made.compute(range(21, 27), pages)  # a page and a half
    made.compute(range(31, 37), [7, 13])  # another sequence in between
    made.compute(range(27, 34), pages, start=6)
    for layer in range(LAYERS):
        assert made.held(layer, pages)[:13] == [1000.0 * layer + t for t in range(21, 34)]


def test_a_dropped_prompt_leaves_the_pages_alone_and_the_next_one_is_computed(made):
    before = [made.held(layer, [1, 15]) for layer in range(LAYERS)]
    made.worker.begin(row([prefill_child.IS_SLOW, 2, 3, 4, 5], [1, 15]))
    made.worker.wait(60.0)
    made.worker.stop()
    made.compute([11, 12], [14])
    assert [made.held(layer, [1, 15]) for layer in range(LAYERS)] == before
    assert made.held(5, [14])[:2] == [5011.0, 5012.0]
    assert made.num_starts == 1


def test_a_failure_is_that_prompts_alone(made):
    with pytest.raises(ValueError, match="copy 7 failed"):
        made.compute([prefill_child.FAILS, 2], [1])
    made.compute([21, 22], [14])
    assert made.held(5, [14])[:2] == [5021.0, 5022.0] and made.worker.usable
    assert made.num_starts == 1


def test_waiting_ends_when_it_is_woken(made):
    begin = time.monotonic()
    made.worker.begin(row([prefill_child.IS_SLOW], [1]))
    made.worker.wake()
    made.worker.wait(60.0)
    assert time.monotonic() - begin < 30
    made.finish()


@pytest.mark.slow  # the whole engine's is not: tests/engine/test_disaggregated.py
def test_one_that_dies_or_is_wrong_is_followed_by_another_until_it_is_too_much(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(remote_prefill, "MAX_RESTARTS", 2)
    made = Made(tmp_path)
    for how, words in (
        (prefill_child.DIES, "ended with code -9"),
        (prefill_child.IS_OUT_OF_ORDER, "layer 5 came, wanted"),
        (prefill_child.IS_WRONG, "layer 2 are not those that were"),
    ):
        made.usable.clear()
        with pytest.raises(ValueError, match=words):
            made.compute([how, 2], [1])
        if how != prefill_child.IS_WRONG:
            made.until_usable()
            made.compute([31, 32], [14])
            assert made.held(5, [14])[:2] == [5031.0, 5032.0]
    with pytest.raises(ValueError, match="there is no prefill process"):
        while True:  # what comes just before that is known waits for it
            made.compute([1], [1])
    assert made.usable == [False] and made.num_starts == 3
    made.worker.close()


def test_a_start_that_fails_says_why(tmp_path):
    (tmp_path / "starts").write_text("fail")
    with pytest.raises(CapacityError, match="ended with code 7"):
        Made(tmp_path)
    (tmp_path / "starts").write_text("")
    with pytest.raises(CapacityError, match="has its experts in /other memory, wanted /mine"):
        Made(tmp_path, store_name="/other")
