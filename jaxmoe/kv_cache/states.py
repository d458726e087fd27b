"""Recurrent states of prompts' beginnings, kept so that the prefix cache can go on from them.

Pages hold every position's keys and values, but a recurrent state is of one position: a known
beginning can be used up to a position whose state was kept. A state is kept in a slot of the state
arrays behind those of the running sequences; the step that passes the position writes it, and the
first step of a later sequence reads it (`StepInputs.state_saves`, `state_from`). It is found by the
key of the page that ends there (prefix.py), and given up least recently used first.

Which positions: the last page's end within a prompt, where the next turn of a conversation goes on,
and the end of known pages beyond the last kept state, where prompts part (scheduler.py).

What it does not do: touch memory. Pure Python.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class StateCache:
    """Who has which of the slots `first_slot` to `first_slot + count - 1`."""

    def __init__(self, first_slot: int, count: int) -> None:
        self._slots = range(first_slot, first_slot + count)
        self._free = list(self._slots)
        self._slot_of: OrderedDict[bytes, int] = OrderedDict()  # least recently used first
        self._holders: dict[int, int] = {}
        self._pending: set[int] = set()

    def __len__(self) -> int:
        """States that can be found."""
        return len(self._slot_of)

    def __contains__(self, key: bytes) -> bool:
        return key in self._slot_of

    def find(self, keys: Sequence[bytes]) -> tuple[int, int]:
        """How many of a prompt's known pages have a state after them, and its slot; (0, -1) if
        none.
        """
        for i in range(len(keys), 0, -1):
            slot = self._slot_of.get(keys[i - 1])
            if slot is not None:
                self._slot_of.move_to_end(keys[i - 1])
                return i, slot
        return 0, -1

    def hold(self, slot: int) -> None:
        """Keeps a slot as it is until it is released as often."""
        self._holders[slot] = self._holders.get(slot, 0) + 1

    def release(self, slot: int) -> None:
        self._holders[slot] -= 1
        if not self._holders[slot]:
            del self._holders[slot]

    def reserve(self) -> int:
        """A slot that the coming step may write, until `publish` or `forget_reserved`; -1 where
        all are held or reserved.
        """
        if not self._free:
            key = next((k for k, s in self._slot_of.items() if s not in self._holders), None)
            if key is None:
                return -1
            self._free.append(self._slot_of.pop(key))
        slot = self._free.pop()
        self._pending.add(slot)
        return slot

    def publish(self, key: bytes, slot: int) -> None:
        """Makes a reserved slot, now written, known; of equal keys the first one stays."""
        self._pending.remove(slot)
        if key in self._slot_of:
            self._free.append(slot)
        else:
            self._slot_of[key] = slot

    def forget_reserved(self) -> None:
        """Takes back what was reserved for a step that did not take place."""
        self._free += sorted(self._pending)
        self._pending.clear()

    def check(self) -> None:
        """Asserts that every slot is in exactly one state."""
        known = list(self._slot_of.values())
        assert sorted([*self._free, *known, *self._pending]) == list(self._slots)
        assert set(self._holders) <= set(known) and all(n > 0 for n in self._holders.values())
