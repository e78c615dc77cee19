"""Solvers behind the transform systems: clip search, Cayley steps, affine heads, noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import formats as F
from jaxquant.kernels import matmul, to_dense
from jaxquant.observers import diagonal_blocks
from jaxquant.solvers import rtn
from jaxquant.solvers.affine import Heads, band, learn_affine
from jaxquant.solvers.cayley import cayley_step
from jaxquant.solvers.clip_search import clip_search
from jaxquant.solvers.noise import SAMPLE, noise_error, noisy, step_size
from jaxquant.statistics import hessian
from jaxquant.steps.affine import rounded_to
from jaxquant.transforms import shifted

KEY = jax.random.key(0)
W = jax.random.t(KEY, 3.0, (64, 24)) / 8
X = jax.random.normal(jax.random.key(1), (200, 64)) * jnp.exp(jnp.linspace(-2, 2, 64))
H = hessian(X)
UINT3_G32 = F.Format(F.int_grid(3, full=True), 32, zero_point=True)


def group_errors(q):
  """d^T H_gg d, per group and column: what the search promises to lower."""
  d = (jq.dequantize(q) - W).reshape(2, 32, -1)
  return jnp.einsum("grn,grs,gsn->gn", d, diagonal_blocks(H, 32), d)


def test_clipping_is_never_worse_for_any_group():
  before, after = group_errors(rtn(W, None, UINT3_G32)), group_errors(clip_search(W, H, UINT3_G32))
  assert bool((after <= before * (1 + 1e-5)).all())  # float32 sums in another order
  assert float(after.sum()) < 0.95 * float(before.sum())


def test_one_candidate_is_round_to_nearest():
  got, want = clip_search(W, H, UINT3_G32, ratios=(1.0,)), rtn(W, None, UINT3_G32)
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_clip_search_maps_over_layers():
  ws, hs = jnp.stack([W, 2 * W]), jnp.stack([H, H])
  both = jax.vmap(lambda w, h: clip_search(w, h, UINT3_G32))(ws, hs)
  np.testing.assert_array_equal(jq.dequantize(both)[0], jq.dequantize(clip_search(W, H, UINT3_G32)))


def test_clip_search_reads_blocks_on_the_diagonal():
  blocks = diagonal_blocks(H, UINT3_G32.block)
  got, want = (clip_search(W, h, UINT3_G32) for h in (blocks, H))
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_cayley_descends_on_rotations():
  """Towards a given rotation of the plane: the only minimum within the component of 1."""
  angle = 1.0
  target = jnp.array([[jnp.cos(angle), jnp.sin(angle)], [-jnp.sin(angle), jnp.cos(angle)]])
  loss = lambda x: jnp.square(x - target).sum()
  x, m = jnp.eye(2), jnp.zeros((2, 2))
  step = jax.jit(lambda x, m: cayley_step(x, jax.grad(loss)(x), m, 0.1, beta=0.5))
  for _ in range(60):
    x, m = step(x, m)
  assert float(loss(x)) < 1e-3 * float(loss(jnp.eye(2)))
  np.testing.assert_allclose(x @ x.T, jnp.eye(2), rtol=0, atol=1e-6)


HEADS = Heads(  # 2 heads of 8 channels, each read by 2
  W[:32, :16].reshape(32, 2, 8),
  W[32:, :].reshape(2, 2, 8, 24),
  hessian(X[:, :32]),
  hessian(X[:, 32:]),
)


@pytest.mark.parametrize("slope", [0.0, 0.1])
def test_affine_heads(slope):
  q = rounded_to(F.Format(F.int_grid(3)))
  a, losses, margin = jax.jit(lambda h: learn_affine(h, q, q, steps=40, slope=slope))(HEADS)
  assert float(losses.min()) < float(losses[0])
  assert float(margin) > 0  # strictly diagonally dominant all the way
  off = a - jnp.eye(8) * a
  assert bool((off != 0).any()) == (slope > 0)


def test_a_matrix_beats_scales():
  """The same steps, with and without the entries beside the diagonal."""
  q = rounded_to(F.Format(F.int_grid(3)))
  learn = lambda slope: jax.jit(lambda h: learn_affine(h, q, q, steps=120, slope=slope))(HEADS)[1]
  assert float(learn(0.1).min()) < float(learn(0.0).min())


def test_the_band_grows_from_the_diagonal():
  np.testing.assert_array_equal(band(5, jnp.float32(0), 1.0), jnp.eye(5))
  np.testing.assert_array_equal(band(5, jnp.float32(1), 0.5), 0.5 + 0.5 * jnp.eye(5))
  middle = band(5, jnp.float32(0.5), 1.0)
  np.testing.assert_array_equal(middle, jnp.abs(jnp.subtract.outer(*[jnp.arange(5)] * 2)) <= 2)


INT4_TENSOR = F.Format(F.int_grid(4), None, None)
RATIOS = tuple(i / 10 for i in range(1, 21))


def noise_ratio(x):
  """Output error with the noise that was found, over that without."""
  kernel = noisy(INT4_TENSOR, shifted, ratios=RATIOS, seed=0)(W, SAMPLE(x), F.INT8)
  with_noise = noise_error(SAMPLE(x), kernel.shift, kernel.kernel, INT4_TENSOR)
  return float(with_noise / noise_error(SAMPLE(x), 0 * kernel.shift, kernel.kernel, INT4_TENSOR))


def test_noise_is_never_worse_on_its_sample():
  assert noise_ratio(X) <= 1


def test_noise_helps_between_levels():
  """Values that cluster at 0.4 steps all lose 0.4; noise spreads the error over the step."""
  x = 0.4 + 0.05 * jax.random.normal(KEY, (256, 64))
  assert noise_ratio(x.at[:, 0].set(7.0)) < 0.9


def test_step_size_is_that_of_the_tensor():
  np.testing.assert_allclose(step_size(X, INT4_TENSOR), jnp.abs(X).max() / 7, rtol=1e-6)


def test_sampled_tokens_of_several_batches():
  batches = jnp.stack([X, 2 * X])
  both = SAMPLE.combine(SAMPLE.of(batches[0]), SAMPLE.of(batches[1]))
  assert both.shape == (100, 64)  # every fourth of 200 tokens, twice
  np.testing.assert_array_equal(both[50:], 2 * both[:50])


def test_a_shift_is_taken_back():
  b = jnp.linspace(-3, 3, 64)
  kernel = shifted(jq.quantize(W, F.INT8), b)
  y = matmul(kernel, X, lambda x, w: x @ to_dense(w))
  want = X @ to_dense(kernel)
  np.testing.assert_allclose(y, want, rtol=0, atol=1e-5 * float(jnp.abs(want).max()))
  with pytest.raises(ValueError, match=r"kernel \[64, 24\] is \[64\]"):
    shifted(W, b[:3])
