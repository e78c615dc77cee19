"""Measures of outliers and spectra, against other implementations and published figures."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxquant.diagnostics import measures, spectra
from jaxquant.encoding import encode
from jaxquant.formats import NVFP4, NVFP4_2D, Format, int_grid
from jaxquant.tensor import dequantize

OUTLIERS = jax.jit(measures.outliers, static_argnames=("fmt", "hot"))
FLUSHED = jax.jit(measures.flush_to_zero)
SPECTRAL = jax.jit(spectra.spectral, static_argnums=1)


@pytest.fixture(scope="module")
def x():
  """[32, 48] with two hot channels, 5 and 40, and one spike."""
  x = np.random.default_rng(0).normal(size=(32, 48)).astype(np.float32)
  x[:, [5, 40]] *= 20
  x[3, 17] = 90
  return x


def crest(blocks):
  return np.abs(blocks).max(-1) / np.sqrt(np.mean(np.square(blocks), -1))


REFERENCES = {
  "kurtosis": (measures.kurtosis, lambda x: scipy.stats.kurtosis(x, axis=None)),
  "kurtosis of channels": (measures.channel_kurtosis, lambda x: scipy.stats.kurtosis(x, axis=0)),
  "crest factor of rows": (
    lambda x: measures.crest_factors(x, NVFP4),
    lambda x: crest(x.reshape(32, 3, 16)),
  ),
  "crest factor of tiles": (
    lambda x: measures.crest_factors(x, NVFP4_2D),
    lambda x: crest(x.reshape(2, 16, 3, 16).swapaxes(1, 2).reshape(2, 3, 256)),
  ),
  "top magnitudes": (
    lambda x: jnp.stack(list(measures.top_magnitudes(x).values())),
    lambda x: [np.sort(np.abs(x).max(0))[-k:].mean() for k in (1, 4, 16)],
  ),
  "hot channels": (
    lambda x: measures.hot_channels(x, 3),
    lambda x: np.sort(np.argsort(np.abs(x).mean(0))[-3:]),
  ),
  "spectrum": (spectra.spectrum, lambda x: np.linalg.svd(np.float64(x))[1]),
}


@pytest.mark.parametrize(("ours", "reference"), REFERENCES.values(), ids=REFERENCES)
def test_measures_are_those_of_another_implementation(x, ours, reference):
  # float32 against float64
  np.testing.assert_allclose(jax.jit(ours)(x), reference(np.float64(x)), rtol=2e-5, atol=1e-5)


def test_hot_channels_and_the_spike_are_found(x):
  found = OUTLIERS(x, hot=2)
  assert found["hot"].tolist() == [5, 40]
  assert found["top1"] == 90
  assert found["crest_max"] > 3.9  # the spike is all that its block of 16 has: at most 4
  assert found["channel_kurtosis_max"] > 20  # it is one of 32 tokens: at most about 29


def test_constants_and_zeros_have_finite_measures():
  for value in (0.0, 5.0):
    found = OUTLIERS(jnp.full((32, 48), value), hot=2)
    assert all(bool(jnp.isfinite(a).all()) for a in found.values())
    assert found["kurtosis"] == found["flushed"] == 0
    assert found["crest_max"] == 1


@pytest.mark.parametrize(
  ("draw", "share", "within"),
  [
    (lambda r: r.normal(size=(1024, 512)), 0.069, 1.5e-3),
    (lambda r: r.standard_t(3, size=(1024, 512)), 0.12, 3e-3),  # two digits are published
  ],
  ids=["normal", "student t3"],
)
def test_nvfp4_flushes_the_share_that_was_measured_elsewhere(draw, share, within):
  x = jnp.asarray(draw(np.random.default_rng(0)), jnp.float32)
  assert abs(float(FLUSHED(x)) - share) < within


@functools.cache
def power_law(exponent):
  """[1024, 256] with singular values k^-exponent."""
  r = np.random.default_rng(0)
  u, v = (np.linalg.qr(r.normal(size=(n, 256)))[0] for n in (1024, 256))
  return jnp.asarray((u * np.arange(1, 257.0) ** -exponent) @ v.T, jnp.float32)


# Exponent, bits -> stable rank before, after, predicted; effective rank after; share below floor.
SPECTRA = {
  (0.8, 8): (2.226, 2.227, 2.227, 128.0, 0),
  (0.8, 6): (2.226, 2.236, 2.236, 131.1, 0),
  (0.8, 4): (2.226, 2.427, 2.425, 165.8, 0.80),
  (0.8, 3): (2.226, 2.992, 3.304, 201.3, 0.93),
  (1.0, 4): (1.641, 1.811, 1.811, None, 231 / 256),
}


@pytest.mark.parametrize("case", SPECTRA, ids=str)
def test_spectra_of_power_laws_are_flattened_as_measured_elsewhere(case):
  exponent, bits = case
  before, after, predicted, rank, below = SPECTRA[case]
  a = power_law(exponent)
  found = SPECTRAL(a, Format(int_grid(bits), None, None))
  noise = spectra.step_noise(float(jnp.abs(a).max()) / (2 ** (bits - 1) - 1))
  near = lambda got, wanted, rtol: np.testing.assert_allclose(got, wanted, rtol=rtol)
  near(found["stable_rank"], before, 3e-4)
  near(found["exponent"], exponent, 1e-4)
  # The singular vectors are another draw: the largest element, and so the step, differ.
  near(spectra.stable_rank(found["spectrum_quantized"]), after, 2e-2)
  near(spectra.predicted_stable_rank(found["spectrum"], noise, a.shape), predicted, 1e-2)
  if rank is not None:
    near(spectra.effective_rank(found["spectrum_quantized"]), rank, 1e-2)
  share = (found["spectrum"] < spectra.noise_floor(noise, a.shape)).mean()
  assert abs(float(share) - below) < 0.01


def test_the_floor_is_the_largest_singular_value_of_rounding_errors():
  a = power_law(0.5)
  fmt = Format(int_grid(6), None, None)
  found = SPECTRAL(a, fmt)
  error = jax.jit(lambda a: dequantize(encode(a, fmt, axis=-1)) - a)(a)
  # Edge of the Marchenko-Pastur law; fluctuations of the largest value are of order n^(-2/3).
  np.testing.assert_allclose(np.linalg.norm(error, 2), found["floor"], rtol=0.03)
