"""The host arrays of a packed step: which tokens of which rows, at which positions, written where.

Shapes come from a short list of sizes, so that few programs are ever compiled: a decode has as
many tokens as rows, rounded up to a power of two; a prefill has one of a few
counts of tokens and of rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

from jaxmoe.ffi.ops import StepInputs
from jaxmoe.sampling.inputs import RowSettings

Kind: TypeAlias = Literal["prefill", "decode"]
Shape: TypeAlias = tuple[Kind, int, int]  # kind, tokens and rows of a step
# What a step does beside its kind: draws among what a grammar allows; adds biases or penalties; or
# computes a prompt's own log probabilities. Each makes another program.
Extra: TypeAlias = Literal["", "masks", "biases", "targets"]
Prepared: TypeAlias = tuple[Kind, int, int, Extra]
LOGITS_CHUNK_TOKENS = 64  # [T, V] float32 at V = 150,000 is 38 MB
PREFILL_ROWS = (1, 8, 64)  # and max_num_seqs
PREFILL_SIZES = (16, 64, 256)  # and prefill_chunk_tokens; four times more is four times the work


@dataclasses.dataclass(frozen=True)
class StepRow:
    """One sequence's part of a step.

    token_ids: the tokens fed, from position `start`. pages: ids of the pages the sequence holds.
    slot: its row in per-sequence state. settings: how its next token is drawn; biases: see
    `sampling.inputs.pack_biases`, None where the row's logits are not adjusted. mask: bits of the
    tokens that may be drawn, `[ceil(V / 32)]` uint32, None where all may. targets: the prompt
    tokens that follow those fed, where their log probabilities are wanted; the row is then the
    step's only one. guesses: of the tokens after those fed, in a decode: they are fed as well, each
    in a row of its own (decode/drafting.py). following: the token after those fed, where it is
    known and not drawn, else -1. state_from: the slot that its recurrent state is read from, -1:
    its own. saves: (i, slot): where the state after token i of those fed is kept too.
    """

    token_ids: Sequence[int]
    start: int
    pages: Sequence[int]
    slot: int
    settings: RowSettings
    biases: dict[int, float] | None = None
    mask: np.ndarray | None = None
    targets: Sequence[int] | None = None
    guesses: Sequence[int] = ()
    following: int = -1
    state_from: int = -1
    saves: Sequence[tuple[int, int]] = ()


def decode_size(num_rows: int) -> int:
    """Tokens and rows of a decode of `num_rows`."""
    return 1 << (num_rows - 1).bit_length()


def prefill_size(num_tokens: int, num_rows: int, *, chunk: int, max_rows: int) -> tuple[int, int]:
    """Tokens and rows of a prefill."""
    sizes = [s for s in PREFILL_SIZES if s < chunk] + [chunk]
    tokens = next(s for s in sizes if s >= num_tokens)
    rows = next((r for r in PREFILL_ROWS if r >= num_rows), max_rows)
    return tokens, min(rows, decode_size(max_rows))


def step_shapes(max_num_seqs: int, chunk: int, most_guesses: int = 0) -> list[Shape]:
    """Every (kind, tokens, rows) that steps can have: one compiled program each.

    most_guesses: of a sequence that a decode verifies.
    """
    sizes = range(1, max_num_seqs + 1)
    decoded = range(1, max_num_seqs * (1 + most_guesses) + 1)
    decode: set[Shape] = {("decode", decode_size(n), decode_size(n)) for n in decoded}
    prefill: set[Shape] = set()
    for tokens in [s for s in PREFILL_SIZES if s < chunk] + [chunk]:
        for rows in sizes[:tokens]:  # each with a token at least
            sized = prefill_size(tokens, rows, chunk=chunk, max_rows=max_num_seqs)
            prefill.add(("prefill", *sized))
    return [*sorted(decode), *sorted(prefill)]


def likely_first(shapes: Sequence[Shape]) -> list[Shape]:
    """The shapes in the order in which requests are likely to need them: what one user needs comes
    before what several do, a long prompt's chunk before a token before what is left of a prompt.
    """
    longest = max(tokens for _, tokens, _ in shapes)

    def order(shape: Shape) -> tuple[int, int, int]:
        kind, tokens, rows = shape
        return rows, 1 if kind == "decode" else 2 * (tokens < longest), -tokens

    return sorted(shapes, key=order)


def compiled_ahead(shapes: Sequence[Shape], chunk: int) -> list[Prepared]:
    """All plain programs as `likely_first` has them, then those that one request alone needs which
    is masked, biased or scored. Several such at once are rare, and would make three times as many.
    """
    order = likely_first(shapes)
    alone = [shape for shape in order if shape[2] == 1]
    masked: list[Prepared] = [(*shape, "masks") for shape in alone]
    biased: list[Prepared] = [(*shape, "biases") for shape in alone]
    scored: Prepared = "prefill", min(LOGITS_CHUNK_TOKENS, chunk), 1, "targets"
    return [*((*shape, "") for shape in order), *masked, *biased, scored]


def with_guesses(rows: Sequence[StepRow]) -> list[StepRow]:
    """Rows of a decode and, after each, one for each of its guesses."""
    out: list[StepRow] = []
    for row in rows:
        for i, token in enumerate((*row.token_ids, *row.guesses)):
            settings = dataclasses.replace(
                row.settings, logit_index=len(out), token_idx=row.settings.token_idx + i
            )
            start = row.start + i
            out.append(dataclasses.replace(row, token_ids=(token,), start=start, settings=settings))
    return out


def pack_drafts(
    rows: Sequence[StepRow], num_tokens: int, num_rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """`following [num_tokens]` and `guesses [num_rows]` of `drafting.DraftInputs`, of rows as they
    came: before `with_guesses`.
    """
    following = np.full(num_tokens, -1, np.int32)
    guesses = np.full(num_rows, -1, np.int32)
    token = at = 0
    for row in rows:
        count = len(row.token_ids)
        following[token : token + count] = [*row.token_ids[1:], row.following]
        guesses[at : at + len(row.guesses)] = row.guesses
        token += count + len(row.guesses)
        at += 1 + len(row.guesses)
    return following, guesses


class BlockTables:
    """Every slot's page ids `[num_slots, MP]`, -1 where unused; only what is new is written."""

    def __init__(self, num_slots: int, pages_per_sequence: int) -> None:
        self._tables = np.full((num_slots, pages_per_sequence), -1, np.int32)
        self._filled = [0] * num_slots

    @property
    def pages_per_sequence(self) -> int:
        return self._tables.shape[1]

    def assign(self, slot: int) -> None:
        """Empties a slot for its next owner."""
        self._tables[slot] = -1
        self._filled[slot] = 0

    def update(self, slot: int, pages: Sequence[int]) -> np.ndarray:
        """The slot's table after its sequence took more pages."""
        filled, table = self._filled[slot], self._tables[slot]
        if filled != len(pages):
            table[filled : len(pages)] = pages[filled:]
            self._filled[slot] = len(pages)
        return table


def pack_step(
    rows: Sequence[StepRow],
    tables: BlockTables,
    num_tokens: int,
    num_rows: int,
    page_size: int,
    *,
    has_states: bool = False,
) -> StepInputs:
    """Numpy inputs of a step, padded to `num_tokens` and `num_rows`; with the slots of recurrent
    states, where the model has them.
    """
    packed = np.zeros((4, num_tokens), np.int32)
    token_ids, positions, token_rows, kv_slots = packed
    token_rows[:] = kv_slots[:] = -1
    block_tables = np.full(
        (num_rows, tables.update(rows[0].slot, rows[0].pages).size), -1, np.int32
    )
    state_from = np.full(num_rows, -1, np.int32)
    state_to, state_saves = state_from.copy(), np.full(num_tokens, -1, np.int32)
    at = 0
    for i, row in enumerate(rows):
        table = tables.update(row.slot, row.pages)
        block_tables[i] = table
        count = len(row.token_ids)
        span = slice(at, at + count)
        where = np.arange(row.start, row.start + count, dtype=np.int32)
        token_ids[span] = row.token_ids
        positions[span] = where
        token_rows[span] = i
        kv_slots[span] = table[where // page_size] * page_size + where % page_size
        state_to[i] = row.slot
        state_from[i] = row.slot if row.state_from < 0 else row.state_from
        for token, slot in row.saves:
            state_saves[at + token] = slot
        at += count
    states: Any = (state_from, state_to, state_saves) if has_states else (None, None, None)
    return StepInputs(token_ids, positions, token_rows, kv_slots, block_tables, *states)  # pyright: ignore


def pack_masks(rows: Sequence[StepRow], num_rows: int, vocab_size: int) -> np.ndarray | None:
    """`[num_rows, ceil(V / 32)]` uint32, all ones for rows without a mask; None where no row has
    one.
    """
    if all(row.mask is None for row in rows):
        return None
    masks = np.full((num_rows, -(-vocab_size // 32)), 0xFFFFFFFF, np.uint32)
    for i, row in enumerate(rows):
        if row.mask is not None:
            masks[i] = row.mask
    return masks
