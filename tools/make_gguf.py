"""Writes a GGUF of random weights in the dims of a Qwen3-MoE config.json, for rivals of
`jaxmoe_bench --against=llama-bench:PATH`.

    pip install gguf
    tools/make_gguf.py --config=configs/bench/qwen3_30b_a3b_cut.json --output=/data/cut_q8_0.gguf

Every linear map is of --type (Q8_0: 1.0625 bytes a weight, beside FP8; Q4_0: 0.5625, beside INT4),
norms and routers are F32. It has no tokenizer: llama-bench feeds token ids.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import gguf
import numpy as np

_BLOCK = 32  # weights of a block of Q8_0 and Q4_0
_REPEAT_BLOCKS = 65_521  # random blocks, repeated; prime, so that no row length divides it


def random_blocks(kind: gguf.GGMLQuantizationType, rng: np.random.Generator) -> np.ndarray:
    """uint8 `[blocks, bytes]`: an FP16 scale and codes, of weights about 1/64 in size."""
    codes = 32 if kind == gguf.GGMLQuantizationType.Q8_0 else 16
    most = 127 if codes == 32 else 8
    scale = (rng.uniform(0.5, 1.5, (_REPEAT_BLOCKS, 1)) / (64 * most)).astype(np.float16)
    values = rng.integers(0, 256, (_REPEAT_BLOCKS, codes), np.uint8)
    return np.concatenate([scale.view(np.uint8), values], axis=1)


def tensors(c: dict) -> list[tuple[str, tuple[int, ...], bool]]:
    """Name, shape (outputs first) and whether it is quantized, as llama.cpp's qwen3moe has them."""
    d, f, v = c["hidden_size"], c["moe_intermediate_size"], c["vocab_size"]
    experts, head = c["num_experts"], c["head_dim"]
    q, kv = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
    found = [("token_embd", (v, d), True), ("output_norm", (d,), False), ("output", (v, d), True)]
    for i in range(c["num_hidden_layers"]):
        found += [
            (f"blk.{i}.{name}", shape, quantized)
            for name, shape, quantized in (
                ("attn_norm", (d,), False),
                ("attn_q", (q, d), True),
                ("attn_k", (kv, d), True),
                ("attn_v", (kv, d), True),
                ("attn_output", (d, q), True),
                ("attn_q_norm", (head,), False),
                ("attn_k_norm", (head,), False),
                ("ffn_norm", (d,), False),
                ("ffn_gate_inp", (experts, d), False),
                ("ffn_gate_exps", (experts, f, d), True),
                ("ffn_up_exps", (experts, f, d), True),
                ("ffn_down_exps", (experts, d, f), True),
            )
        ]
    return found


def write(config: dict, path: Path, type_name: str, seed: int = 0) -> None:
    if config["architectures"] != ["Qwen3MoeForCausalLM"]:
        raise SystemExit(f"got {config['architectures']}, wanted Qwen3MoeForCausalLM")
    kind = gguf.GGMLQuantizationType[type_name]
    rng = np.random.default_rng(seed)
    blocks = random_blocks(kind, rng).reshape(-1)
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    wanted = tensors(config)
    bytes_a_block = len(blocks) // _REPEAT_BLOCKS
    for name, shape, quantized in wanted:
        columns = shape[-1]
        if quantized:
            assert columns % _BLOCK == 0, (name, shape)
            stored = (*shape[:-1], columns // _BLOCK * bytes_a_block)
            writer.add_tensor_info(
                f"{name}.weight", stored, np.dtype(np.uint8), int(np.prod(stored)), raw_dtype=kind
            )
        else:
            size = 4 * int(np.prod(shape))
            writer.add_tensor_info(f"{name}.weight", shape, np.dtype(np.float32), size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, shape, quantized in wanted:
        if quantized:
            # Views of the repeated blocks, from a place of its own for every tensor.
            count = int(np.prod(shape)) // _BLOCK * bytes_a_block
            start = int(rng.integers(_REPEAT_BLOCKS)) * bytes_a_block
            writer.write_tensor_data(np.resize(np.roll(blocks, -start), count))
        else:
            spread = 0.02 if len(shape) > 1 else 0.1
            mean = 0.0 if len(shape) > 1 else 1.0
            writer.write_tensor_data(rng.normal(mean, spread, shape).astype(np.float32))
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--type", default="Q8_0", choices=["Q8_0", "Q4_0"])
    parser.add_argument("--layers", type=int, help="instead of the config's")
    args = parser.parse_args()
    config = json.loads(args.config.read_text())
    if args.layers:
        config["num_hidden_layers"] = args.layers
    write(config, args.output, args.type)


if __name__ == "__main__":
    main()
