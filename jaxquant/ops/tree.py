"""Sums over K in one order, whatever the number of devices that share it."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def tree_matmul(x: jax.Array, w: jax.Array, leaves: int, axis_name: str | None = None) -> jax.Array:
  """X @ w whose bits do not depend on how many shards K is cut into.

      y = ((y_0 + y_1) + (y_2 + y_3)) + ...,    y_i = x[:, K_i] @ w[K_i], K_i the i-th of `leaves`

  Tensor parallelism adds what its devices have, so that the order of the sum, and with it the last
  bits, changes with their number. Here the order is a binary tree over equal parts of K, and a
  shard is a subtree (TBIK, arXiv:2511.17826). Each leaf is one dot in float32.

  Args:
    x: [M, K]; inside shard_map the device's columns, [M, K/S].
    w: [K, N], or [K/S, N].
    leaves: parts of the whole K, a power of two; the largest number of shards that can be used.
    axis_name: mesh axis of shard_map that K is sharded over, in order; None: K is whole.

  Returns:
    Float32 [M, N], the same on all shards.

  Raises:
    ValueError: leaves is not a power of two, does not divide among the shards, or not K.

  Example:
    >>> import jax.numpy as jnp
    >>> tree_matmul(jnp.ones((1, 8)), jnp.ones((8, 1)), leaves=4).tolist()
    [[8.0]]
  """
  shards = 1 if axis_name is None else jax.lax.axis_size(axis_name)
  k, mine = x.shape[1], leaves // shards
  if leaves < 1 or leaves & (leaves - 1) or leaves % shards or k % mine:
    raise ValueError(
      f"tree_matmul: {leaves} leaves for K = {shards} shards of {k}. Take a power of two that the "
      "number of shards divides and that divides K."
    )
  product = lambda part: jnp.matmul(*part, precision="highest", preferred_element_type=jnp.float32)
  # One dot at a time: in a batched one, the number of leaves could choose how each is summed.
  parts = x.reshape(-1, mine, k // mine).swapaxes(0, 1), w.reshape(mine, k // mine, -1)
  total = _tree_sum(jax.lax.map(product, parts))
  return total if axis_name is None else _tree_sum(jax.lax.all_gather(total, axis_name))


def _tree_sum(x: jax.Array) -> jax.Array:
  """Sum over the first axis, a power of two long, of neighbours first."""
  while len(x) > 1:
    x = x[0::2] + x[1::2]
  return x[0]
