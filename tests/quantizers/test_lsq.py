"""Learned steps: gradients against the published formulas, and where they start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.quantizers import LsqInput, LsqWeight, TokenRange
from jaxquant.tensor import dequantize

CLOCK = np.int32(0)
A = np.array([[-1.3, 0.21], [0.07, 0.9], [0.4, -0.31], [2.2, 5.0], [0.9, 0.33]], np.float32)
G = np.array([[1.0, -2.0], [0.5, 3.0], [-1.0, 0.25], [2.0, -0.5], [1.5, 0.7]], np.float32)


def formulas(a, s, beta, lo, hi, g):
  """Gradients to (a, s, beta): eqs. 3 and 5 of LSQ, and LSQ+'s offset."""
  t = (a.astype(np.float64) - beta) / s
  inside = (t > lo) & (t < hi)
  ends = np.where(t <= lo, lo, hi)
  return g * inside, g * np.where(inside, np.round(t) - t, ends), g * ~inside


@pytest.mark.parametrize("damp", [False, True])
def test_gradients_of_a_weight(damp):
  part = LsqWeight(bits=2, damp=damp)
  theta = {"step": jnp.array([0.5, 0.3]), "offset": jnp.array([-0.6, 0.1])}
  f = lambda t, a: (part(t, a, CLOCK, None) * G).sum()
  grads, da = jax.jit(jax.grad(f, argnums=(0, 1)))(theta, jnp.asarray(A))
  wa, ws, wb = formulas(A, np.float64(theta["step"]), np.float64(theta["offset"]), 0, 3, G)
  factor = (5 * 3) ** -0.5 if damp else 1.0
  np.testing.assert_allclose(da, wa, rtol=1e-6)  # step * (1 / step)
  np.testing.assert_allclose(grads["step"], ws.sum(0) * factor, rtol=1e-5)
  np.testing.assert_allclose(grads["offset"], wb.sum(0) * factor, rtol=1e-5, atol=1e-6)


def test_gradients_of_an_input():
  part, step = LsqInput(bits=3), 0.4
  f = lambda s, a: (part({"step": s}, a, CLOCK, None) * G).sum()
  ds, da = jax.jit(jax.grad(f, argnums=(0, 1)))(jnp.float32(step), jnp.asarray(A))
  wa, ws, _ = formulas(A, step, 0.0, -4, 3, G)
  np.testing.assert_allclose(da, wa, rtol=1e-6)
  np.testing.assert_allclose(ds, ws.sum() * (A.size * 3) ** -0.5, rtol=1e-5)


def test_nothing_passes_at_the_bounds():
  part = LsqWeight(bits=2, damp=False)
  theta = {"step": jnp.array([0.5]), "offset": jnp.array([0.0])}
  a = jnp.array([[0.0], [0.5], [1.5]])  # codes 0, 1 and 3 of 0 to 3, exactly
  da = jax.grad(lambda a: part(theta, a, CLOCK, None).sum())(a)
  assert da.ravel().tolist() == [0, 1, 0]


def test_a_weight_starts_no_worse_than_at_its_range():
  part = LsqWeight(bits=3)
  w = jax.random.t(jax.random.key(0), 3.0, (512, 8))
  lo, hi = w.min(0), w.max(0)
  error = lambda theta: (jnp.abs(dequantize(part.kernel(theta, w)) - w) ** part.p).sum(0)
  whole, found = error({"step": (hi - lo) / 7, "offset": lo}), error(jax.jit(part.init)(w))
  assert (found <= whole).all()
  assert found.sum() < 0.9 * whole.sum()  # heavy tails are worth clipping


def test_a_step_that_fell_below_zero_comes_back():
  part = LsqWeight(bits=2)
  theta = {"step": jnp.array([-0.1, 0.0]), "offset": jnp.zeros(2)}
  grads = jax.jit(jax.grad(lambda t: jnp.square(part(t, A, CLOCK, None) - A).sum()))(theta)
  assert np.isfinite(grads["step"]).all()
  assert (grads["step"] < 0).all()  # descent makes them larger


def test_the_start_of_an_input():
  np.testing.assert_allclose(
    LsqInput(4).init(jnp.asarray(A))["step"], 2 * np.abs(A).mean() / 7**0.5, rtol=1e-6
  )


def test_ranges_of_tokens():
  """Codes of the clipped range, by the formula, and both clips are learned."""
  part = TokenRange(bits=4)
  theta = part.init(jnp.asarray(A))
  x = A.T.astype(np.float64)
  lo, hi = 0.95 * np.minimum(x.min(1), 0)[:, None], 0.95 * x.max(1)[:, None]
  step = (hi - lo) / 15
  want = np.clip(np.round((x - lo) / step), 0, 15) * step + lo
  np.testing.assert_allclose(part(theta, jnp.asarray(A.T), CLOCK, None), want, rtol=1e-5)
  loss = lambda t: part(t, jnp.asarray(A.T), CLOCK, None).sum()
  grads = jax.jit(jax.grad(loss))(theta)
  up, low = grads["clip_up"], grads["clip_lo"]
  slope = 0.95 * 0.05  # of the sigmoid
  # The largest of each token sits at hi; what is inside moves by round(t) - t of the step.
  t = (x - lo) / step
  by_step = np.where((t > 0) & (t < 15), np.round(t) - t, np.where(t <= 0, 0, 15))
  by_lo = ((t <= 0) | (t >= 15)).astype(float)
  np.testing.assert_allclose(up, (by_step * hi / 0.95 / 15).sum() * slope, rtol=1e-4)
  min_ = lo / 0.95
  np.testing.assert_allclose(low, ((by_lo - by_step / 15) * min_).sum() * slope, rtol=1e-4)
