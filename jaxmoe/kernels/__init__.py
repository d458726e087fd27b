"""GPU kernels (Pallas, Triton), each with an oracle in jnp. Run with `interpret=True` they are
ordinary jax and work anywhere.
"""
