"""Loads damaged checkpoints, one after the other, and says how each load ended: a JSON line each.

r07_child FOLDER clean|damage BEGIN END FAULTS.so
"""

from __future__ import annotations

import ctypes
import gc
import json
import random
import resource
import shutil
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from support import tiny_models
from support.checkpoints import INDEX, leaves_of, store_bytes
from weights.test_mutations import mutate_bytes, mutate_file, mutate_json

from jaxmoe.common.errors import CapacityError, JaxMoeError
from jaxmoe.config.model_config import ModelConfig
from jaxmoe.engine.directory import read_directory
from jaxmoe.ffi.cpu_runtime import CpuRuntime
from jaxmoe.models import registry
from jaxmoe.weights.loader import load_model
from jaxmoe.weights.safetensors_reader import Checkpoint
from jaxmoe.weights.safetensors_writer import write_checkpoint

CASE = "qwen3_moe_fp8"
DEMO = Path(__file__).parents[2] / "jaxmoe" / "demo"
EIO, SHORT, CUT = 1, 2, 3


class Damage:
    """Ways to damage the checkpoint in `folder`; each returns what it did."""

    def __init__(self, folder: Path, faults: ctypes.CDLL) -> None:
        self.folder, self.faults = folder, faults
        self.shards = sorted(folder.glob("*.safetensors"))
        self.original = {p: p.read_bytes() for p in folder.iterdir()}

    def restore(self) -> None:
        self.faults.fault_plan(0, -1)
        for path, data in self.original.items():
            if not path.exists() or path.read_bytes() != data:
                path.write_bytes(data)

    def _edit(self, path: Path, change: Callable[[bytes], bytes]) -> None:
        path.write_bytes(change(self.original[path]))

    def header(self, rng: random.Random) -> None:
        self._edit(rng.choice(self.shards), lambda raw: mutate_file(rng, raw))

    def index(self, rng: random.Random) -> None:
        if rng.random() < 0.5:
            self._edit(self.folder / INDEX, lambda raw: mutate_bytes(rng, raw))
        else:
            self._edit(self.folder / INDEX, lambda raw: _json(mutate_json(rng, json.loads(raw))))

    def config(self, rng: random.Random) -> None:
        name = rng.choice(["config.json", "config.json", "generation_config.json"])
        if rng.random() < 0.4:
            self._edit(self.folder / name, lambda raw: mutate_bytes(rng, raw))
        else:
            self._edit(self.folder / name, lambda raw: _json(mutate_json(rng, json.loads(raw))))

    def tokenizer(self, rng: random.Random) -> None:
        name = rng.choice(["tokenizer.json", "tokenizer_config.json"])
        if rng.random() < 0.6:
            self._edit(self.folder / name, lambda raw: mutate_bytes(rng, raw))
        else:
            self._edit(self.folder / name, lambda raw: _json(mutate_json(rng, json.loads(raw))))

    def data(self, rng: random.Random) -> None:
        """Other weights are weights too: what is loaded must be what is in the file now."""

        def change(raw: bytes) -> bytes:
            out, start = bytearray(raw), 8 + struct.unpack("<Q", raw[:8])[0]
            for _ in range(rng.randrange(1, 5)):
                out[rng.randrange(start, len(out))] ^= 1 << rng.randrange(8)
            return bytes(out)

        self._edit(rng.choice(self.shards), change)

    def scales(self, rng: random.Random) -> None:
        """A block scale that is no number, or zero."""
        value = rng.choice([np.nan, np.inf, -np.inf, 0.0, 1e38])
        while True:
            path = rng.choice(self.shards)
            header, start = _header(self.original[path])
            found = [i for n, i in header.items() if n.endswith("_scale_inv")]
            if found:
                break
        info = rng.choice(found)
        size = 4 if info["dtype"] == "F32" else 2
        at = start + rng.randrange(info["data_offsets"][0], info["data_offsets"][1], size)
        data = np.array(value, np.float32 if size == 4 else ml_dtypes.bfloat16).tobytes()
        self._edit(path, lambda raw: raw[:at] + data + raw[at + size :])

    def cut(self, rng: random.Random) -> None:
        self._edit(rng.choice(self.shards), lambda raw: raw[: rng.randrange(len(raw))])

    def missing(self, rng: random.Random) -> None:
        rng.choice(self.shards).unlink()

    def swapped(self, rng: random.Random) -> None:
        one, other = rng.sample(self.shards, 2)
        one.write_bytes(self.original[other])
        if rng.random() < 0.7:
            other.write_bytes(self.original[one])

    def while_read(self, rng: random.Random) -> None:
        self.faults.fault_plan(rng.choice([EIO, SHORT, CUT]), rng.randrange(120))


KINDS = (
    *("header", "header", "index", "config", "config", "tokenizer", "data", "scales", "cut"),
    *("missing", "swapped", "while_read", "while_read"),
)


def _json(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def _header(raw: bytes) -> tuple[dict[str, Any], int]:
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    return header, 8 + length


def tensors_in(folder: Path) -> dict[str, bytes]:
    """Every tensor's bytes, by a reader that knows nothing of the one under test."""
    out = {}
    for path in sorted(folder.glob("*.safetensors")):
        raw = path.read_bytes()
        header, start = _header(raw)
        for name, info in header.items():
            first, last = info["data_offsets"]
            out[name] = raw[start + first : start + last]
    return out


def load(folder: Path, runtime: CpuRuntime) -> tuple[dict[str, np.ndarray], bytes]:
    """Everything a start reads: leaves by name, and all experts' bytes."""
    read_directory(folder)
    with Checkpoint.open(folder) as checkpoint:
        config = ModelConfig.from_hf(checkpoint.config())
        model = load_model(checkpoint, config, registry, runtime, progress=False)
    try:
        return {k: v.copy() for k, v in leaves_of(model).items()}, store_bytes(model)
    finally:
        model.close()


def expected(folder: Path, tensors: Mapping[str, bytes]) -> tuple[bytes, bytes]:
    """All experts' bytes as the store holds them, and the embedding's."""
    config = tiny_models.hf_config(CASE)
    parts = []
    for layer in range(config["num_hidden_layers"]):
        for expert in range(config["num_experts"]):
            for which in ("gate", "up", "down"):
                name = f"model.layers.{layer}.mlp.experts.{expert}.{which}_proj.weight"
                if name not in tensors:
                    break
                parts.append(tensors[name])
                scale = tensors[f"{name}_scale_inv"]
                if len(scale) and _is_bf16(folder, f"{name}_scale_inv"):
                    scale = np.frombuffer(scale, ml_dtypes.bfloat16).astype(np.float32).tobytes()
                parts.append(scale)
    return b"".join(parts), tensors["model.embed_tokens.weight"]


_BF16: dict[str, bool] = {}


def _is_bf16(folder: Path, name: str) -> bool:
    if not _BF16:
        for path in folder.glob("*.safetensors"):
            for n, info in _header(path.read_bytes())[0].items():
                _BF16[n] = info["dtype"] == "BF16"
    return _BF16[name]


def end_of_load(folder: Path, runtime: CpuRuntime, sound: Any) -> tuple[str, str]:
    """exact, refused or wrong, and the words."""
    try:
        leaves, experts = load(folder, runtime)
    except JaxMoeError as error:
        named = str(folder) in str(error) or any(p.name in str(error) for p in folder.iterdir())
        # Values of config.json are refused by their key; what is too large, by its size.
        named = named or isinstance(error, CapacityError) or _is_config_key(folder, str(error))
        return ("refused" if named else "wrong"), str(error)
    except Exception as error:
        return "wrong", f"{type(error).__name__}: {error}"
    try:
        want_experts, want_embedding = expected(folder, tensors_in(folder))
    except Exception:  # the files were cut while they were read, after all of them had been
        want_experts, want_embedding = sound
    same = experts == want_experts and leaves["embedding.data"].tobytes() == want_embedding
    return ("exact", "") if same else ("wrong", "other values than the file's")


def _is_config_key(folder: Path, words: str) -> bool:
    known = {"architectures", "quantization_config", *tiny_models.hf_config(CASE)}
    return any(key in words for key in known) or "config" in words


def make(folder: Path) -> None:
    write_checkpoint(folder, dict(tiny_models.make_tensors(CASE)), num_shards=3)
    (folder / "config.json").write_text(json.dumps(tiny_models.hf_config(CASE)))
    (folder / "generation_config.json").write_text(
        json.dumps({"temperature": 0.5, "top_p": 0.9, "top_k": 20, "eos_token_id": [1]})
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder)


def main(argv: list[str]) -> None:
    folder, what, begin, end = Path(argv[0]), argv[1], int(argv[2]), int(argv[3])
    make(folder)
    damage = Damage(folder, ctypes.CDLL(argv[4]))
    sound = expected(folder, tensors_in(folder))
    runtime = CpuRuntime(num_threads=1)
    for seed in range(begin, end):
        rng = random.Random(seed)
        kind = "clean" if what == "clean" else KINDS[seed % len(KINDS)]
        if what != "clean":
            getattr(damage, kind)(rng)
        how, words = end_of_load(folder, runtime, sound)
        if seed % 8 == 0:
            gc.collect()  # else what it has not come to yet decides the peak
        damage.restore()
        print(
            json.dumps({"seed": seed, "kind": kind, "end": how, "words": words[:300]}), flush=True
        )
    runtime.close()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"peak_mib": peak}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
