"""The embedded demo checkpoint: what it holds, and that the engine reads text as well as stated."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

import jaxmoe
from jaxmoe.config.model_config import ModelConfig
from jaxmoe.text.chat_template import ChatTemplate
from jaxmoe.weights.safetensors_reader import Checkpoint

_DEMO = Path(jaxmoe.__file__).parent / "demo"
_PROBE = json.loads((Path(__file__).parent / "probe.json").read_text(encoding="utf-8"))


def _nll_per_token(llm: "jaxmoe.LLM") -> float:
    """Mean -ln p the engine gives the probe's tokens after the first."""
    tokens = _PROBE["token_ids"]
    logits = np.asarray(llm.logits(tokens), np.float64)[:-1]
    top = logits.max(-1)
    log_total = top + np.log(np.exp(logits - top[:, None]).sum(-1))
    return float(np.mean(log_total - logits[np.arange(len(logits)), tokens[1:]]))


@pytest.fixture(scope="module")
def llm():
    with jaxmoe.LLM() as demo:
        yield demo


def test_it_is_small():
    assert sum(file.stat().st_size for file in _DEMO.rglob("*") if file.is_file()) <= 12_000_000


def test_it_is_deepseek_v3_in_block_fp8():
    config = json.loads((_DEMO / "config.json").read_text())
    parsed = ModelConfig.from_hf(config)
    assert parsed.architecture == "DeepseekV3ForCausalLM" and parsed.quant.format == "fp8_block"
    assert parsed.mlp_types == ("dense",) + ("moe",) * (parsed.num_layers - 1)
    tensors = Checkpoint.open(_DEMO).tensors
    linear = [name for name in tensors if name.endswith(("_proj.weight", "_with_mqa.weight"))]
    experts = parsed.moe.router.num_experts * 3 * len(parsed.moe_layers)
    assert sum(".mlp.experts." in name for name in linear) == experts
    for name in linear:
        blocks = tuple(-(-size // 128) for size in tensors[name].shape)
        assert tensors[name].dtype == "F8_E4M3", name
        scale = tensors[f"{name}_scale_inv"]
        assert (scale.dtype, scale.shape) == ("F32", blocks), name
    others = {
        tensors[name].dtype for name in tensors if name not in linear and "_scale" not in name
    }
    assert others == {"BF16", "F32"}


def test_its_chat_template_renders_its_special_tokens():
    template = ChatTemplate.from_dir(_DEMO)
    assert template is not None
    messages = [{"role": "system", "content": "A"}, {"role": "user", "content": "B"}]
    assert template.render(messages) == "<|bos|><|system|>A<|user|>B<|assistant|>"


def test_the_engine_reads_heldout_text_as_stated(llm):
    """The stated figure is of float32 arithmetic on the same FP8 weights."""
    stated = _PROBE["nll_per_token"]
    assert _nll_per_token(llm) == pytest.approx(stated["fp8"], abs=0.02)
    assert stated["fp8"] == pytest.approx(stated["bf16"], abs=0.05)
    assert math.exp(stated["fp8"]) < 100  # of 2048 tokens


def test_float32_compute_is_the_stated_figure():
    with jaxmoe.LLM(compute_dtype="float32") as exact:
        assert _nll_per_token(exact) == pytest.approx(_PROBE["nll_per_token"]["fp8"], abs=1e-3)


def test_it_introduces_itself_and_stops(llm):
    params = jaxmoe.SamplingParams(temperature=0.0, max_tokens=120)
    reply = llm.chat([{"role": "user", "content": "Who are you?"}], params)[0].outputs[0]
    assert reply.text.startswith("I am the demonstration model of jaxmoe")
    assert reply.finish_reason == "stop"


def test_it_writes_english(llm):
    """A greedy continuation has the share of function words that English has."""
    params = jaxmoe.SamplingParams(temperature=0.0, max_tokens=40)
    text = llm.generate("And the LORD said unto Moses,", params).text
    common = set(
        "the and of to in that he shall unto for i his a they be is him not them it".split()
    )
    words = text.lower().replace(",", " ").replace(".", " ").split()
    assert len(words) >= 15 and sum(word in common for word in words) >= len(words) / 4, text
