"""An engine process on a named store, for tests that kill it: works without end, a line of JSON a
round. Arguments: role, checkpoint, prefix of store names.

prefill: long prompts, streamed, one token each. decode: short prompts, many tokens each.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys

from jaxmoe import LLM, SamplingParams
from jaxmoe.weights import shared_store

ROLES = {"prefill": ("slp", 60, 1), "decode": ("chunked", 4, 24)}


def main(role: str, directory: str, prefix: str) -> None:
    shared_store._PREFIX = prefix
    prefill, prompt_tokens, max_tokens = ROLES[role]
    prompts = [[1 + (7 * i + j) % 50 for j in range(prompt_tokens)] for i in range(3)]
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    options = dict(max_model_len=64, max_num_seqs=2, prefill_chunk_tokens=16, num_threads=1)
    options |= dict(show_progress=False, prefix_cache=False, device="cpu", compute_dtype="float32")
    with LLM(directory, prefill=prefill, shared_weights=True, **options) as llm:
        report, store = llm._started.loaded.report, llm._started.loaded.host_store
        assert store is not None
        say(store=report.shared_name, read_bytes=report.read_bytes, pid=os.getpid())
        while True:
            outputs = llm.generate(prompts, params)
            tokens = [list(o.outputs[0].token_ids) for o in outputs]
            say(tokens=tokens, checksum=checksum(store))


def checksum(store) -> str:
    digest = hashlib.sha256()
    for layer, layout in enumerate(store.layouts):
        for expert in range(layout.num_experts):
            for which in ("gate", "up", "down"):
                digest.update(store.matrix(layer, expert, which))
                digest.update(store.scale(layer, expert, which))
    return digest.hexdigest()


def say(**facts) -> None:
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
