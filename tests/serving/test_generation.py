"""What an engine's deltas become, where they are not an answer."""

import asyncio

import pytest

from jaxmoe.request import Delta
from jaxmoe.sampling_params import SamplingParams
from jaxmoe.serving.errors import ApiError
from jaxmoe.serving.generation import Generation, Job


class Failing:
    """An engine whose answer is one failed delta."""

    def __init__(self, stop_reason):
        self.stop_reason = stop_reason

    async def generate(self, request_id, prompt_token_ids, params, *, cache_salt=None):
        yield Delta(request_id, 0, "", (), None, "error", stop_reason=self.stop_reason)


@pytest.mark.parametrize(
    "stop_reason,words",
    [
        (None, "logits are not finite; the checkpoint may be damaged"),
        ("the grammar failed: too complex", "^the grammar failed: too complex$"),
    ],
)
def test_a_failure_is_reported_as_what_it_is(stop_reason, words):
    generation = Generation(Failing(stop_reason), None, [Job("r", [1], SamplingParams())])
    with pytest.raises(ApiError, match=words) as info:
        asyncio.run(generation.finish())
    assert info.value.status == 500
