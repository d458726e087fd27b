"""Writes the reference logits the parity tests compare with: Hugging Face transformers on tiny
checkpoints.

    python tools/make_parity_fixtures.py [CASE ...]      needs torch and transformers; jax is not
    used

For every case: a float32 run on exactly dequantized weights (the reference), a bfloat16 run (the
yardstick of what bfloat16 costs), and 16 greedy steps in float32. Prompts are grown token by token,
keeping tokens whose routing decisions, and choices of positions to attend, are clear of ties, so
that rounding alone cannot change the experts or the context.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from support import tiny_models, tiny_quant  # noqa: E402

FIXTURE_DIR = ROOT / "tests" / "parity" / "fixtures"
PROMPT_LENGTHS = (57, 35, 20)
# Of models with linear attention, which transformers computes in chunks of 64 tokens.
LINEAR_PROMPT_LENGTHS = (90, 25, 13)
# Of models with compressed entries: the second decodes across the window and the first entry of 128
# positions; the first has two of those, and more of 4 than are chosen.
COMPRESSED_PROMPT_LENGTHS = (262, 120, 20)
# Their prompts are long and every token decides in many places.
COMPRESSED_MARGIN = 0.01
GREEDY_STEPS = 16
# In units of a router logit. bfloat16 rounding moves logits of this size by a few hundredths at
# most.
CLEAR_MARGIN = 0.05
CANDIDATES = 64
# Greedy steps cannot be chosen token by token; they are only compared in float32.
GREEDY_MARGIN = 5e-4
# Where the tensors of a text model are that is a part of a larger one, and what it calls them.
TEXT_PARTS = {"language_model.": "", "model.language_model.": "model.", "lm_head.": "lm_head."}
# They score with sigmoids and do not say so.
SIGMOID_TYPES = ("glm4_moe", "glm4_moe_lite")


def text_config(case: str) -> dict[str, Any]:
    """The config of a case's language model, which may be a part of a larger one."""
    config = tiny_models.hf_config(case)
    return dict(config.get("text_config", config))


def load_reference(case: str, dtype: torch.dtype) -> Any:
    """The transformers model of a case, on the CPU, with eager attention."""
    config = text_config(case)
    config.pop("quantization_config", None)
    config.pop("auto_map", None)
    if config["model_type"] == "kimi_k2":  # the same model under another name
        config["model_type"] = "deepseek_v3"
    plain = tiny_quant.dequantize(tiny_models.make_tensors(case))
    tensors = {
        name: a if a.dtype == np.int64 else a.astype(np.float32) for name, a in plain.items()
    }
    if "text_config" in tiny_models.hf_config(case):
        tensors = {
            own + name.removeprefix(part): array
            for name, array in tensors.items()
            for part, own in TEXT_PARTS.items()
            if name.startswith(part)
        }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        tiny_models.write_safetensors(Path(folder) / "model.safetensors", tensors)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
        )
    num_layers = config["num_hidden_layers"]
    unexpected = [n for n in info["unexpected_keys"] if f"layers.{num_layers}." not in n]
    unexpected = [n for n in unexpected if not n.endswith("inv_freq") and n[:4] != "mtp."]
    if info["missing_keys"] or info["mismatched_keys"] or unexpected:
        raise SystemExit(f"{case}: transformers did not load the checkpoint as written: {info}")
    return model.eval()


def routing_margins(config: Mapping[str, Any], logits: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """How far each token's routing decision is from another one, in router-logit units: `[T]`."""
    if config.get("scoring_func") == "sigmoid" or config["model_type"] in SIGMOID_TYPES:
        choice, unit = 1.0 / (1.0 + np.exp(-logits.astype(np.float64))) + bias, 0.25
    elif config.get("scoring_func") == "sqrtsoftplus":
        choice, unit = np.sqrt(np.log1p(np.exp(logits.astype(np.float64)))) + bias, 0.3
    else:
        choice, unit = logits.astype(np.float64), 1.0
    num_groups = config.get("n_group") or 1
    margin = np.full(len(logits), np.inf)
    if num_groups > 1:
        grouped = np.sort(choice.reshape(len(choice), num_groups, -1), axis=-1)
        is_sum = config["topk_method"] == "noaux_tc"
        group_scores = grouped[..., -2:].sum(-1) if is_sum else grouped[..., -1]
        order = np.argsort(-group_scores, axis=-1)
        kept = config["topk_group"]
        ranked = np.take_along_axis(group_scores, order, axis=-1)
        margin = ranked[:, kept - 1] - ranked[:, kept]
        keep = np.zeros_like(group_scores, bool)
        np.put_along_axis(keep, order[:, :kept], True, axis=-1)
        choice = np.where(keep.repeat(choice.shape[1] // num_groups, axis=1), choice, -np.inf)
    ranked = -np.sort(-choice, axis=-1)
    top_k = config["num_experts_per_tok"]
    return np.minimum(margin, ranked[:, top_k - 1] - ranked[:, top_k]) / unit


class Reference:
    """A transformers model with a cache that can step back."""

    def __init__(self, case: str, dtype: torch.dtype):
        self.config = text_config(case)
        self.model = load_reference(case, dtype)
        self.cache = transformers.DynamicCache()
        self._router_logits: list[torch.Tensor] = []
        self._biases = []
        for layer in self.model.model.layers:
            router = getattr(layer.mlp, "gate", None) or getattr(layer.mlp, "router", None)
            if router is not None and not hasattr(router, "tid2eid"):
                router.register_forward_hook(self._record)
                bias = getattr(layer.mlp, "e_score_correction_bias", torch.zeros(1))
                bias = getattr(router, "e_score_correction_bias", bias)
                self._biases.append(bias.detach().float().numpy())

    def _record(self, _module: Any, _inputs: Any, outputs: Any) -> None:
        self._router_logits.append(outputs[0].detach().float())

    def reset(self) -> None:
        self.cache = transformers.DynamicCache()

    @torch.no_grad()
    def extend(self, tokens: list[int]) -> tuple[np.ndarray, float]:
        """Float32 logits `[T, V]` of the tokens after those in the cache, and the least margin."""
        self._router_logits.clear()
        out = self.model(torch.tensor([tokens]), past_key_values=self.cache, use_cache=True)
        margins = [
            routing_margins(self.config, logits.reshape(len(tokens), -1).numpy(), bias)
            for logits, bias in zip(self._router_logits, self._biases, strict=True)
        ]
        return out.logits[0].float().numpy(), float(np.min(margins))

    def step_back(self) -> None:
        self.cache.crop(-1)


class CopyingReference(Reference):
    """For models whose cache cannot step back: it is kept as it was before the last tokens."""

    def reset(self) -> None:
        self.cache = transformers.DynamicCache(config=self.model.config)

    def extend(self, tokens: list[int]) -> tuple[np.ndarray, float]:
        self._before = copy.deepcopy(self.cache)
        return super().extend(tokens)

    def step_back(self) -> None:
        self.cache = self._before


class IndexedReference(CopyingReference):
    """For models with an indexer: the margins are also those of the positions it chooses."""

    def __init__(self, case: str, dtype: torch.dtype):
        super().__init__(case, dtype)
        self._index_scores: list[torch.Tensor] = []
        for layer in self.model.model.layers:
            indexer = self._indexer(layer.self_attn)
            if indexer is not None:
                indexer.forward = functools.partial(self._recorded, indexer.forward)

    @staticmethod
    def _indexer(attention: Any) -> Any:
        return attention.indexer

    def _recorded(self, forward: Any, *args: Any, **options: Any) -> torch.Tensor:
        topk = torch.Tensor.topk

        def recording(scores: torch.Tensor, *args: Any, **options: Any) -> Any:
            self._index_scores.append(scores.detach().float())
            return topk(scores, *args, **options)

        with mock.patch.object(torch.Tensor, "topk", recording):
            return forward(*args, **options)

    def extend(self, tokens: list[int]) -> tuple[np.ndarray, float]:
        self._index_scores.clear()
        logits, margin = super().extend(tokens)
        top_k = self.config["index_topk"]
        margins = [self._index_margins(scores[0].numpy(), top_k) for scores in self._index_scores]
        return logits, min(margin, *(float(m.min()) for m in margins))

    @staticmethod
    def _index_margins(scores: np.ndarray, top_k: int) -> np.ndarray:
        return index_margins(scores, top_k)


class CompressedReference(IndexedReference):
    """For DeepSeek-V4, whose indexers choose entries; those a token does not see score -inf."""

    @staticmethod
    def _indexer(attention: Any) -> Any:
        return getattr(attention.compressor, "indexer", None)

    @staticmethod
    def _index_margins(scores: np.ndarray, top_k: int) -> np.ndarray:
        margins = np.full(len(scores), np.inf)
        for t, row in enumerate(scores):
            ranked = -np.sort(-row[np.isfinite(row)])
            if len(ranked) > top_k:
                margins[t] = (ranked[top_k - 1] - ranked[top_k]) / (ranked.std() / 4)
        return margins


def index_margins(scores: np.ndarray, top_k: int) -> np.ndarray:
    """How far the last chosen position is from the first left out: `[T]`.

    scores: of the last T tokens `[T, S]`. Margins are in quarters of a token's standard deviation,
    of which bfloat16 moves scores by a few hundredths.
    """
    num_tokens, context = scores.shape
    margins = np.full(num_tokens, np.inf)
    for t in range(max(0, top_k - context + num_tokens), num_tokens):
        ranked = -np.sort(-scores[t, : context - num_tokens + t + 1])
        margins[t] = (ranked[top_k - 1] - ranked[top_k]) / (ranked.std() / 4)
    return margins


def make_reference(case: str, dtype: torch.dtype) -> Reference:
    config = text_config(case)
    kind = CopyingReference if is_linear(config) else Reference
    kind = IndexedReference if "index_topk" in config else kind
    kind = CompressedReference if is_compressed(config) else kind
    return kind(case, dtype)


def is_linear(config: Mapping[str, Any]) -> bool:
    return "linear_conv_kernel_dim" in config


def is_compressed(config: Mapping[str, Any]) -> bool:
    return "compress_ratios" in config


def grow_prompt(reference: Reference, length: int, rng: np.random.Generator) -> list[int]:
    vocab = reference.config["vocab_size"]
    clear = COMPRESSED_MARGIN if is_compressed(reference.config) else CLEAR_MARGIN
    reference.reset()
    tokens: list[int] = []
    for _ in range(length):
        best, best_margin = 0, -1.0
        for candidate in rng.integers(0, vocab - 2, CANDIDATES).tolist():
            _, margin = reference.extend([candidate])
            if margin > best_margin:
                best, best_margin = candidate, margin
            reference.step_back()
            if margin >= clear:
                break
        reference.extend([best])
        tokens.append(best)
    return tokens


def greedy(reference: Reference, prompt: list[int]) -> tuple[list[int], np.ndarray, float]:
    """16 tokens, the logits each was chosen from `[16, V]`, and the least margin of the steps."""
    reference.reset()
    logits, _ = reference.extend(prompt)
    tokens, rows, least = [], [logits[-1]], np.inf
    for _ in range(GREEDY_STEPS):
        tokens.append(int(rows[-1].argmax()))
        if len(tokens) == GREEDY_STEPS:
            break
        logits, margin = reference.extend(tokens[-1:])
        rows.append(logits[-1])
        least = min(least, margin)
    return tokens, np.stack(rows), least


def compute(case: str, prompts: list[list[int]]) -> dict[str, np.ndarray]:
    """Everything a fixture holds, for given prompts."""
    reference = make_reference(case, torch.float32)
    logits, greedy_tokens, greedy_logits, margins = [], [], [], []
    for prompt in prompts:
        reference.reset()
        rows, margin = reference.extend(prompt)
        tokens, steps, step_margin = greedy(reference, prompt)
        logits.append(rows)
        greedy_tokens.append(tokens)
        greedy_logits.append(steps)
        margins.append((margin, step_margin))
    low = make_reference(case, torch.bfloat16)
    logits_bf16 = []
    for prompt in prompts:
        low.reset()
        logits_bf16.append(low.extend(prompt)[0])
    rounded = torch.from_numpy(np.concatenate(logits_bf16)).to(torch.bfloat16)
    return {
        "prompt_lengths": np.array([len(p) for p in prompts], np.int32),
        "prompt_tokens": np.concatenate(prompts).astype(np.int32),
        "logits": np.concatenate(logits).astype(np.float32),
        "logits_bf16_bits": rounded.view(torch.int16).numpy().view(np.uint16),
        "greedy_tokens": np.array(greedy_tokens, np.int32),
        "greedy_logits": np.stack(greedy_logits).astype(np.float32),
        "margins": np.array(margins, np.float32),
        "digest": np.array(tiny_models.digest(tiny_models.make_tensors(case))),
        "made_with": np.array(
            f"transformers {transformers.__version__}, torch {torch.__version__}"
        ),
    }


def make_prompts(case: str) -> list[list[int]]:
    reference = make_reference(case, torch.float32)
    prompts = []
    lengths = LINEAR_PROMPT_LENGTHS if is_linear(text_config(case)) else PROMPT_LENGTHS
    lengths = COMPRESSED_PROMPT_LENGTHS if is_compressed(text_config(case)) else lengths
    for i, length in enumerate(lengths):
        for attempt in range(20):
            prompt = grow_prompt(reference, length, np.random.default_rng([i, attempt]))
            if greedy(reference, prompt)[2] >= GREEDY_MARGIN:
                break
        else:
            raise SystemExit(f"{case}: no prompt of {length} tokens with clear greedy steps")
        prompts.append(prompt)
    return prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=tiny_models.CASES, metavar="CASE")
    transformers.utils.logging.set_verbosity_error()
    FIXTURE_DIR.mkdir(parents=True, exist_ok=True)
    for case in parser.parse_args().cases:
        fixture = compute(case, make_prompts(case))
        path = FIXTURE_DIR / f"{case}.npz"
        np.savez_compressed(path, **fixture)
        print(f"{case}: {path.stat().st_size / 1e6:.2f} MB, least margins {fixture['margins'].T}")


if __name__ == "__main__":
    main()
