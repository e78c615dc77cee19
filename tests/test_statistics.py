"""One table of statistics against float64 numpy; each row buys every test."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.statistics import (
  AMAX,
  COUNT,
  HESSIAN,
  MEAN_ABS,
  RMS,
  Statistic,
  amax,
  block_hessian,
  count,
  hessian,
  largest,
  mean_abs,
  rms,
)


def blocks(h, size):
  """On the diagonal, the last one filled with zeros."""
  pad = -len(h) % size
  h = np.pad(h, ((0, pad), (0, pad)))
  return np.stack([h[i : i + size, i : i + size] for i in range(0, len(h), size)])


STATISTICS = {
  "amax": (AMAX, amax, lambda x: np.abs(x).max(0)),
  "mean_abs": (MEAN_ABS, mean_abs, lambda x: np.abs(x).mean(0)),
  "rms": (RMS, rms, lambda x: np.sqrt((x * x).mean(0))),
  "hessian": (HESSIAN, hessian, lambda x: x.T @ x),
  "block_hessian": (block_hessian(5), block_hessian(5), lambda x: blocks(x.T @ x, 5)),
  "count": (COUNT, count, len),
}
TABLE = pytest.mark.parametrize(
  ("statistic", "function", "reference"), STATISTICS.values(), ids=STATISTICS.keys()
)
B, M, K = 4, 24, 16


@pytest.fixture(scope="module")
def batches():
  return np.random.default_rng(0).normal(size=(B, M, K)).astype(np.float32)


def close(got, want):
  np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-5)  # float32 sums of 96 terms


@TABLE
def test_value(statistic, function, reference, batches):
  want = reference(batches[0].astype(np.float64))
  close(function(jnp.asarray(batches[0])), want)
  close(jax.jit(statistic)(batches[0]), want)


@TABLE
def test_batches_one_by_one_equal_all_at_once(statistic, function, reference, batches):
  want = reference(batches.reshape(-1, K).astype(np.float64))
  close(statistic.over(jnp.asarray(batches)), want)
  partial = statistic.of(batches[0])
  for x in batches[1:]:
    partial = statistic.combine(partial, statistic.of(x))
  close(statistic.finish(partial), want)


@TABLE
def test_leading_axes_equal_vmap(statistic, function, reference, batches):
  close(function(jnp.asarray(batches)), jax.vmap(function)(batches))
  close(statistic.over(jnp.stack([batches, batches]))[0], statistic.over(batches[:1].repeat(2, 0)))


@TABLE
def test_is_a_static_argument(statistic, function, reference, batches):
  traces = []

  @jax.jit(static_argnums=0)
  def run(statistic, x):
    traces.append(1)
    return statistic(x)

  again = Statistic(statistic.of, statistic.combine, statistic.finish)
  assert again == statistic
  assert hash(again) == hash(statistic)
  close(run(statistic, batches[0]), run(again, batches[0]))
  assert len(traces) == 1


@TABLE
def test_bfloat16_is_accumulated_in_float32(statistic, function, reference, batches):
  x = jnp.asarray(batches[0], jnp.bfloat16)
  got = function(x)
  assert got.dtype in (jnp.float32, jnp.int32)
  close(got, reference(np.asarray(x, np.float64)))


def test_weighted_hessian(batches):
  x = batches[0]
  weight = np.random.default_rng(1).uniform(size=M).astype(np.float32)
  close(hessian(jnp.asarray(x), jnp.asarray(weight)), (x * weight[:, None]).T @ x)
  mask = (np.arange(M) < 10).astype(np.float32)
  close(hessian(jnp.asarray(x), jnp.asarray(mask)), x[:10].T @ x[:10])


def test_hessian_is_the_output_error(batches):
  """tr(dW^T H dW) = ||X dW||^2."""
  dw = np.random.default_rng(2).normal(size=(K, 5)).astype(np.float32)
  h = np.asarray(hessian(jnp.asarray(batches[0])), np.float64)
  np.testing.assert_allclose(np.trace(dw.T @ h @ dw), np.square(batches[0] @ dw).sum(), rtol=1e-5)


def test_nan_is_not_hidden(batches):
  x = jnp.asarray(batches[0]).at[3, 2].set(jnp.nan)
  assert jnp.isnan(amax(x)).nonzero()[0].tolist() == [2]
  assert jnp.isnan(largest(AMAX.of(x), AMAX.of(batches[1]))).sum() == 1
  assert jnp.isnan(hessian(x)).any(0).all()
  long = jnp.ones((256, 1000)).at[100, 5].set(jnp.nan)  # where a float maximum loses it on CPU
  assert jnp.isnan(jax.jit(amax)(long)).nonzero()[0].tolist() == [5]
