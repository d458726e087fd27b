import pytest

from jaxmoe.common.errors import ConfigError
from jaxmoe.kv_cache.layout import plan_cache

GIB = 1 << 30


def plan(**changes):
    given = dict(
        token_bytes=1 << 16,
        page_size=16,
        max_num_seqs=8,
        model_limit=100_000,
        max_model_len=None,
        kv_cache_gb=None,
    )
    return plan_cache(**(given | changes))


def test_open_ends_take_half_a_gibibyte():
    layout = plan()
    assert layout.max_model_len == GIB // 2 // (1 << 16) == layout.total_tokens
    assert layout.total_bytes == GIB // 2
    assert layout.pages_per_sequence == layout.num_pages


def test_small_models_take_only_what_all_sequences_need():
    layout = plan(token_bytes=256, model_limit=1000)
    assert layout.max_model_len == 1000
    assert layout.num_pages == 8 * 63  # ceil(1000 / 16) = 63


def test_a_longer_context_grows_the_open_budget():
    layout = plan(max_model_len=50_000)
    assert layout.num_pages == layout.pages_per_sequence == 3125


@pytest.mark.parametrize(
    "changes,words",
    [
        (dict(max_model_len=100_001), "max_model_len: got 100001.*100000"),
        (dict(max_model_len=50_000, kv_cache_gb=1.0), "holds 16384 tokens.*needs 3.05"),
        (dict(kv_cache_gb=0.0001), "holds 0 tokens.*max_model_len 2 needs 0.00"),
    ],
)
def test_refusals_name_the_field_and_the_numbers(changes, words):
    with pytest.raises(ConfigError, match=words):
        plan(**changes)
