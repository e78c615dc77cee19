"""The algebra of kernels: one table of nodes, each row buys every test."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

import jaxquant as jq
from jaxquant import formats, kernels, transforms
from jaxquant.kernels import (
  Codebook,
  Entries,
  LowRank,
  Pre,
  Sparse,
  Sum,
  Times,
  is_node,
  matmul,
  to_dense,
)

K, N, M, L = 64, 24, 5, 3


@struct.dataclass
class Diagonal:
  """A node of a user: d on the diagonal, [K, K]."""

  d: jax.Array


@matmul.register
def _(kernel: Diagonal, x, dot):
  del dot
  return x * kernel.d.astype(x.dtype)


@to_dense.register
def _(kernel: Diagonal):
  return kernel.d[..., None] * jnp.eye(kernel.d.shape[-1])


@struct.dataclass
class Identity(Diagonal):
  """A subclass, which nobody registered."""


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def weight(seed):
  return normal(seed, K, N)


def integers(seed, *shape):
  """Small integers: their float32 products and sums are exact in any order."""
  return jax.random.randint(jax.random.key(seed), shape, -3, 4).astype(jnp.float32)


def sparse(seed):
  index = jnp.array([3, 17, 60 - seed], jnp.int32)
  return Sparse(index, integers(seed, 3, N), jnp.zeros((K, 0)))


def codebook(seed):
  index = jax.random.randint(jax.random.key(seed), (K // 4, N), 0, 8).astype(jnp.uint8)
  return Codebook(index, integers(seed, 8, 4), jnp.full((1, N), 0.5))


def along_n(seed):
  index = jax.random.randint(jax.random.key(seed), (K, N // 4), 0, 8).astype(jnp.uint8)
  return Codebook(index, integers(seed, 8, 4), power_of_two(seed)[:, None], axis=-1)


def sparse_of_nodes(seed):
  rows = jq.quantize(integers(seed, 3, N), formats.MXINT8)
  return Sparse(jnp.array([3, 17, 60 - seed], jnp.uint8), rows, jnp.zeros((K, 0)))


def entries(seed):
  index = jax.random.choice(jax.random.key(seed), K * N, (7,), replace=False)
  return Entries(index, integers(seed, 7).astype(jnp.float16), jnp.zeros((0, K, N)))


def low_rank(seed):
  return LowRank(integers(seed, K, 2), integers(seed + 1, 2, N))


def power_of_two(seed):
  return 2.0 ** integers(seed, K)


def packed(seed):
  """On the grid already, so that every product below is exact."""
  return jq.quantize(integers(seed, K, N), formats.MXINT8)


def values(seed):
  return jq.encode(integers(seed, K, N), formats.MXINT8)


NODES = {
  "array": lambda s: integers(s, K, N),
  "values": values,
  "packed": packed,
  "pre": lambda s: Pre(transforms.scale(power_of_two(s)), packed(s)),
  "pre of pre": lambda s: Pre(
    transforms.permute(jnp.arange(K)[::-1]), Pre(transforms.scale(power_of_two(s)), packed(s))
  ),
  "low rank": low_rank,
  "sparse": sparse,
  "entries": entries,
  "codebook": codebook,
  "codebook along N": along_n,
  "sparse of nodes": sparse_of_nodes,
  "times": lambda s: Times((packed(s), low_rank(s))),
  "sum": lambda s: Sum((packed(s), low_rank(s))),
  "sum of all": lambda s: Sum(
    (packed(s), low_rank(s), sparse(s), entries(s), codebook(s), values(s), Times((values(s),)))
  ),
  "pre of sum": lambda s: Pre(transforms.scale(power_of_two(s)), Sum((packed(s), sparse(s)))),
  "sum of sum": lambda s: Sum((Sum((packed(s), sparse(s))), low_rank(s))),
  "registered by a user": lambda s: Sum((Diagonal(integers(s, K)), Identity(integers(s, K)))),
}
TABLE = pytest.mark.parametrize("make", NODES.values(), ids=NODES)


def dot(x, w):
  return x @ to_dense(w)


def stacked(make):
  return jax.tree.map(lambda *a: jnp.stack(a), *(make(i) for i in range(L)))


@pytest.mark.sampled(2)
@TABLE
def test_matmul_is_the_product_with_the_dense_kernel(make):
  kernel, x = make(0), integers(9, M, K)
  want = np.asarray(x) @ np.asarray(to_dense(kernel))
  np.testing.assert_array_equal(matmul(kernel, x, dot), want)
  np.testing.assert_array_equal(jax.jit(matmul, static_argnums=2)(kernel, x, dot), want)


@pytest.mark.sampled(2)
@TABLE
def test_leading_axes(make):
  """Stacked layers: to_dense takes them as they are; scan and vmap take them off."""
  kernel, x = stacked(make), integers(9, M, K)
  want = jnp.stack([to_dense(make(i)) for i in range(L)])
  chex.assert_trees_all_equal(to_dense(kernel), want)
  by_vmap = jax.vmap(lambda w: matmul(w, x, dot))(kernel)
  by_scan = jax.lax.scan(lambda c, w: (c, matmul(w, x, dot)), 0, kernel)[1]
  chex.assert_trees_all_equal(by_vmap, x @ want)
  chex.assert_trees_all_equal(by_scan, x @ want)


@TABLE
def test_packing_keeps_the_value(make):
  chex.assert_trees_all_equal(to_dense(kernels.pack_kernel(make(0))), to_dense(make(0)))


@TABLE
def test_tree_maps_stop_at_nodes(make):
  node = make(0)
  tree = {"a": {"kernel": node, "bias": jnp.ones(N)}, "b": (node, None)}
  seen = []
  out = jq.map_kernels(lambda k: seen.append(type(k)) or k, tree)
  chex.assert_trees_all_equal(out, tree)
  want = [jax.Array if isinstance(node, jax.Array) else type(node)] * 2 + [jax.Array]
  same = lambda names: sorted("Array" if "Array" in n.__name__ else n.__name__ for n in names)
  assert same(seen) == same(want)


@TABLE
def test_size_is_that_of_its_arrays(make):
  kernel = kernels.pack_kernel(make(0))
  assert kernels.size_bits(kernel) == 8 * sum(a.nbytes for a in jax.tree.leaves(kernel))


@pytest.mark.parametrize("name", formats.named())
def test_packed_size_is_that_of_its_arrays(name):
  """70 rows: tails of blocks, bytes that are not full."""
  q = jax.eval_shape(lambda w: jq.pack(jq.encode(w, formats.named()[name])), jnp.ones((70, 24)))
  held = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(q))
  assert kernels.size_bits(q) == 8 * held


def test_dot_sees_the_leaves_that_are_quantized():
  """Thin and sparse parts stay in high precision; a rule applies to arrays and QTensors."""
  seen = []

  def spy(x, w):
    seen.append(type(w).__name__)
    return dot(x, w)

  x = integers(9, M, K)
  matmul(NODES["sum of all"](0), x, spy)
  # packed, decoded codebook, values, decoded product
  assert seen == ["QTensor", "ArrayImpl", "QTensor", "ArrayImpl"]


def test_is_node():
  assert all(is_node(make(0)) for name, make in NODES.items() if name != "array")
  assert is_node(Identity(jnp.ones(K)))
  plain = (jnp.ones(3), np.ones(3), 1.0, None, {"a": 1}, "text", jax.ShapeDtypeStruct((2,), "f4"))
  assert not any(is_node(x) for x in plain)


@pytest.mark.parametrize("kernel", [{"w": 1}, "text", None, [jnp.ones((2, 2))]])
def test_unknown_nodes_are_refused(kernel):
  message = f"no matmul for a kernel of type {type(kernel).__name__}.*kernels.matmul.register"
  with pytest.raises(TypeError, match=message):
    matmul(kernel, jnp.ones((1, 2)), dot)


def test_compute_dtype_is_that_of_x():
  x = integers(9, M, K).astype(jnp.bfloat16)
  low = lambda x, w: (x @ to_dense(w).astype(x.dtype)).astype(x.dtype)
  assert matmul(NODES["sum of all"](0), x, low).dtype == jnp.bfloat16
