"""Hundreds of seeded mutations of headers and indices: a load is bit-exact, or refused by name."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import INDEX

from jaxmoe.common.errors import CheckpointError
from jaxmoe.config.model_config import ModelConfig
from jaxmoe.models import registry
from jaxmoe.weights.loader import plan_load
from jaxmoe.weights.random_checkpoint import write_random_checkpoint
from jaxmoe.weights.safetensors_reader import Checkpoint

NUM_HEADERS, NUM_INDICES = 400, 200
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
}
ODD_VALUES: list[Any] = [
    *(
        None,
        True,
        -1,
        0,
        1,
        2**31,
        2**63,
        2**64 + 8,
        1.5,
        "",
        "F16",
        "F8_E5M2",
        "I8",
        "../x",
        "a\0b",
    ),
    *([], [0], [-1, 5], [0, 2**64], [2**32, 2**32], {}, {"a": {}}, [[1]], "\ud800"),
]


def load(directory: Path) -> dict[str, bytes]:
    """All tensors a load would read, without a store to put them in."""
    config = ModelConfig.from_hf(CONFIG)
    with Checkpoint.open(directory) as checkpoint:
        table = plan_load(checkpoint, config, registry, "bfloat16", 1).table
        infos = [info for leaf in table.leaves for info in leaf.infos]
        infos += [m.weight for m in table.matrices]
        infos += [m.scale for m in table.matrices if m.scale is not None]
        return {info.name: bytes(checkpoint.read(info)) for info in infos}


def mutate_bytes(rng: random.Random, text: bytes) -> bytes:
    data, at = bytearray(text), rng.randrange(len(text))
    length = rng.randrange(1, 9)
    match rng.randrange(6):
        case 0:
            data[at] ^= 1 << rng.randrange(8)
        case 1:
            del data[at : at + length]
        case 2:
            data[at:at] = rng.randbytes(length)
        case 3:
            data[at:at] = data[at : at + length]
        case 4:
            digits = [i for i, c in enumerate(data) if chr(c).isdigit()]
            data[rng.choice(digits)] = ord(rng.choice("0123456789"))
        case _:
            other = rng.randrange(len(text))
            data[at], data[other] = data[other], data[at]
    return bytes(data)


def mutate_json(rng: random.Random, value: dict[str, Any]) -> dict[str, Any]:
    """Replaces, drops, renames or copies one value anywhere in the tree."""
    value = copy.deepcopy(value)
    node: Any = value
    while True:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        child = node[key]
        if not isinstance(child, (dict, list)) or not child or rng.random() < 0.3:
            break
        node = child
    match rng.randrange(4):
        case 0:
            node[key] = rng.choice(ODD_VALUES)
        case 1:
            del node[key]
        case 2 if isinstance(node, dict):
            node[rng.choice(["", "x", str(key) + "_scale_inv", str(key)[:-1]])] = node.pop(key)
        case 2:
            node.append(child)
        case _:
            other = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
            # Not two whole tensors: of one size, that is a sound checkpoint of another model.
            if not isinstance(child, dict):
                node[key], node[other] = node[other], node[key]
    return value


def mutate_file(rng: random.Random, raw: bytes) -> bytes:
    """A whole safetensors file with something wrong before its data, or with its length."""
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = raw[8 : 8 + length], raw[8 + length :]
    match rng.randrange(8):
        case 0:
            return raw[: rng.randrange(len(raw))]
        case 1:
            return raw + rng.randbytes(rng.randrange(1, 100))
        case 2:  # the length alone
            near = length + rng.randrange(-9, 9)
            wrong = rng.choice([0, 1, near, len(raw), 2**62, 2**64 - 1, rng.randrange(2**64)])
            return struct.pack("<Q", wrong) + raw[8:]
        case 3 | 4:
            header = mutate_bytes(rng, header)
        case _:
            header = json.dumps(mutate_json(rng, json.loads(header))).encode()
    return struct.pack("<Q", len(header)) + header + data


def run(
    directory: Path, file: Path, mutate: Callable[[random.Random, bytes], bytes], count: int
) -> dict[str, int]:
    """Applies `count` mutations to the file, one at a time; counts how they ended."""
    original, source = file.read_bytes(), load(directory)
    ends = {"exact": 0, "refused": 0}
    for seed in range(count):
        file.write_bytes(mutate(random.Random(seed), original))
        try:
            loaded = load(directory)
        except CheckpointError as error:
            ends["refused"] += 1
            assert str(directory) in str(error), (seed, error)
        else:
            ends["exact"] += 1
            assert loaded == source, f"seed {seed}: wrong values were loaded"
    file.write_bytes(original)
    assert load(directory) == source
    return ends


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same model in one file, and in several with an index."""
    single, sharded = tmp_path_factory.mktemp("single"), tmp_path_factory.mktemp("sharded")
    config = ModelConfig.from_hf(CONFIG)
    write_random_checkpoint(single, config, registry)
    write_random_checkpoint(sharded, config, registry, shard_bytes=6_000)
    assert load(single) == load(sharded)
    return single, sharded


def test_mutated_headers(directories: tuple[Path, Path]) -> None:
    ends = run(directories[0], directories[0] / "model.safetensors", mutate_file, NUM_HEADERS)
    # Some mutations change nothing that matters (spaces, metadata, the order of names).
    assert ends["refused"] > 0.8 * NUM_HEADERS, ends


def test_mutated_indices(directories: tuple[Path, Path]) -> None:
    def mutate(rng: random.Random, raw: bytes) -> bytes:
        if rng.random() < 0.5:
            return mutate_bytes(rng, raw)
        return json.dumps(mutate_json(rng, json.loads(raw))).encode()

    ends = run(directories[1], directories[1] / INDEX, mutate, NUM_INDICES)
    assert ends["refused"] > 0.5 * NUM_INDICES, ends


def test_mutated_shards(directories: tuple[Path, Path]) -> None:
    shard = sorted(directories[1].glob("model-*.safetensors"))[1]
    ends = run(directories[1], shard, mutate_file, 100)
    assert ends["refused"] > 80, ends
