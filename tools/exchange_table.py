#!/usr/bin/env python3
"""What the devices of a host send each other for one MoE layer: SmallEP beside standard all-to-all.

    tools/exchange_table.py --tokens=32768 --ranks=2

Compiles the exchanges (jaxmoe/moe/small_ep.py) for that many CPU devices, runs nothing, and counts
the bytes of their collectives. Defaults are DeepSeek-V3's. Standard expert parallelism is given
twice: with buffers for a routing that is perfectly even, which none is, and with such as no routing
exceeds, which programs of fixed shapes need to lose no token.
"""

from __future__ import annotations

import argparse
import os


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        *(("tokens", 32768), ("hidden", 7168), ("experts", 256), ("per_token", 8), ("ranks", 2)),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_NUM_CPU_DEVICES"] = str(given.ranks)
    print(
        f"{given.tokens} tokens of {given.hidden} (BF16 in, float32 sums back), {given.per_token} "
        f"of {given.experts} experts each, {given.ranks} devices\n"
    )
    print("| exchange | collectives | to the experts | back | a device sends |")
    print("|---|---|---|---|---|")
    for name, kinds, there, back in rows(
        given.tokens, given.hidden, given.experts, given.per_token, given.ranks
    ):
        mib = [f"{n / 2**20:.0f} MiB" for n in (there, back, there + back)]
        print(f"| {name} | {kinds} | {' | '.join(mib)} |")


def rows(tokens: int, hidden: int, experts: int, per_token: int, ranks: int):
    """(name, collectives, bytes there, bytes back) a device, of every exchange."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from jaxmoe.common.collectives import count_collectives, exchanged_bytes
    from jaxmoe.moe.small_ep import AllToAll, SmallEp

    mesh = Mesh(jax.local_devices(backend="cpu")[:ranks], ("rank",))
    spec = PartitionSpec("rank")
    own = -(-tokens // ranks)
    even = -(-own * per_token // ranks)

    def like(width: int, dtype: jax.typing.DTypeLike) -> jax.ShapeDtypeStruct:
        shape = own * ranks, width
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def mapped(f):
        shard = jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
        return jax.jit(shard)

    for name, exchange in (
        ("SmallEP", SmallEp("rank", ranks, experts)),
        ("all-to-all, even routing", AllToAll("rank", ranks, experts, even)),
        ("all-to-all, any routing", AllToAll("rank", ranks, experts)),
    ):
        send, back = mapped(exchange.send), mapped(exchange.back)
        x = like(hidden, jnp.bfloat16), like(per_token, jnp.int32), like(per_token, jnp.float32)
        sent = jax.eval_shape(send, *x)
        y = jax.ShapeDtypeStruct(sent.x.shape, jnp.float32)
        texts = send.lower(*x).compile().as_text(), back.lower(y, sent.kept).compile().as_text()
        kinds = sum((count_collectives(text) for text in texts), start=count_collectives(""))
        there, home = (sum(exchanged_bytes(text, ranks).values()) for text in texts)
        yield name, ", ".join(f"{n} {kind}" for kind, n in kinds.items()), there, home


if __name__ == "__main__":
    main()
