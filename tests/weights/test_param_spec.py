"""Describing a model allocates nothing, and filling a description accepts only what it says."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxmoe.weights.param_spec import ParamSpec, describe, new_param, num_blocks


class Pair(nnx.Module):
    def __init__(self, size: int):
        self.items = nnx.List([Leaf(size), Leaf(2)])


class Leaf(nnx.Module):
    def __init__(self, size: int):
        self.weight = new_param(ParamSpec((size,), "float32", "norm"))


def test_num_blocks():
    assert [num_blocks(n) for n in (1, 128, 129, 576)] == [1, 1, 2, 5]


def test_describe_lists_leaves_without_memory():
    described = describe(lambda: Pair(1 << 50))  # a petabyte, were it allocated
    assert list(described.specs) == ["items.0.weight", "items.1.weight"]
    assert described.specs["items.0.weight"].shape == (1 << 50,)


def test_fill():
    described = describe(lambda: Pair(3))
    leaves = {"items.0.weight": jnp.arange(3.0), "items.1.weight": jnp.ones(2)}
    state = described.fill(leaves)
    assert [leaf.shape for leaf in jax.tree.leaves(state)] == [(3,), (2,)]
    model = nnx.merge(described.graphdef, state)
    assert model.items[0].weight[...].tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    "change",
    [
        {"items.1.weight": jnp.ones(3)},
        {"items.1.weight": jnp.ones(2, jnp.bfloat16)},
        {"items.2.weight": jnp.ones(2)},
    ],
)
def test_fill_refuses_other_leaves(change: dict[str, jax.Array]):
    described = describe(lambda: Pair(3))
    leaves = {"items.0.weight": jnp.arange(3.0), "items.1.weight": jnp.ones(2)} | change
    with pytest.raises(AssertionError):
        described.fill(leaves)
