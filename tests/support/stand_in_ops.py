"""Operations whose attention and experts are done by stand-ins, so that their order and overlap can
be counted: attention on the thread that runs the program (the device), experts on another one (the
CPU), which takes submitted calls one after the other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.ffi.reference import ReferenceOps


class StandInOps(ReferenceOps):
    """ReferenceOps that tell what happens when.

    on_attention: called for each attention, on the program's thread.
    on_experts: called for each submitted call, on the experts' thread.
    log: "attend", "submit S", "wait S" with S the slot, in the order of the program.
    """

    def __init__(
        self,
        experts: Any,
        on_attention: Callable[[], None] = lambda: None,
        on_experts: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(experts)
        self.log: list[str] = []
        self.num_attended = 0
        self.attended = threading.Condition()
        self.on_attention = on_attention
        self.on_experts = on_experts
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._calls: dict[int, Future[None]] = {}

    def close(self) -> None:
        self._thread.shutdown()

    @property
    def splits_experts(self) -> bool:
        return True

    def experts_submit(self, x, expert_ids, combine_weights, moe_layer_idx, *others, **options):
        slot = options.get("slot", 0)
        y, *others = super().experts_submit(
            x, expert_ids, combine_weights, moe_layer_idx, *others, **options
        )

        def submit(y, *others):
            self.log.append(f"submit {slot}")
            assert slot not in self._calls, "the slot's call was not waited for"
            self._calls[slot] = self._thread.submit(self.on_experts)
            return y, *others

        return tuple(_host(submit, y, *others))

    def experts_wait(self, ticket, num_tokens, hidden, *others, slot=0):
        def wait(ticket, *others):
            self.log.append(f"wait {slot}")
            self._calls.pop(slot).result()
            return ticket, *others

        return tuple(_host(wait, ticket, *others))

    def attend(self, q, *args, **options):
        def attend(q):
            self.log.append("attend")
            with self.attended:
                self.num_attended += 1
                self.attended.notify_all()
            self.on_attention()
            return (q,)

        (q,) = _host(attend, q)
        return super().attend(q, *args, **options)


def _host(function: Callable[..., tuple], *arrays: jax.Array) -> list[jax.Array]:
    """The function on the host, in program order by its operands and results."""
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in map(jnp.asarray, arrays)]
    return jax.pure_callback(
        lambda *values: [np.asarray(v) for v in function(*values)], shapes, *arrays
    )
