"""Microbatches: the bits of a merged step, the order that makes them overlap, and that they do."""

from __future__ import annotations

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import tiny_engine, tiny_models
from support.checkpoints import load_case
from support.native import bits
from support.stand_in_ops import StandInOps

from jaxmoe.decode import dual_batch
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.ffi.native_ops import NativeOps
from jaxmoe.ffi.ops import StepInputs
from jaxmoe.kv_cache import store
from jaxmoe.models.decoder import cache_spec

PAGE_SIZE, PAGES_EACH = 8, 2


def decode_step(num_tokens: int, num_rows: int, position: int, vocab: int) -> StepInputs:
    """One token for each of `num_rows` rows at slightly different positions, the rest padding."""
    rng = np.random.default_rng(position)
    packed = np.full((4, num_tokens), -1, np.int32)
    packed[:2] = 0
    positions = position + np.arange(num_rows) % 3
    tables = np.full((num_tokens, PAGES_EACH), -1, np.int32)
    tables[:num_rows] = np.arange(num_rows * PAGES_EACH).reshape(num_rows, PAGES_EACH)[::-1]
    packed[0, :num_rows] = rng.integers(0, vocab, num_rows)
    packed[1, :num_rows] = positions
    packed[2, :num_rows] = np.arange(num_rows)
    pages = tables[np.arange(num_rows), positions // PAGE_SIZE]
    packed[3, :num_rows] = pages * PAGE_SIZE + positions % PAGE_SIZE
    return StepInputs(*packed, tables)


class Model:
    """A tiny checkpoint on the CPU kernels, and its steps in any number of microbatches."""

    def __init__(self, case: str, directory, **changes):
        tiny_models.write_checkpoint(directory, case)
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | changes))
        self.runtime = CpuRuntime(num_threads=2)
        self.config, self.loaded = load_case(directory, self.runtime, compute_dtype="bfloat16")
        self.ops = NativeOps(self.runtime, self.loaded.host_store, "vector")
        self.step = jax.jit(self._step, static_argnums=3, donate_argnums=2)

    def _step(self, state, step, caches, n):
        model = nnx.merge(self.loaded.graphdef, state)
        indices = jnp.arange(step.token_ids.shape[0])
        if n == 1:
            return model(step, caches, self.ops, indices)
        return dual_batch.forward(model, step, caches, self.ops, indices, n)

    def caches(self, num_rows: int):
        """Filled with random keys and values: whatever came before this step."""
        rng = np.random.default_rng(0)
        shapes = store.allocate(
            cache_spec(self.config, "bfloat16"), num_rows * PAGES_EACH, PAGE_SIZE
        )
        return jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape), a.dtype), shapes)

    def close(self):
        self.step.clear_cache()
        self.loaded.close()
        self.runtime.close()


# Dense layers first and shared experts; biases of experts, windows and sinks.
@pytest.fixture(scope="module", params=["deepseek_v3_fp8", "gpt_oss"])
def model(request, tmp_path_factory):
    model = Model(request.param, tmp_path_factory.mktemp(request.param))
    yield model
    model.close()


TOKENS, ROWS = 4, 3  # one row of padding


def test_the_bits_do_not_depend_on_the_microbatches(model):
    results = {}
    for n in (1, 2, 4):
        caches = model.caches(TOKENS)
        for position in (5, 7):  # the second step reads what the first wrote, over a page's end
            step = decode_step(TOKENS, ROWS, position, model.config.vocab_size)
            logits, caches = model.step(model.loaded.state, step, caches, n)
        results[n] = [np.asarray(logits)[:ROWS], *map(np.asarray, jax.tree.leaves(caches))]
    for n in results:
        for got, want in zip(results[n], results[1], strict=True):
            np.testing.assert_array_equal(bits(got), bits(want), err_msg=f"{n} microbatches")
    assert np.isfinite(results[1][0]).all() and np.abs(results[1][0]).max() > 0


@pytest.mark.slow
def test_what_an_indexer_chose_goes_along_with_its_microbatch(tmp_path):
    """Of contexts of 6 to 10 positions, for its own layer and the one after it."""
    model = Model("glm_moe_dsa_shared", tmp_path, index_topk=4)
    test_the_bits_do_not_depend_on_the_microbatches(model)
    model.close()


def custom_calls(text: str) -> list[str]:
    """The experts' and attention's calls in the order of the compiled program."""
    names = []
    for line in text.splitlines():
        found = re.search(
            r'custom_call_target="jaxmoe_(experts_submit|experts_wait|paged_attention)"', line
        )
        if not found:
            continue
        slot = re.search(r"slot = (\d)", line)
        name = found[1].removeprefix("experts_").removeprefix("paged_")
        names.append(name + (f" {slot[1]}" if slot else ""))
    return names


def test_the_compiled_program_keeps_the_order_and_copies_no_cache(model):
    step = decode_step(TOKENS, ROWS, 5, model.config.vocab_size)
    compiled = model.step.lower(model.loaded.state, step, model.caches(TOKENS), 2).compile()
    text = compiled.as_text()
    assert "is_scheduled=true" in text
    got = custom_calls(text)
    num_dense = sum(t != "moe" for t in model.config.mlp_types)
    layers = model.config.num_layers - num_dense
    want = ["attention"] * num_dense
    for layer in range(layers):
        for slot in (0, 1):
            want += [f"wait {slot}"] * (layer > 0) + ["attention", f"submit {slot}"]
    assert got[: len(want)] == want
    assert sorted(got[len(want) :]) == ["wait 0", "wait 1"]
    # Every cache array is updated in place.
    caches = sum(a.nbytes for a in jax.tree.leaves(model.caches(TOKENS)))
    assert compiled.memory_analysis().alias_size_in_bytes >= caches


def test_shared_experts_lie_between_submit_and_wait(model, monkeypatch):
    """In the merged program too, where the operations want it so, as a GPU's do."""
    monkeypatch.setattr(NativeOps, "splits_experts", True)
    if not model.config.moe.shared_intermediate:
        pytest.skip("this model has none")
    step = decode_step(TOKENS, ROWS, 5, model.config.vocab_size)
    # Traced anew: JAX keeps a function's trace, and the attribute is no argument of it.
    merged = jax.jit(lambda *args: model._step(*args, 1))
    text = merged.lower(model.loaded.state, step, model.caches(TOKENS)).compile().as_text()
    names = re.findall(r'custom_call_target="jaxmoe_(\w+)"', text[text.index("ENTRY") :])
    submits = [i for i, name in enumerate(names) if name == "experts_submit"]
    assert len(submits) == model.config.mlp_types.count("moe")
    for i in submits:
        # gate, up and down of the shared experts
        assert names[i + 1 : i + 5] == ["linear", "linear", "linear", "experts_wait"]


def test_steps_that_cannot_be_split_are_refused(model):
    step = decode_step(4, 4, 5, model.config.vocab_size)
    with pytest.raises(ValueError, match="3 microbatches of 4 tokens and 4 rows"):
        model.step.lower(model.loaded.state, step, model.caches(4), 3)


NUM_LAYERS = 2


@pytest.fixture(scope="module")
def stand_in():
    """Operations that log their order, and steps of a tiny model on them."""
    tiny = tiny_engine.model(tiny_engine.config(num_hidden_layers=NUM_LAYERS))
    ops = StandInOps(tiny.ops._experts)

    def step(state, step, caches, n):
        model = nnx.merge(tiny.graphdef, state)
        if n == 1:
            return model(step, caches, ops, jnp.arange(TOKENS))
        return dual_batch.forward(model, step, caches, ops, jnp.arange(TOKENS), n)

    options = {"xla_backend_optimization_level": 0}
    step = jax.jit(step, static_argnums=3, compiler_options=options)

    def run(n: int):
        caches = store.allocate(cache_spec(tiny.config, "float32"), TOKENS * PAGES_EACH, PAGE_SIZE)
        inputs = decode_step(TOKENS, ROWS, 5, tiny.config.vocab_size)
        return np.asarray(step(tiny.state, inputs, caches, n)[0])[:ROWS]

    yield ops, run
    ops.close()


def test_every_call_but_the_last_overlaps_the_other_microbatchs_attention(stand_in):
    """The experts' thread ends a call only when another attention has begun since its submit."""
    ops, run = stand_in
    overlapped = []

    def experts():
        # Call k, counted from 1, is submitted after attention k; the other microbatch's is k + 1.
        k = len(overlapped) + 1
        if k == 2 * NUM_LAYERS:  # nothing comes after it
            return
        with ops.attended:
            overlapped.append(ops.attended.wait_for(lambda: ops.num_attended > k, timeout=60))

    ops.on_experts = experts
    run(2)
    ops.on_experts = lambda: None
    assert overlapped == [True] * (2 * NUM_LAYERS - 1)
    first = ["attend", "submit 0", "attend", "submit 1"]
    following = ["wait 0", "attend", "submit 0", "wait 1", "attend", "submit 1"]
    order = first + following * (NUM_LAYERS - 1)
    assert ops.log[: len(order)] == order and sorted(ops.log[len(order) :]) == ["wait 0", "wait 1"]


def test_a_merged_step_of_the_same_operations_overlaps_no_attention(stand_in):
    ops, run = stand_in
    ops.log.clear()
    merged = run(1)
    assert ops.log == ["attend"] * NUM_LAYERS  # without shared experts the call is in one piece
    np.testing.assert_allclose(run(2), merged, rtol=1e-5, atol=1e-5)
