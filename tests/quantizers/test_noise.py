"""GaussWS: the distribution of the noise, its gradients, and what is kept for the backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.ad_checkpoint import saved_residuals  # public only as a printer

from jaxquant.formats import BF16
from jaxquant.ops.qdot import FLOAT, qdot
from jaxquant.quantizers import GaussianNoise, Parts
from jaxquant.quantizers.noise import rounded_normal
from jaxquant.rounding import round_to

CLOCK, KEY = np.int32(0), jax.random.key(3)
K, N, BLOCK = 48, 40, 16  # 40 is ragged
W = jax.random.normal(jax.random.key(0), (K, N))


def test_the_noise_is_a_rounded_normal():
  r = np.asarray(rounded_normal(KEY, (1000, 1000)))
  values, counts = np.unique(r, return_counts=True)
  assert values.tolist() == [-2, -1, 0, 1, 2]
  # Four standard deviations of a million draws: 1.9e-3 for the largest class.
  np.testing.assert_allclose(
    counts / r.size, [0.00135, 0.15731, 0.68269, 0.15731, 0.00135], atol=2e-3
  )
  assert abs(r.mean()) < 4 * r.std() / 1000


def test_noise_is_that_of_its_block():
  part = GaussianNoise(block=BLOCK, cast=None)
  theta = part.init(W)
  assert theta["bits"].shape == (3, 3)
  theta = {"bits": theta["bits"].at[1, 2].set(0.0)}
  units = np.asarray(part(theta, W, CLOCK, KEY) - W)
  for i in range(3):
    for j in range(3):
      at = np.s_[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
      bits = 4.0 if (i, j) == (1, 2) else 6.0
      r = units[at] / np.abs(W[at]).max() * 2 ** (bits - 1)
      np.testing.assert_allclose(r, np.round(r), atol=1e-4)  # a difference of float32 sums
      assert 1 <= np.abs(np.round(r)).max() <= 2


def test_many_bits_are_bf16_exactly():
  part = GaussianNoise(start=60.0, block=BLOCK)
  w = part(part.init(W), W, CLOCK, KEY)
  np.testing.assert_array_equal(w, round_to(W, BF16))
  np.testing.assert_array_equal(w, W.astype(jnp.bfloat16).astype(jnp.float32))


def test_gradients():
  part, g = GaussianNoise(block=BLOCK), jax.random.normal(jax.random.key(1), W.shape)
  theta = part.init(W)
  loss = lambda t, w: (part(t, w, CLOCK, KEY) * g).sum()
  grads, dw = jax.jit(jax.grad(loss, argnums=(0, 1)))(theta, W)
  np.testing.assert_array_equal(dw, g)
  noise = GaussianNoise(block=BLOCK, cast=None)(theta, W, CLOCK, KEY) - W
  by_block = (g * noise)[:16, :16].sum()  # d 2^(1 - b_t) / d b = -ln 2 (6 - 4) 2^(1 - b_t)
  np.testing.assert_allclose(grads["bits"][0, 0], by_block * -np.log(2) * 2, rtol=1e-3, atol=1e-4)


def test_more_bits_lower_the_loss_of_a_fitted_model():
  part, x = GaussianNoise(block=BLOCK), jax.random.normal(jax.random.key(2), (64, K))
  theta = part.init(W)
  loss = lambda t, key: jnp.square(x @ (part(t, W, CLOCK, key) - W)).mean()
  keys = jax.random.split(KEY, 8)
  grads = jax.jit(jax.vmap(lambda key: jax.grad(loss)(theta, key)["bits"]))(keys)
  assert (grads.mean(0) < 0).all()


def test_the_noise_is_not_kept():
  """Of the weight's shape, the backward pass has arguments and no intermediate."""
  part = Parts(weight=GaussianNoise(block=BLOCK))
  theta = part.init(W, jnp.ones((4, K)))

  def loss(theta, x, w):
    return part(theta, x, w, lambda x, w: qdot(x, w, FLOAT), CLOCK, KEY).sum()

  kept = saved_residuals(loss, theta, jnp.ones((4, K)), W)
  made = [str(where) for a, where in kept if a.shape == (K, N) and "argument" not in str(where)]
  assert len(made) <= 1, made  # the weight that the product saw, which dx needs


def test_noise_wants_a_key():
  part = Parts(weight=GaussianNoise(block=BLOCK))
  with pytest.raises(ValueError, match="rngs="):
    part(part.init(W, W.T), W.T, W, jnp.matmul, CLOCK, None)
  with pytest.raises(ValueError, match="stay in float"):
    part.kernel({}, W)
