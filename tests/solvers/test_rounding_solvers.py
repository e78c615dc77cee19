"""Learners of one weight, and kernels of two formats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import formats, kernels
from jaxquant.encoding import encode
from jaxquant.formats import Format
from jaxquant.kernels import Codebook, LowRank, Sum, pack_kernel, to_dense
from jaxquant.recipes.weight_only.ptq161 import SIGN, UINT4_ROW, behind_gain
from jaxquant.solvers import proxy_loss, rtn
from jaxquant.solvers.learned_rounding import Clipping, Rounding, Stored
from jaxquant.solvers.salient import salient, sign_mean
from jaxquant.statistics import hessian
from jaxquant.tensor import dequantize

K, N = 40, 12  # a ragged tail for blocks of 16
W = jax.random.normal(jax.random.key(0), (K, N)) * jnp.geomspace(0.1, 1.0, N)
H = hessian(jax.random.normal(jax.random.key(1), (200, K)))
UINT2, INT3 = (
  Format(formats.int_grid(2, full=True), 16, zero_point=True),
  Format(formats.int_grid(3), 16),
)
INT3_FP16 = Format(formats.int_grid(3), 16, scale=formats.FP16)


def book():
  index = jax.random.randint(jax.random.key(2), (K, N // 4), 0, 8).astype(jnp.uint8)
  words = jax.random.normal(jax.random.key(3), (8, 4)).astype(jnp.float16)
  return Codebook(index, words, jnp.ones((1, 1)), axis=-1)


def fifth(w=W, importance=None, **options):
  importance = jnp.arange(1.0, K + 1) if importance is None else importance
  return salient(w, importance, SIGN, rule=sign_mean, high=UINT4_ROW, **options)


LEARNERS = {
  "clipping, asymmetric": (Clipping(), lambda: rtn(W, None, UINT2)),
  "clipping, symmetric": (Clipping(), lambda: rtn(W, None, INT3)),
  "clipping, fp16 scales": (Clipping(), lambda: rtn(W, None, INT3_FP16)),
  "clipping, e2m1": (Clipping(), lambda: rtn(W, None, formats.MXFP4)),
  "rounding": (Rounding(), lambda: rtn(W, None, UINT2)),
  "rounding, low rank": (Rounding(3, scale_rate=1e-3), lambda: rtn(W, None, INT3)),
  "stored in a QTensor": (Stored(), lambda: pack_kernel(rtn(W, None, UINT2))),
  "stored in a codebook": (Stored(), book),
  "stored in a sum": (
    Stored(),
    lambda: Sum((pack_kernel(rtn(W, None, INT3)), LowRank(W[:, :2], W[:2]))),
  ),
  "stored in two formats": (Stored(), lambda: pack_kernel(fifth(wrap=behind_gain))),
}
TABLE = pytest.mark.parametrize("row", LEARNERS.values(), ids=LEARNERS)


def moved(theta):
  """Another theta, as training may leave it."""
  leaves, tree = jax.tree.flatten(theta)
  keys = jax.random.split(jax.random.key(7), len(leaves))
  new = [a + 0.1 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys)]
  return jax.tree.unflatten(tree, new)


@pytest.mark.sampled(2)
@TABLE
def test_finish_keeps_the_structure_of_the_start(row):
  """So that stacked layers can be replaced one by one, and packed decode sees nothing new."""
  learner, start = row
  kernel = pack_kernel(start())
  done = pack_kernel(learner.finish(moved(learner.start(W, kernel)), W, kernel))
  assert jax.tree.structure(done) == jax.tree.structure(kernel)
  assert jax.tree.map(lambda a: (a.shape, a.dtype), done) == jax.tree.map(
    lambda a: (a.shape, a.dtype), kernel
  )


@TABLE
def test_every_part_has_a_gradient(row):
  learner, start = row
  kernel = pack_kernel(start())
  theta = moved(learner.start(W, kernel))
  loss = lambda t: jnp.square(learner.dense(t, W, kernel) - W).sum()
  gradient = jax.jit(jax.grad(loss))(theta)
  for name, g in gradient.items():
    assert jnp.isfinite(g).all()
    assert g.any() or name == "low", name  # the low end idles where the high end sets the scale
    assert learner.rate(name) >= 0


@TABLE
def test_dense_is_what_finish_stores(row):
  """But for soft rounding, whose end the penalty brings about."""
  learner, start = row
  kernel = pack_kernel(start())
  theta = moved(learner.start(W, kernel))
  if isinstance(learner, Rounding):
    sign = jnp.sign(learner.up(theta, W, kernel) - 0.5)
    theta |= {"v": theta["v"] + 1e3 * sign} if learner.rank is None else {}
    if learner.rank is not None:
      return
  want = to_dense(learner.finish(theta, W, kernel))
  # float16 and reciprocal multiplication move the last bits; a code that flips would move a step.
  np.testing.assert_allclose(learner.dense(theta, W, kernel), want, rtol=2e-3, atol=2e-3)


def test_clipping_wide_open_is_rtn():
  for fmt in (UINT2, INT3, formats.MXFP4):
    q = rtn(W, None, fmt)
    theta = Clipping(first=40.0).start(W, q)
    done = Clipping().finish(theta, W, q)
    if fmt is formats.MXFP4:  # the scale grid is met by rounding, not by the floor rule
      continue
    np.testing.assert_allclose(dequantize(done), dequantize(q), atol=1e-6)


def test_rounding_starts_at_the_weight_and_stores_the_nearest():
  q = rtn(W, None, UINT2)
  for learner in (Rounding(), Rounding(4)):
    theta = learner.start(W, q)
    np.testing.assert_array_equal(dequantize(learner.finish(theta, W, q)), dequantize(q))
    inside = (q.data > -2) & (q.data < 1)  # not at the ends of the range, which clip
    # h starts within 1e-4 of 0 and 1, of a step below 1.4.
    np.testing.assert_allclose(learner.dense(theta, W, q)[inside], W[inside], atol=2e-4)
    assert inside.sum() > K


def test_rounding_to_neighbours_only():
  q = rtn(W, None, INT3)
  learner = Rounding()
  theta = {
    "scale": jnp.zeros_like(q.scale),
    "v": 100 * jax.random.normal(jax.random.key(5), (K, N)),
  }
  done = learner.finish(theta, W, q)
  assert jnp.abs(done.data - q.data).max() == 1
  up = learner.up(theta, W, q)
  assert ((up == 0) | (up == 1)).mean() > 0.98
  assert float(learner.penalty(theta, W, q, jnp.float32(1.0))) < 0.1 * learner.strength
  assert float(learner.penalty(learner.start(W, q), W, q, jnp.float32(0.1))) == 0  # warm-up


@pytest.mark.parametrize(
  ("learner", "fmt", "match"),
  [
    (Clipping(), formats.NVFP4, "one level of scales"),
    (Rounding(), formats.UINT4_G32_OFFSET, "no offset"),
    (Rounding(), formats.MXFP4, "e2m1"),
  ],
)
def test_errors_say_what_came(learner, fmt, match):
  with pytest.raises(ValueError, match=match):
    learner.start(W, rtn(W, None, fmt))
  with pytest.raises(ValueError, match="Codebook"):
    learner.start(W, book())


# Two formats.


def test_salient_rows_are_exactly_those_of_each_format():
  importance = jax.random.uniform(jax.random.key(4), (K,))
  q = fifth(importance=importance, share=0.2)
  dense, order = to_dense(q), np.argsort(-importance)
  few, rest = np.sort(order[:8]), np.sort(order[8:])
  np.testing.assert_array_equal(dense[few], dequantize(encode(W[few], UINT4_ROW)))
  mu, alpha = W[rest].mean(0), jnp.abs(W[rest]).mean(0)
  want = alpha * jnp.sign(W[rest] - mu) + mu
  np.testing.assert_allclose(dense[rest], want, rtol=1e-3, atol=1e-6)  # alpha in float16
  np.testing.assert_array_equal(np.sort(np.concatenate([t.index for t in q.terms])), np.arange(K))


def test_salient_follows_a_permutation_of_the_channels():
  importance, order = jnp.arange(1.0, K + 1), jax.random.permutation(jax.random.key(6), K)
  moved = to_dense(fifth(W[order], importance[order]))
  np.testing.assert_allclose(moved, to_dense(fifth())[order], atol=1e-6)  # means, in another order


def test_the_mask_matters():
  """Outlier channels in four bits; arXiv:2502.13179, table 5, in the proxy loss."""
  x = jax.random.normal(jax.random.key(8), (200, K)) * jnp.where(jnp.arange(K) % 5 == 0, 6.0, 1.0)
  h, amax = hessian(x), jnp.abs(x).max(0)
  loss = lambda q: float(proxy_loss(W, to_dense(q), h))
  random = fifth(importance=jax.random.uniform(jax.random.key(9), (K,)))
  none = rtn(W, None, SIGN, rule=sign_mean)
  assert loss(fifth(importance=amax)) < loss(random) < loss(none)


def test_bits_are_those_stored():
  n = 4096
  q = jax.eval_shape(
    lambda w, a: pack_kernel(salient(w, a, SIGN, rule=sign_mean, high=UINT4_ROW, wrap=behind_gain)),
    jnp.ones((n, n)),
    jnp.ones(n),
  )
  few = 820
  scales = n * (16 + 8) + n * (16 + 32)  # scale and zero point, in a byte; alpha and mu
  codes = n * (few * 4 + (n - few + (few - n) % 8))
  assert kernels.size_bits(q) == codes + scales + n * 16 + (n - few) * 32  # indices and gains
  assert kernels.size_bits(q) / n**2 < 1.65


def test_salient_failure_is_visible():
  assert jnp.isnan(to_dense(fifth(importance=jnp.zeros(K)))).all()
  for options, match in [({"share": 0.0}, "both formats"), ({"share": 1.0}, "both formats")]:
    with pytest.raises(ValueError, match=match):
      fifth(**options)
  with pytest.raises(ValueError, match=r"importance \[K\]"):
    salient(W, jnp.ones(3), SIGN)


def test_salient_under_vmap():
  stacked = jax.vmap(lambda w: fifth(w))(jnp.stack([W, 2 * W]))
  np.testing.assert_allclose(to_dense(stacked)[1], to_dense(fifth(2 * W)), atol=1e-6)
