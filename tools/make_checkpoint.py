"""Writes a checkpoint of random weights for any config.json, in the layout such models are shipped
in.

    tools/make_checkpoint.py --preset=olmoe_like --output=/data/olmoe_like
    tools/make_checkpoint.py --config=config.json --output=DIR --format=bf16 --layers=4

For benchmarks and for trying a model's shape before downloading it. The weights are noise of the
right size and format; a byte-level tokenizer comes with them, so text goes in and comes out, but it
means nothing. Presets are the files of configs/bench/: known models, cut until they fit a
workstation.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from jaxmoe.common.errors import JaxMoeError
from jaxmoe.config.model_config import ModelConfig
from jaxmoe.models import registry
from jaxmoe.weights.random_checkpoint import write_random_checkpoint

PRESETS = Path(__file__).resolve().parents[1] / "configs" / "bench"
FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


def _compressed(kind: str, bits: int, strategy: str, group: int | None, fmt: str) -> dict[str, Any]:
    weights = {"type": kind, "num_bits": bits, "strategy": strategy, "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": fmt,
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights | {"group_size": group}}
        },
    }


INT4 = _compressed("int", 4, "group", 32, "pack-quantized")
INT4["ignore"] += ["re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|down)_proj.*"]
FORMATS: dict[str, dict[str, Any]] = {
    "fp8": FP8,
    "fp8_channel": _compressed("float", 8, "channel", None, "float-quantized"),
    "int4": INT4,  # routed experts only, as Kimi-K2-Thinking
    "mxfp4": _compressed("float", 4, "group", 32, "mxfp4-pack-quantized"),
    "mxfp8": {"quant_method": "mxfp8", "weight_block_size": [1, 32]},
}
PACKED_MXFP4 = {"quant_method": "mxfp4"}  # of gpt-oss
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def byte_tokenizer(config: ModelConfig) -> Tokenizer:
    """Byte-level BPE without merges: a token a byte; every other id decodes to a made-up word.

    Special tokens get the ids that config.json gives them.
    """
    bos = config.bos_token_id
    special = {token_id: f"<|end_{i}|>" for i, token_id in enumerate(config.eos_token_ids)}
    if bos is not None:
        special.setdefault(bos, "<|begin|>")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    free = [i for i in range(config.vocab_size) if i not in special]
    if len(free) < len(letters):
        raise SystemExit(f"vocab_size {config.vocab_size} is too small for {len(letters)} bytes")
    vocab = {text: token_id for token_id, text in special.items()}
    for i, token_id in enumerate(free):
        vocab[letters[i] if i < len(letters) else _word(i - len(letters))] = token_id
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special.values()])
    return tokenizer


def _word(number: int) -> str:
    """Distinct pronounceable words, " ba" for 0, with the leading space of byte-level BPE."""
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    word = ""
    while number >= 0:
        number, rest = divmod(number, len(syllables))
        word += syllables[rest]
        number -= 1
    return "Ġ" + word


def write_tokenizer(directory: Path, config: ModelConfig) -> None:
    tokenizer = byte_tokenizer(config)
    tokenizer.save(str(directory / "tokenizer.json"))
    bos, eos = config.bos_token_id, config.eos_token_ids
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None if bos is None else tokenizer.id_to_token(bos),
        "eos_token": tokenizer.id_to_token(eos[0]) if eos else None,
        "model_max_length": config.max_position,
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(directory / "tokenizer_config.json", described)
    generation = {"bos_token_id": bos, "eos_token_id": list(eos), "do_sample": False}
    _write_json(directory / "generation_config.json", generation)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def read_config(args: argparse.Namespace) -> dict[str, Any]:
    file = args.config or PRESETS / f"{args.preset}.json"
    config = json.loads(file.read_text())
    if args.format == "bf16":
        config.pop("quantization_config", None)
    elif args.format == "mxfp4" and config.get("model_type") == "gpt_oss":
        config["quantization_config"] = PACKED_MXFP4
    elif args.format == "fp8":
        config.setdefault("quantization_config", FP8)
    elif args.format is not None:
        config["quantization_config"] = FORMATS[args.format]
    if args.layers is not None:
        config["num_hidden_layers"] = args.layers
        if "layer_types" in config:
            config["layer_types"] = config["layer_types"][: args.layers]
    return config


def parse(arguments: list[str]) -> argparse.Namespace:
    summary, _, usage = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    presets = sorted(path.stem for path in PRESETS.glob("*.json"))
    source.add_argument("--preset", choices=presets, help="a file of configs/bench/")
    source.add_argument("--config", type=Path, help="any config.json of a supported model")
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument(
        "--format", choices=("bf16", *FORMATS), help="instead of what the configuration says"
    )
    parser.add_argument("--layers", type=int, help="instead of what the configuration says")
    parser.add_argument("--shard_gb", type=float, default=5.0, help="largest file (default 5)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    try:
        raw = read_config(args)
        config = ModelConfig.from_hf(raw)
        args.output.mkdir(parents=True, exist_ok=True)
        if any(args.output.iterdir()):
            print(f"{args.output} is not empty; wanted a new directory", file=sys.stderr)
            return 1
        write_tokenizer(args.output, config)
        total = write_random_checkpoint(
            args.output, config, registry, seed=args.seed, shard_bytes=int(args.shard_gb * 1e9)
        )
        _write_json(args.output / "config.json", raw)
    except (JaxMoeError, OSError, ValueError) as error:
        print(f"make_checkpoint: {error}", file=sys.stderr)
        return 1
    print(f"{args.output}: {total / 1e9:.2f} GB of random {config.architecture}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
