"""The compiled step: all layers, the head and the draw in one program, the caches donated.

The same program text serves prompt chunks and decode; what differs is the number of packed tokens
and the kernels the operations choose ("matrix" for prefill, "vector" for decode). The choice is
fixed for a program, so a token's arithmetic never depends on what else is in the batch. The model
is split into flat leaves once; a call hands them to a compiled program, which costs about a
microsecond a leaf. What it does not do: decide what takes part (scheduler), or know texts.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmoe.decode import drafting, dual_batch
from jaxmoe.decode.batch import (
    LOGITS_CHUNK_TOKENS,
    BlockTables,
    Extra,
    Kind,
    StepRow,
    decode_size,
    pack_drafts,
    pack_masks,
    pack_step,
    prefill_size,
    with_guesses,
)
from jaxmoe.decode.drafting import DraftInputs
from jaxmoe.decode.programs import Programs
from jaxmoe.ffi.device_driver import Device
from jaxmoe.ffi.ops import Ops, StepInputs
from jaxmoe.request import TokenLogprob
from jaxmoe.sampling.inputs import Biases, RowInputs, RowSettings, pack_biases, pack_rows
from jaxmoe.sampling.logits import (
    TokenCounts,
    adjust,
    apply_masks,
    clear_slot,
    count_prompt,
    count_tokens,
)
from jaxmoe.sampling.sampler import Drawn, PromptLogprobs, prompt_logprobs, sample
from jaxmoe.sampling_params import SamplingParams

COUNT_CHUNK_TOKENS = 1024  # of a cached prompt, in one call


@dataclasses.dataclass(frozen=True)
class RowResult:
    """What a step drew for one row: -1 where its logits were not finite. The rest only
    where asked for; prompt_logprobs: of the row's targets. more: what was drawn after those of the
    row's guesses that were right, one for each. guesses: of the tokens after all of these.
    """

    token_id: int
    logprob: float
    top_ids: Sequence[int]
    top_logprobs: Sequence[float]
    prompt_logprobs: Sequence[TokenLogprob] | None = None
    more: Sequence[RowResult] = ()
    guesses: Sequence[int] = ()


class _Inputs(NamedTuple):
    """Of a step, beside weights and caches."""

    counts: TokenCounts | None
    step: StepInputs
    settings: RowInputs
    biases: Biases | None = None
    masks: Any = None
    targets: Any = None
    drafts: DraftInputs | None = None


class _Variant(NamedTuple):
    """What a program is compiled for, beside its inputs' shapes."""

    kind: Kind
    num_microbatches: int
    num_guesses: int

    def key(self, inputs: _Inputs) -> tuple[Any, ...]:
        """Names the program: a mask or a bias of another kind makes another, as do all shapes."""
        structure = jax.tree.structure(inputs)
        return *self, structure, *(x.shape for x in jax.tree.leaves(inputs))


class BatchPolicy(Protocol):
    """Merged or overlapped, step by step: see scheduler/decode_batch.py."""

    def choose(self, contexts: Sequence[int]) -> int: ...
    def observe(self, seconds: float) -> None: ...
    def skip(self) -> None: ...


class HybridStep:
    """Owns the weights' leaves, the caches and the sampling state; every call is one step.

    Args:
        graphdef, state: the split model (`nnx.split`), whose call is that of `models.Decoder`.
        ops: the operations for each kind of step.
        caches: page or state arrays of every layer, handed over for good.
        num_slots: sequences that can be running.
        device: that everything is on; default: the CPU.
        policy: in how many microbatches (decode/dual_batch.py) a decode is computed; None: one.
        has_states: whether any layer has state arrays.
        most_guesses: of a sequence's next tokens that a decode may verify; more than 0 for a model
            that runs its draft head, and only for it.

    policy may be exchanged between two steps. on_compile: may be set; called with True before a
    step whose program has to be compiled first, and with False after it.
    """

    def __init__(
        self,
        graphdef: Any,
        state: Any,
        ops: Mapping[Kind, Ops],
        caches: list[tuple[jax.Array, ...]],
        *,
        page_size: int,
        pages_per_sequence: int,
        num_slots: int,
        chunk_tokens: int,
        vocab_size: int,
        device: Device | None = None,
        policy: BatchPolicy | None = None,
        has_states: bool = False,
        most_guesses: int = 0,
    ) -> None:
        self.policy = policy
        self._most_guesses = most_guesses
        self._leaves, treedef = jax.tree.flatten(state)
        self._caches = caches
        self._counts: TokenCounts | None = None
        self._tables = BlockTables(num_slots, pages_per_sequence)
        self._page_size = page_size
        self._has_states = has_states
        self._num_slots = num_slots
        self._chunk_tokens = chunk_tokens
        self._vocab_size = vocab_size
        self._device = device
        self._programs: Programs[Any] = Programs()
        # Programs are compiled from these, whoever holds the caches meanwhile.
        self._cache_shapes = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), caches
        )
        on = jax.sharding.SingleDeviceSharding(device or jax.local_devices(backend="cpu")[0])
        self._count_shapes = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=on),
            jax.eval_shape(lambda: TokenCounts.zeros(num_slots, vocab_size)),
        )
        self.last_compiled = False  # whether the last step had to be
        self.on_compile: Callable[[bool], None] = lambda begins: None

        def forward(leaves, caches, step, kind, logit_indices, num_microbatches=1):
            model = nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))
            if num_microbatches == 1:
                return model(step, caches, ops[kind], logit_indices)
            return dual_batch.forward(
                model, step, caches, ops[kind], logit_indices, num_microbatches
            )

        def run(
            leaves: list[jax.Array],
            caches: list[tuple[jax.Array, ...]],
            counts: TokenCounts | None,
            step: StepInputs,
            rows: RowInputs,
            biases: Biases | None,
            masks: jax.Array | None,
            targets: jax.Array | None,
            drafts: DraftInputs | None,
            kind: Kind,
            num_microbatches: int,
            num_guesses: int,
        ) -> tuple[
            Drawn,
            PromptLogprobs | None,
            list[tuple[jax.Array, ...]],
            TokenCounts | None,
            jax.Array | None,
        ]:
            indices = rows.logit_index
            if targets is not None:
                indices = jnp.concatenate([indices, jnp.arange(targets.shape[0], dtype=jnp.int32)])
            begun = ops[kind].mark(step.token_ids, "begin")
            step = dataclasses.replace(step, token_ids=begun)
            model: Any = None
            h: Any = None
            if drafts is None:
                raw, caches = forward(leaves, caches, step, kind, indices, num_microbatches)
            else:
                model = nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))
                h, caches = model.trunk(step, caches, ops[kind])
                raw = model.head(jnp.take(h, indices, axis=0, mode="clip"), ops[kind])
            raw = ops[kind].mark(raw, "logits")
            prompt = None
            if targets is not None:
                raw, own = jnp.split(raw, [rows.logit_index.shape[0]])
                prompt = prompt_logprobs(own, targets)
            adjusted = raw
            if counts is not None and biases is not None:
                counts = count_tokens(counts, step.token_ids, step.positions, step.token_rows, rows)
                adjusted = adjust(raw, counts, rows, biases)
            if masks is not None:
                adjusted = apply_masks(adjusted, masks)
            drawn = sample(raw, adjusted, rows)
            guesses = None
            if drafts is not None:
                guesses, caches = drafting.propose(
                    model,
                    h,
                    drawn.token_ids,
                    step,
                    drafts,
                    rows.logit_index,
                    caches,
                    ops[kind],
                    num_guesses=num_guesses,
                    most_guesses=most_guesses if kind == "decode" else 0,
                )
            ended = ops[kind].mark(drawn.token_ids, "end")
            drawn = dataclasses.replace(drawn, token_ids=ended)
            return drawn, prompt, caches, counts, guesses

        def logits(leaves, caches, step):
            indices = jnp.arange(step.token_ids.shape[0], dtype=jnp.int32)
            return forward(leaves, caches, step, "prefill", indices)

        self._run = jax.jit(
            run,
            static_argnames=("kind", "num_microbatches", "num_guesses"),
            donate_argnames=("caches", "counts"),
        )
        self._logits = jax.jit(logits, donate_argnames=("caches",))
        self._clear_slot = jax.jit(clear_slot, donate_argnums=0)
        self._count_prompt = jax.jit(count_prompt, donate_argnums=0)

    @property
    def usable(self) -> bool:
        """False after a step that failed half-way: the caches it was given are gone."""
        return not any(a.is_deleted() for a in jax.tree.leaves((self._caches, self._counts)))

    @property
    def caches(self) -> list[tuple[jax.Array, ...]]:
        """The page arrays of every layer; a step replaces them, and who runs a layer alone must."""
        return self._caches

    def count(self, slot: int, token_ids: Sequence[int]) -> None:
        """Counts prompt tokens that no step is fed, for penalties."""
        if self._counts is None:
            return
        for start in range(0, len(token_ids), COUNT_CHUNK_TOKENS):
            # Padded with an id that no token has, so that one program serves all.
            ids = np.full(COUNT_CHUNK_TOKENS, self._vocab_size, np.int32)
            chunk = token_ids[start : start + COUNT_CHUNK_TOKENS]
            ids[: len(chunk)] = chunk
            self._counts = self._count_prompt(self._counts, np.int32(slot), ids)

    def close(self) -> None:
        """Drops the weights, the caches and the compiled programs that name the native store."""
        programs: tuple[Any, ...] = (
            self._run,
            self._logits,
            self._clear_slot,
            self._count_prompt,
        )
        self._programs.clear()
        for program in programs:
            program.clear_cache()
        self._leaves.clear()
        self._caches.clear()
        self._counts = None

    def assign(self, slot: int, seen: Sequence[int] = ()) -> None:
        """Call when a slot has a new owner, before the first step with it.

        seen: prompt tokens that penalties have to count though no step is fed them.
        """
        self._tables.assign(slot)
        if seen:
            self._need_counts()
        if self._counts is None:
            return
        self._counts = self._clear_slot(self._counts, np.int32(slot))
        self.count(slot, seen)

    @property
    def num_programs(self) -> int:
        """Steps of different shapes that need not be compiled any more."""
        return len(self._programs)

    def prepare(self, kind: Kind, num_tokens: int, num_rows: int, extra: Extra = "") -> bool:
        """Compiles the program of such steps (decode/batch.py: `compiled_ahead`) ahead; from any
        thread, while steps are taken.

        Returns False where it was there, or another thread was at it.
        """
        settings = RowSettings(SamplingParams(), 0, 0, 0, 0, -1, 1)
        row = StepRow((0,), 0, (0,), 0, settings)
        if extra == "masks":
            row = dataclasses.replace(row, mask=np.full(1, 0xFFFFFFFF, np.uint32))
        tables = BlockTables(1, self._tables.pages_per_sequence)
        step = pack_step(
            [row], tables, num_tokens, num_rows, self._page_size, has_states=self._has_states
        )
        drafts = None
        if self._most_guesses:
            drafts = DraftInputs(*pack_drafts([row], num_tokens, num_rows))  # pyright: ignore
        inputs = _Inputs(
            self._count_shapes if extra == "biases" else None,
            step,
            pack_rows([settings], num_rows),
            biases=pack_biases([{}], num_rows) if extra == "biases" else None,
            masks=pack_masks([row], num_rows, self._vocab_size),
            targets=np.full(num_tokens, -1, np.int32) if extra == "targets" else None,
            drafts=drafts,
        )
        variant = _Variant(kind, 1, self._most_guesses)
        compiled = False

        def compile() -> Any:
            nonlocal compiled
            compiled = True
            return self._compile(variant, inputs)

        self._programs.get(variant.key(inputs), compile)
        return compiled

    def _compile(self, variant: _Variant, inputs: _Inputs) -> Any:
        return self._run.lower(
            self._leaves, self._cache_shapes, *inputs, **variant._asdict()
        ).compile()

    def _program(self, variant: _Variant, inputs: _Inputs) -> Any:
        """What computes a step, compiled if it has to be."""
        key = variant.key(inputs)
        self.last_compiled = key not in self._programs
        if self.last_compiled:
            self.on_compile(True)
        return self._programs.get(key, lambda: self._compile(variant, inputs))

    def _pack(self, rows: Sequence[StepRow], num_tokens: int, num_rows: int) -> StepInputs:
        return pack_step(
            rows,
            self._tables,
            num_tokens,
            num_rows,
            self._page_size,
            has_states=self._has_states,
        )

    def _need_counts(self) -> TokenCounts:
        counts = self._counts
        if counts is None:
            counts = TokenCounts.zeros(self._num_slots, self._vocab_size)
            # Committed like the caches, so that the first call is no program of its own.
            device = self._device or jax.local_devices(backend="cpu")[0]
            counts = jax.device_put(counts, device)
            self._counts = counts
        return counts

    def run(
        self,
        kind: Kind,
        rows: Sequence[StepRow],
        *,
        num_microbatches: int | None = None,
        num_guesses: int = 0,
    ) -> list[RowResult]:
        """Computes the rows' tokens and draws the next one of each.

        num_microbatches: of a decode; None: as the policy chooses. The results do not depend on it.
        num_guesses: of each row's further tokens, to be handed to the next decode.
        """
        policy = self.policy if kind == "decode" and num_microbatches is None else None
        if policy is not None:
            num_microbatches = policy.choose([row.start for row in rows])
        begin = time.perf_counter()
        results = self._run_rows(kind, rows, num_microbatches or 1, num_guesses)
        if policy is not None and self.last_compiled:
            policy.skip()
        elif policy is not None:
            policy.observe(time.perf_counter() - begin)
        return results

    def _run_rows(
        self, kind: Kind, given: Sequence[StepRow], num_microbatches: int, num_guesses: int
    ) -> list[RowResult]:
        rows = with_guesses(given) if any(row.guesses for row in given) else given
        assert kind == "decode" or rows is given
        total = sum(len(row.token_ids) for row in rows)
        targets = rows[0].targets
        if kind == "decode":
            num_tokens = num_rows = decode_size(len(rows))
        elif targets is not None:
            assert len(rows) == 1
            num_tokens, num_rows = min(LOGITS_CHUNK_TOKENS, self._chunk_tokens), 1
        else:
            num_tokens, num_rows = prefill_size(
                total, len(rows), chunk=self._chunk_tokens, max_rows=self._num_slots
            )
        step = self._pack(rows, num_tokens, num_rows)
        settings = pack_rows([row.settings for row in rows], num_rows)
        counts = biases = None
        if any(row.biases is not None for row in rows):
            counts = self._need_counts()
            biases = pack_biases([row.biases or {} for row in rows], num_rows)
        masks = pack_masks(rows, num_rows, self._vocab_size)
        padded = None
        if targets is not None:
            padded = np.full(num_tokens, -1, np.int32)
            padded[: len(targets)] = targets
        if not dual_batch.divides(num_tokens, num_rows, num_microbatches):
            num_microbatches = 1
        drafts = None
        if self._most_guesses:
            num_microbatches = 1
            drafts = DraftInputs(*pack_drafts(given, num_tokens, num_rows))  # pyright: ignore
        inputs = _Inputs(counts, step, settings, biases, masks, padded, drafts)
        program = self._program(_Variant(kind, num_microbatches, num_guesses), inputs)
        drawn, prompt, self._caches, counts, guesses = program(self._leaves, self._caches, *inputs)
        if counts is not None:
            self._counts = counts
        results = _results(drawn, rows)
        if guesses is not None:
            results = _verified(results, given, np.asarray(guesses).tolist())
        if self.last_compiled:
            self.on_compile(False)
        if targets is not None and prompt is not None:
            entries = _prompt_entries(prompt, targets, rows[0].settings.params.prompt_logprobs or 0)
            results = [dataclasses.replace(results[0], prompt_logprobs=entries)]
        return results

    def logits(self, token_ids: Sequence[int], pages: Sequence[int], slot: int) -> np.ndarray:
        """Float32 logits `[T, V]` after every token of a text, through the given pages and slot."""
        self.assign(slot)
        size = min(LOGITS_CHUNK_TOKENS, self._chunk_tokens)
        out = []
        for start in range(0, len(token_ids), size):
            chunk = token_ids[start : start + size]
            row = StepRow(chunk, start, pages, slot, settings=_NOTHING_DRAWN)
            step = self._pack([row], size, 1)
            chunk_logits, self._caches = self._logits(self._leaves, self._caches, step)
            out.append(np.asarray(chunk_logits)[: len(chunk)])
        return np.concatenate(out)


_NOTHING_DRAWN: Any = None


def _verified(
    results: Sequence[RowResult], rows: Sequence[StepRow], guesses: Sequence[Sequence[int]]
) -> list[RowResult]:
    """The results of `with_guesses(rows)`, gathered by row, without those after a wrong guess."""
    out, at = [], 0
    for row in rows:
        right = 0
        while right < len(row.guesses) and results[at + right].token_id == row.guesses[right]:
            right += 1
        out.append(
            dataclasses.replace(
                results[at],
                more=tuple(results[at + 1 : at + 1 + right]),
                guesses=[token for token in guesses[at + right] if token >= 0],
            )
        )
        at += 1 + len(row.guesses)
    return out


def _prompt_entries(
    prompt: PromptLogprobs, targets: Sequence[int], num_top: int
) -> list[TokenLogprob]:
    logprobs = np.asarray(prompt.logprobs).tolist()
    top_ids = np.asarray(prompt.top_ids)[:, :num_top].tolist()
    top_logprobs = np.asarray(prompt.top_logprobs)[:, :num_top].tolist()
    return [
        TokenLogprob(token, logprobs[i], tuple(zip(top_ids[i], top_logprobs[i], strict=True)))
        for i, token in enumerate(targets)
    ]


def _results(drawn: Drawn, rows: Sequence[StepRow]) -> list[RowResult]:
    token_ids = np.asarray(drawn.token_ids).tolist()
    if all(row.settings.params.logprobs is None for row in rows):
        return [RowResult(token_ids[i], 0.0, (), ()) for i in range(len(rows))]
    logprobs = np.asarray(drawn.logprobs).tolist()
    top_ids = np.asarray(drawn.top_ids)
    top_logprobs = np.asarray(drawn.top_logprobs)
    return [
        RowResult(
            token_ids[i],
            logprobs[i],
            top_ids[i, : row.settings.params.logprobs or 0].tolist(),
            top_logprobs[i, : row.settings.params.logprobs or 0].tolist(),
        )
        for i, row in enumerate(rows)
    ]
