"""A process of its own that loads a model, compiles every shape of step, and says what it took.

    python memory_child.py '{"model": ..., "max_num_seqs": ...}'

prints {"peak_bytes": VmHWM, "programs": how many step programs were compiled}.
"""

import json
import sys

from jaxmoe.decode.batch import PREFILL_SIZES
from jaxmoe.llm import LLM
from jaxmoe.sampling_params import SamplingParams
from jaxmoe.weights.memory import peak_rss_bytes


def main() -> None:
    options = json.loads(sys.argv[1])
    with LLM(**options) as llm:
        chunk = llm.config.prefill_chunk_tokens
        sizes = [size for size in PREFILL_SIZES if size < chunk] + [chunk]
        most = llm.config.max_num_seqs
        greedy = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
        for rows in [1 << i for i in range((most - 1).bit_length() + 1)]:
            for size in sizes:
                if size >= rows:
                    # Different prompts, so that none is found in a cache of prefixes.
                    first = 10 + rows + size
                    each = min(size // rows, llm.engine.layout.max_model_len - 2)
                    llm.generate([[first + i] * each for i in range(min(rows, most))], greedy)
        assert llm._started is not None
        programs = llm._started.step.num_programs
        print(json.dumps({"peak_bytes": peak_rss_bytes(), "programs": programs}))


main()
