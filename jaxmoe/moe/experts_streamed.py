"""Routed experts whose weights pass through a ring of slots on the device (paper section 3.1).

Each slot holds a group of consecutive experts of one layer. The group is computed between the
slot's acquire, which waits until its weights have arrived, and its release, which gives it back to
the loader. Which experts the tokens chose never decides what is loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxmoe.config.model_config import ClampedSwiglu
from jaxmoe.ffi import experts as experts_op
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.ffi.linear import Family
from jaxmoe.kernels.experts import ExpertGroup


class Ring(Protocol):
    """The events of a ring inside a compiled program: `*arrays` come back in the same buffers, so
    that what uses them afterwards waits.
    """

    def acquire(self, slot: int, *arrays: jax.Array) -> tuple[jax.Array, ...]: ...
    def release(self, slot: int, *arrays: jax.Array) -> tuple[jax.Array, ...]: ...


class GroupExperts(Protocol):
    """How a group's experts are computed: `kernels.experts.DeviceGroups` on a GPU, `NativeGroups`
    on the CPU platform.
    """

    def route(self, expert_ids: jax.Array, combine_weights: jax.Array, num_experts: int) -> Any:
        """What `add` wants to know about `expert_ids` and `combine_weights`, `[T, A]`."""
        ...

    def add(
        self,
        y: jax.Array,
        x: jax.Array,
        routing: Any,
        group: ExpertGroup,
        first_expert: int,
        *,
        activation: ClampedSwiglu | None = None,
        biases: tuple[jax.Array, jax.Array] | None = None,
    ) -> jax.Array:
        """`y [T, D]` float32 plus the shares of the group's experts, from `first_expert` on."""
        ...


@dataclasses.dataclass(frozen=True)
class NativeGroups:
    """By the CPU kernels."""

    runtime: CpuRuntime
    family: Family = "matrix"

    def route(
        self, expert_ids: jax.Array, combine_weights: jax.Array, num_experts: int
    ) -> tuple[jax.Array, jax.Array]:
        return expert_ids, combine_weights

    def add(
        self,
        y: jax.Array,
        x: jax.Array,
        routing: tuple[jax.Array, jax.Array],
        group: ExpertGroup,
        first_expert: int,
        *,
        activation: ClampedSwiglu | None = None,
        biases: tuple[jax.Array, jax.Array] | None = None,
    ) -> jax.Array:
        return experts_op.experts_group(
            self.runtime,
            self.family,
            y,
            x,
            *routing,
            group.arrays,
            first_expert,
            activation=activation,
            biases=biases,
        )


class NoRing:
    """For weights that are there already."""

    def acquire(self, slot: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        return arrays

    release = acquire


class StreamedExperts:
    """`kernels.device_ops.Experts` of one traced program.

    slots: the ring's arrays, operands of the program; group g of a layer lies in slot g modulo
        their number.
    num_experts: of a layer, a multiple of a slot's.
    groups: how they are computed.
    """

    def __init__(
        self,
        slots: Sequence[ExpertGroup],
        num_experts: int,
        groups: GroupExperts,
        ring: Ring | None = None,
    ):
        self._slots = slots
        self._ring = ring or NoRing()
        self._num_experts = num_experts
        self._per_slot = slots[0].gate.shape[0]
        self._groups = groups
        assert num_experts % self._per_slot == 0, (num_experts, self._per_slot)

    def __call__(
        self,
        x: jax.Array,
        expert_ids: jax.Array,
        combine_weights: jax.Array,
        moe_layer_idx: int,
        *,
        activation: ClampedSwiglu | None = None,
        biases: tuple[jax.Array, jax.Array] | None = None,
    ) -> jax.Array:
        y = jnp.zeros(x.shape, jnp.float32)
        y, _ = self.add_to(y, x, expert_ids, combine_weights, activation=activation, biases=biases)
        return y

    def add_to(
        self,
        y: jax.Array,
        x: jax.Array,
        expert_ids: jax.Array,
        combine_weights: jax.Array,
        *,
        activation: ClampedSwiglu | None = None,
        biases: tuple[jax.Array, jax.Array] | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """`y [T, D]` float32 plus the experts' results; and x, which passed through the events."""
        routing = self._groups.route(expert_ids, combine_weights, self._num_experts)
        for g, first in enumerate(range(0, self._num_experts, self._per_slot)):
            slot = g % len(self._slots)
            part = slice(first, first + self._per_slot)
            # Both pass through both events: no product may move before its weights have arrived,
            # nor past their release.
            x, y = self._ring.acquire(slot, x, y)
            y = self._groups.add(
                y,
                x,
                routing,
                self._slots[slot],
                first,
                activation=activation,
                biases=None if biases is None else (biases[0][part], biases[1][part]),
            )
            x, y = self._ring.release(slot, x, y)
        return y, x
