"""The prefill worker's order of things: layers go over while later ones are computed, dropped
prompts leave nothing behind, failures are one prompt's. The programs are a stand-in that fills
layer i of position p of token t with 1000 i + t.
"""

from __future__ import annotations

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.decode.batch import StepRow
from jaxmoe.engine.prefill_worker import PrefillWorker

CPU = jax.local_devices(backend="cpu")[0]
LAYERS, SIZE, PAGES = 6, 4, 16


def arrays(num_pages):
    return [
        tuple(jax.device_put(jnp.zeros((num_pages, SIZE, 1, 2)), CPU) for _ in range(2))
        for _ in range(LAYERS)
    ]


class Programs:
    """gate: acquired before every layer, to hold the worker up."""

    max_tokens, num_layers = 100, LAYERS

    def __init__(self):
        self.gate = threading.Semaphore(10**6)
        self.fail_at = -1
        self.done = self.ended = 0
        self.seen_beginning = None
        self.closed = False

    def layers(self, row, caches):
        try:
            self.seen_beginning = np.asarray(caches()[0][0]).reshape(-1, 2)[: row.start, 0].tolist()
            for layer in range(LAYERS):
                self.gate.acquire()
                if layer == self.fail_at:
                    raise ValueError("copy 7 failed")
                at = np.arange(row.start, row.start + len(row.token_ids))
                pages = np.asarray(row.pages)[at // SIZE]
                values = 1000.0 * layer + jnp.asarray(row.token_ids)[:, None, None]
                caches()[layer] = tuple(a.at[pages, at % SIZE].set(values) for a in caches()[layer])
                self.done += 1
                yield layer + 1
        finally:
            self.ended += 1

    def close(self):
        self.closed = True


@pytest.fixture
def made():
    decode, programs = arrays(PAGES), Programs()
    worker = PrefillWorker(
        programs, arrays(8), lambda: decode, CPU, CPU, page_size=SIZE, layers_ahead=1
    )
    yield worker, programs, decode
    programs.gate.release(100)
    worker.close()
    assert programs.closed and programs.ended > 0


def row(tokens, pages, start=0):
    return StepRow(tokens, start, pages, 0, settings=None)


def finish(worker):
    fractions = []
    while not fractions or fractions[-1] < 1:
        worker.wait(60.0)
        fractions.append(worker.poll())
    assert fractions == sorted(fractions)
    return fractions


def held(decode, layer, pages):
    return np.asarray(decode[layer][1])[list(pages)].reshape(-1, 2)[:, 0].tolist()


def test_layers_are_there_before_the_prompt_is_computed(made):
    worker, programs, decode = made
    pages = [9, 2, 11]
    worker.begin(row(range(1, 11), pages))
    finish(worker)
    for layer in range(LAYERS):
        got = held(decode, layer, pages)
        assert got[:10] == [1000 * layer + t for t in range(1, 11)]
        others = [p for p in range(PAGES) if p not in pages]
        assert set(held(decode, layer, others)) == {0.0}
    assert worker.handed_over == LAYERS


def test_a_worker_waits_for_an_engine_that_takes_nothing_in(made):
    worker, programs, decode = made
    worker.begin(row([1, 2], [3]))
    worker.wait(60.0)  # one layer is there: one on its way, and one that is computed, are behind it
    assert programs.done < LAYERS
    fraction = worker.poll()
    assert 0 < fraction < 1 and held(decode, 0, [3])[:2] == [1, 2]
    finish(worker)


def test_a_prompt_goes_on_from_pages_that_are_known(made):
    worker, programs, decode = made
    pages = [5, 7, 1]
    worker.begin(row([1, 2, 3, 4, 5], pages))
    finish(worker)
    worker.begin(row([9], [0]))  # the worker's own pages are another's meanwhile
    finish(worker)
    worker.begin(row([6, 7, 8, 9, 10], pages, start=5))
    finish(worker)
    assert programs.seen_beginning == [1, 2, 3, 4, 5]
    for layer in range(LAYERS):
        assert held(decode, layer, pages)[:10] == [1000 * layer + t for t in range(1, 11)]


def test_a_dropped_prompt_leaves_the_pages_alone(made):
    worker, programs, decode = made
    programs.gate = threading.Semaphore(2)
    worker.begin(row([1, 2], [3]))
    worker.wait(60.0)
    worker.stop()
    programs.gate.release(100)
    worker.begin(row([7], [4]))
    finish(worker)
    assert {x for layer in range(LAYERS) for x in held(decode, layer, [3])} == {0.0}
    assert held(decode, 2, [4])[0] == 2007 and programs.ended == 2


def test_a_failure_is_that_prompts_alone(made):
    worker, programs, decode = made
    programs.fail_at = 3
    worker.begin(row([1, 2], [3]))
    with pytest.raises(ValueError, match="copy 7 failed"):
        finish(worker)
    programs.fail_at = -1
    worker.begin(row([1, 2], [3]))
    finish(worker)
    assert worker.usable and held(decode, 5, [3])[:2] == [5001, 5002]


def test_waiting_ends_when_it_is_woken(made):
    worker, programs, _ = made
    programs.gate = threading.Semaphore(0)
    worker.begin(row([1], [3]))
    threading.Timer(0.01, worker.wake).start()
    worker.wait(60.0)
    programs.gate.release(100)
    finish(worker)
