"""What devices send each other: as the bits it is, and counted from a compiled program's text."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable

import jax
import jax.numpy as jnp

_SHAPE = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_CALL = re.compile(
    r"= (?P<result>\(.*?\)|\S+) "
    r"(?P<kind>all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)"
    r"(?P<start>-start)?\("
)


def send_bits(collective: Callable[[jax.Array], jax.Array], array: jax.Array) -> jax.Array:
    """`collective(array)`, for one that computes nothing. XLA:CPU would send BF16 as float32."""
    if array.dtype != jnp.bfloat16:
        return collective(array)
    bits = collective(jax.lax.bitcast_convert_type(array, jnp.uint16))
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)


def exchanged_bytes(program: str, num_devices: int) -> Counter[str]:
    """Bytes that each device sends to others in one run, by kind of collective.

    program: optimized HLO of `num_devices`, whose collectives are over all of them. Bytes are those
    of the plain algorithms: everything goes to where it is wanted once, sums are passed on in a
    ring. Loops are not counted more than once.
    """
    sent: Counter[str] = Counter()
    others = num_devices - 1
    for call in _CALL.finditer(program):
        total = sum(_result_bytes(call))
        if call["kind"] == "collective-permute":
            sent[call["kind"]] += total
        elif call["kind"] == "reduce-scatter":
            sent[call["kind"]] += others * total
        elif call["kind"] == "all-reduce":
            sent[call["kind"]] += 2 * others * total // num_devices
        else:
            sent[call["kind"]] += others * total // num_devices
    return sent


def count_collectives(program: str) -> Counter[str]:
    """How many of each kind there are."""
    return Counter(call["kind"] for call in _CALL.finditer(program))


def count_arrays(program: str) -> Counter[str]:
    """Arrays that they send, by kind: XLA may send several with one."""
    arrays: Counter[str] = Counter()
    for call in _CALL.finditer(program):
        arrays[call["kind"]] += len(_result_bytes(call))
    return arrays


def _result_bytes(call: re.Match[str]) -> list[int]:
    text = call["result"]
    if call["start"] and call["kind"] != "all-reduce":
        # Operands, results, then words of its own; where there are several, in parentheses.
        operands, text = text.split("), " if text.startswith("((") else ", ", 1)
        return [_num_bytes(*s) for s in _SHAPE.findall(text)][: len(_SHAPE.findall(operands))]
    return [_num_bytes(*shape) for shape in _SHAPE.findall(text)]


def _num_bytes(dtype: str, dims: str) -> int:
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    return math.prod(int(d) for d in dims.split(",") if d) * bits // 8
