"""Makes the embedded demo model: jaxmoe/demo.

Two stages. `--prepare` reads the unpacked Debian packages (see tools/demo/corpus.py), trains the
tokenizer and writes token streams; it is deterministic. Without it, the model is trained on those
streams (minutes on a GPU), quantized to FP8, measured, sampled, and written as a Hugging Face
directory under --out. Neither stage needs jaxmoe's native extension.

    python tools/train_demo.py --prepare --packages=DIR --data=DATA
    PYTHONPATH=. python tools/train_demo.py --data=DATA --out=OUT
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
from demo import architecture, corpus, dataset, evaluate, quantize, tokenizer, training
from demo.model import Params, TrainableDecoder
from tokenizers import Tokenizer

from jaxmoe.config.model_config import ModelConfig
from jaxmoe.weights.safetensors_writer import write_file

_NUM_CHATS = 40_000
_PROBE_MAX_TOKENS = 250
_MAX_BYTES = 12_000_000
_PROMPTS = (
    "In the beginning",
    "The LORD is my shepherd;",
    "It is a truth universally acknowledged, that",
    "Emma was very much surprised to",
    "HAPPINESS, n.",
)
_QUESTIONS = (
    "Who are you?",
    "Tell me about the sea.",
    "Define friendship.",
    "And it came to pass in those days, that",
    "Write like Jane Austen.",
    "Read Psalms 23:1.",
)


def prepare(packages: Path, data: Path, seed: int) -> None:
    data.mkdir(parents=True, exist_ok=True)
    documents = corpus.read_documents(packages)
    trained = tokenizer.train_tokenizer(d.text for d in documents if not d.heldout)
    tokenizer.write_tokenizer(trained, data, architecture.MAX_POSITION)
    built = dataset.build(documents, trained, _NUM_CHATS, seed)
    dataset.save(built, data / "dataset.npz")
    # The shortest held-out chapter of a fair size: what tests check the engine with.
    probe = min(
        (d for d in documents if d.heldout and d.source == "kjv" and len(d.text) > 500),
        key=lambda d: len(d.text),
    )
    tokens, _ = dataset.encode_document(probe.text, trained)
    assert len(tokens) <= _PROBE_MAX_TOKENS, (probe.title, len(tokens))
    _write_json(
        data / "probe.json", {"title": probe.title, "text": probe.text, "token_ids": tokens}
    )
    for source in built.heldout:
        part = [d for d in documents if d.source == source]
        num_bytes = sum(len(d.text.encode()) for d in part if not d.heldout)
        print(
            f"{source}: {len(part) - len(built.heldout[source])} documents of {num_bytes} bytes to"
            f" train on, {len(built.heldout[source])} of {built.heldout_bytes[source]} held out"
        )
    print(f"{len(built.chapters.tokens)} chapter tokens, {len(built.chats.tokens)} chat tokens")


def train(data: Path, out: Path, options: training.TrainingOptions, sample_tokens: int) -> None:
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}; {options}")
    config = ModelConfig.from_hf(architecture.hf_config())
    built = dataset.load(data / "dataset.npz")
    params, history = training.train(config, built, options)

    tensors = architecture.to_tensors(params, config)
    stored = {"bf16": quantize.store_bf16(tensors), "fp8": quantize.store_fp8(tensors)}
    probe = json.loads((data / "probe.json").read_text())
    # Measured in float32 arithmetic, so that nothing but the stored weights differs.
    exact = TrainableDecoder(config, jnp.float32)
    highest = jax.lax.Precision.HIGHEST
    metrics: dict = {"options": dataclasses.asdict(options), "history": history, "heldout": {}}
    probe["nll_per_token"] = {}
    for name, weights in stored.items():
        loaded = architecture.from_tensors(quantize.load(weights), config)
        loaded = {leaf: jnp.asarray(value) for leaf, value in loaded.items()}
        readings = evaluate.heldout_readings(exact, loaded, built, options.heldout_batches, highest)
        readings["all"] = evaluate.total(readings)
        metrics["heldout"][name] = {source: r.summary() for source, r in readings.items()}
        probe["nll_per_token"][name] = evaluate.document_nll(exact, loaded, probe["token_ids"])
        print(f"held-out, {name} weights: {metrics['heldout'][name]['all']}")

    model_dir = out / "demo"
    model_dir.mkdir(parents=True, exist_ok=True)
    write_file(model_dir / "model.safetensors", stored["fp8"])
    _write_json(model_dir / "config.json", architecture.hf_config())
    _write_json(model_dir / "generation_config.json", architecture.generation_config())
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (model_dir / file).write_bytes((data / file).read_bytes())
    _write_json(out / "metrics.json", metrics)
    _write_json(out / "probe.json", probe)
    num_bytes = sum(file.stat().st_size for file in model_dir.iterdir())
    print(f"{model_dir}: {num_bytes} bytes in {len(stored['fp8'])} tensors")
    if num_bytes > _MAX_BYTES:
        raise SystemExit(f"the demo model is larger than {_MAX_BYTES} bytes")

    text = _samples(TrainableDecoder(config, jnp.bfloat16), loaded, data, sample_tokens)
    (out / "samples.txt").write_text(text, encoding="utf-8")
    print(text)


def _samples(model: TrainableDecoder, params: Params, data: Path, num_tokens: int) -> str:
    trained = Tokenizer.from_file(str(data / "tokenizer.json"))
    prompts = [trained.encode(prompt).ids for prompt in _PROMPTS]
    for question in _QUESTIONS:
        tokens, _ = dataset.encode_chat([("user", question)], trained)
        prompts.append([*tokens, trained.token_to_id(tokenizer.ASSISTANT)])
    eos = trained.token_to_id(tokenizer.EOS)
    lines = []
    for temperature in (0.0, 0.7):
        replies = evaluate.sample(
            model, params, prompts, num_tokens=num_tokens, temperature=temperature, eos=eos
        )
        lines.append(f"==== temperature {temperature}")
        for prompt, reply in zip((*_PROMPTS, *_QUESTIONS), replies, strict=True):
            lines.append(f"[{prompt}] {trained.decode(reply)}\n")
    return "\n".join(lines)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the token streams")
    parser.add_argument("--prepare", action="store_true", help="write --data from --packages")
    parser.add_argument("--packages", type=Path, help="folder the Debian packages are unpacked in")
    parser.add_argument("--out", type=Path, help="folder for the model, its metrics and samples")
    parser.add_argument("--sample_tokens", type=int, default=120)
    for field in dataclasses.fields(training.TrainingOptions):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    args = parser.parse_args()
    if args.prepare:
        if args.packages is None:
            parser.error("--prepare reads the corpus from --packages")
        prepare(args.packages, args.data, args.seed)
        return
    if args.out is None:
        parser.error("training writes to --out")
    names = [field.name for field in dataclasses.fields(training.TrainingOptions)]
    options = training.TrainingOptions(**{name: getattr(args, name) for name in names})
    train(args.data, args.out, options, args.sample_tokens)


if __name__ == "__main__":
    main()
