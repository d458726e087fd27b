"""What loading gives: the filled module tree, the experts' store, and an account of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from jaxmoe.weights.host_store import HostStore
from jaxmoe.weights.memory import gib
from jaxmoe.weights.param_spec import ParamSpec


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What was done, for the start-up report.

    read_bytes: bytes taken from the checkpoint's files (0 for random weights).
    planned_bytes: memory the plan said it would take.
    peak_rss_bytes: the most resident memory the process has had up to the end of loading.
    found_bytes: what an earlier process had loaded into shared memory.
    shared_name: of the shared memory that holds the experts. notes: what is not as it could be.
    """

    source: str
    backing: str
    num_tensors: int
    ignored: tuple[str, ...]
    leaf_bytes: int
    expert_bytes: int
    read_bytes: int
    seconds: float
    planned_bytes: int
    peak_rss_bytes: int
    found_bytes: int = 0
    shared_name: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def bytes_per_s(self) -> float:
        return self.read_bytes / max(self.seconds, 1e-9)

    @property
    def place(self) -> str:
        if self.shared_name is not None:
            return f"{self.backing} in shared memory {self.shared_name}"
        return self.backing

    def describe(self) -> str:
        """A few lines for people."""
        lines = [
            f"weights: {self.source}: {self.num_tensors} tensors, experts {gib(self.expert_bytes)} "
            f"({self.place}), the rest {gib(self.leaf_bytes)}"
        ]
        if self.read_bytes:
            lines.append(
                f"loaded {gib(self.read_bytes)} in {self.seconds:.1f} s "
                f"({self.bytes_per_s / 1e9:.2f} GB/s)"
            )
        else:
            lines.append(f"made in {self.seconds:.1f} s")
        lines[-1] += (
            f"; memory planned {gib(self.planned_bytes)}, peak {gib(self.peak_rss_bytes)} resident"
        )
        if self.found_bytes:
            lines.append(f"{gib(self.found_bytes)} of experts were in shared memory already")
        if self.ignored:
            lines.append(
                f"{len(self.ignored)} tensors not needed and not read, such as {self.ignored[0]}"
            )
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """Weights in place.

    graphdef, state: `nnx.merge(graphdef, state)` is the model; its arrays alias the loader's
    buffers.
    specs: every leaf's description, by dotted path.
    host_store: the routed experts; None for a model that has none.
    """

    graphdef: Any
    state: nnx.State
    specs: Mapping[str, ParamSpec]
    host_store: HostStore | None
    report: LoadReport

    @property
    def leaves(self) -> list[jax.Array]:
        """The module tree's arrays, in the order `jax.tree.flatten(state)` gives."""
        return jax.tree.leaves(self.state)

    def close(self) -> None:
        """Gives the experts' memory back. Programs that use the store must be gone."""
        if self.host_store is not None:
            self.host_store.close()
