"""A forward pass of our own, in jax, that reads MaxText's weights layer by layer."""
