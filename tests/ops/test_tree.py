"""The same bits for any number of shards of K."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxquant.ops.tree import tree_matmul

M, K, N, LEAVES = 3, 768, 40, 8
X = np.random.default_rng(0).standard_normal((M, K)).astype(np.float32)
W = np.random.default_rng(1).standard_normal((K, N)).astype(np.float32)


def sharded(dot, shards):
  mesh = Mesh(np.array(jax.devices()[:shards]), ("k",))
  run = functools.partial(dot, axis_name="k")
  specs = {"in_specs": (P(None, "k"), P("k")), "out_specs": P(), "check_vma": False}
  return np.asarray(jax.jit(jax.shard_map(run, mesh=mesh, **specs))(X, W))


def added(x, w, axis_name):
  """What tensor parallelism does."""
  return jax.lax.psum(jnp.matmul(x, w), axis_name)


def test_a_tree_has_the_same_bits_for_any_number_of_shards():
  whole = np.asarray(jax.jit(functools.partial(tree_matmul, leaves=LEAVES))(X, W))
  np.testing.assert_allclose(whole, X.astype(np.float64) @ W, atol=5e-5)  # float32 sums of 768
  dot = functools.partial(tree_matmul, leaves=LEAVES)
  for shards in (1, 2, 4):
    np.testing.assert_array_equal(sharded(dot, shards), whole)
  assert (sharded(added, 4) != sharded(added, 2)).any()


@pytest.mark.parametrize("leaves", [0, 3, 512])
def test_uneven_trees_are_refused(leaves):
  with pytest.raises(ValueError, match=f"{leaves} leaves for K = 1 shards of 768"):
    tree_matmul(X, W, leaves)


def test_more_shards_than_leaves_are_refused():
  with pytest.raises(ValueError, match="2 leaves for K = 4 shards of 192"):
    sharded(functools.partial(tree_matmul, leaves=2), 4)
