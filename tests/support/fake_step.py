"""An engine computable by hand: its step writes a known text for each prompt, and reads the
prompt back through the pages it was given, so that a wrong page, slot or position gives a
wrong text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jaxmoe.decode.hybrid_step import RowResult
from jaxmoe.engine.engine import Engine
from jaxmoe.kv_cache.layout import CacheLayout
from jaxmoe.request import TokenLogprob
from jaxmoe.text.tokenizer import ByteTokenizer

EOS = 1


class FakeStep:
    """Writes script(prompt), then end of text for ever."""

    def __init__(self, script: Callable[[bytes], bytes], page_size: int):
        self.script = script
        self.page_size = page_size
        self.memory = {}
        self.calls = []
        self.usable = True
        self.last_compiled = False
        self.fail_with = None

    def assign(self, slot, seen=()):
        pass

    def run(self, kind, rows, *, num_guesses=0):
        if self.fail_with is not None:
            raise self.fail_with
        self.calls.append((kind, len(rows)))
        out, end = [], 0
        for row in rows:
            end += len(row.token_ids)
            assert row.settings.logit_index == end - 1
            for i, token in enumerate(row.token_ids, row.start):
                self.memory[row.pages[i // self.page_size], i % self.page_size] = token
            last = row.start + len(row.token_ids)
            size = self.page_size
            seen = [self.memory[row.pages[i // size], i % size] for i in range(last)]
            prompt = bytes(seen[: row.settings.num_prompt])
            text = self.script(prompt) if len(seen) >= row.settings.num_prompt else b""
            assert bytes(seen[len(prompt) :])[: len(text)] == text[: last - len(prompt)]
            at = last - len(prompt)
            token = text[at] if at < len(text) else EOS
            if row.biases and token in row.biases:
                token = ord("~")
            n = row.settings.params.logprobs or 0
            entries = None
            if row.targets is not None:
                assert len(rows) == 1 and row.settings.params.prompt_logprobs is not None
                n_prompt = row.settings.params.prompt_logprobs
                entries = [
                    TokenLogprob(t, -float(i), ((t, -float(i)), (7, -99.0))[:n_prompt])
                    for i, t in enumerate(row.targets, row.start + 1)
                ]
            more, drawn = [], token
            for i, guess in enumerate(row.guesses):
                assert kind == "decode" and not row.biases
                # Wrong ones too: what they leave behind must never be read.
                self.memory[row.pages[(last + i) // size], (last + i) % size] = guess
                if guess != drawn or len(more) < i:
                    continue
                drawn = text[at + i + 1] if at + i + 1 < len(text) else EOS
                more.append(RowResult(drawn, -0.5, [drawn, 7][:n], [-0.5, -1.0][:n]))
            guesses = [
                text[i] if i < len(text) else EOS
                for i in range(at + 1 + len(more), at + 1 + len(more) + num_guesses)
            ]
            if (last + len(more)) % 2 == 0 and guesses:  # a wrong one now and then
                guesses[last % len(guesses)] ^= 1
            row_result = RowResult(token, -0.5, [token, 7][:n], [-0.5, -1.0][:n], entries)
            out.append(dataclasses.replace(row_result, more=more, guesses=guesses))
        return out

    def logits(self, token_ids, pages, slot):
        assert len(pages) == -(-len(token_ids) // self.page_size)
        return len(token_ids), sorted(pages), slot


def make_engine(
    script: Callable[[bytes], bytes],
    *,
    num_pages: int = 32,
    max_model_len: int = 40,
    max_num_seqs: int = 4,
    tokenizer: bool = True,
    streamer=None,
    worker=None,
    **more,
) -> tuple[Engine, FakeStep]:
    """An engine over a FakeStep with pages of 4 tokens; texts are their bytes; its clock counts.

    streamer, worker: makes what computes streamed prompts, given the step.
    """
    layout = CacheLayout(4, num_pages, max_model_len, 1)
    step = FakeStep(script, 4)
    times = iter(range(10**6))
    engine = Engine(
        step,
        layout,
        tokenizer=ByteTokenizer(256) if tokenizer else None,
        vocab_size=256,
        eos_token_ids=(EOS,),
        max_num_seqs=max_num_seqs,
        prefill_chunk_tokens=16,
        clock=lambda: float(next(times)),
        streamer=streamer and streamer(step),
        worker=worker and worker(step),
        **more,
    )
    return engine, step
