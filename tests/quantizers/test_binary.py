"""One-bit parts: slopes and gradients against the table of operators, magnitudes, bases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.kernels import matmul, pack_kernel, to_dense
from jaxquant.ops.qdot import FLOAT, qdot
from jaxquant.quantizers import (
  Bases,
  Binary,
  Branch,
  LsqInput,
  LsqWeight,
  Parts,
  TokenRange,
  bireal,
  clip,
  clip_open,
  fourier,
  identity,
)
from jaxquant.quantizers.binary import sign
from jaxquant.quantizers.parts import END
from jaxquant.recipes.training.bibench import OPERATORS

PROBES = np.linspace(-1.5, 1.5, 9, dtype=np.float32)
G = np.array([1.0, -2.0, 0.5, 3.0, -1.0, 0.25, 2.0, -0.5, 1.5], np.float32)  # what comes back
MEAN = np.abs(PROBES).mean()
CLIP = np.array([0, 0, 1, 1, 1, 1, 1, 0, 0])
BIREAL = np.array([0, 0, 0.5, 1.25, 2, 1.25, 0.5, 0, 0])
NOW, STEPS = np.int32(250), 1000


def series(n):
  """FDA's slope at the probes, in float64."""
  terms = np.cos((2 * np.arange(n + 1) + 1) * 0.1 * PROBES[:, None].astype(np.float64))
  return 0.4 / np.pi * terms.sum(1) * CLIP


SLOPES = {
  "clip": (clip, CLIP),
  "clip_open": (clip_open, CLIP),
  "identity": (identity, np.ones(9)),
  "bireal": (bireal, BIREAL),
  "fourier": (fourier(9), series(9)),
  "fourier 18": (fourier(18), series(18)),
}


@pytest.mark.parametrize("name", SLOPES)
def test_slope(name):
  slope, want = SLOPES[name]
  found = jax.grad(lambda x: (sign(x, slope) * G).sum())(jnp.asarray(PROBES))
  np.testing.assert_allclose(found, G * want, rtol=1e-5)  # sums of cosines in float32
  np.testing.assert_array_equal(sign(jnp.asarray(PROBES), slope), np.where(PROBES >= 0, 1, -1))


def test_slopes_at_one():
  at = jnp.array([-1.0, 1.0])
  assert clip(at).tolist() == [1, 1]
  assert clip_open(at).tolist() == [0, 0]


def centered(g):
  return g - g.mean()


def recu_weight(g):
  """Through the clamp, the division by the deviation and the mean; the sign passes everything."""
  x, n = PROBES.astype(np.float64), len(PROBES)
  deviation, by = x.std(), 8**0.5
  unit = by * x / deviation
  rate = 0.14 / (np.e - 1)
  tau = rate * np.exp(NOW / STEPS) + 0.85 - rate
  inside = np.abs(unit) < -np.abs(unit).mean() * np.log(2 - 2 * tau)
  g = g * inside
  return centered(by / deviation * (g - x * (x @ g) / (n * deviation**2)))


def recu_input(g):
  x, n = PROBES.astype(np.float64), len(PROBES)
  deviation = x.std()
  g = g * np.maximum(0, 2 - 2 * np.abs(x / deviation))
  # The deviation moves with x, and its own mean with it.
  return (g - (x - x.mean()) * (x @ g) / (n * deviation**2)) / deviation


def fda(g):
  """Slope and what is left of 0.1 sin; eta's second matrix starts at 0."""
  fading = 0.05 * (1 + np.cos(np.pi * NOW / STEPS))
  return g * (series(9 + 9 * NOW / STEPS // 1) + fading * 0.1 * np.cos(PROBES))


GRADIENTS = {  # (of the weight, of the input) as functions of what comes back
  "bnn": (lambda g: g * CLIP, lambda g: g * CLIP),
  "xnor": (lambda g: centered(g * CLIP * MEAN), lambda g: g * CLIP * MEAN),
  "dorefa": (lambda g: g * CLIP * MEAN, lambda g: g * CLIP),
  "bireal": (lambda g: g * CLIP, lambda g: g * BIREAL),
  "xnor_pp": (lambda g: g * CLIP, lambda g: g * CLIP),
  "react": (lambda g: g * CLIP, lambda g: g * BIREAL),
  "recu": (recu_weight, recu_input),
  "fda": (lambda g: fda(g) * MEAN, fda),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_gradients(name):
  weight, inputs, _ = OPERATORS[name](STEPS)
  sides = ((weight, PROBES[:, None], G[:, None]), (inputs, PROBES[None], G[None]))

  @jax.jit
  def run():
    loss = lambda part, a, g: (part(part.init(a), a, NOW, None) * g).sum()
    return [jax.grad(loss, argnums=1)(part, jnp.asarray(a), g) for part, a, g in sides]

  for found, want in zip(run(), GRADIENTS[name]):
    want = want(G.astype(np.float64))
    np.testing.assert_allclose(found.ravel(), want, rtol=2e-5, atol=2e-6)  # float32 sums of 9


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_have_two_values_a_channel(name):
  weight, inputs, _ = OPERATORS[name](STEPS)
  a = jax.random.normal(jax.random.key(0), (64, 6)) + 0.1

  @jax.jit
  def run(a):
    values = [part(part.init(a), a, END, None) for part, a in ((weight, a), (inputs, a.T))]
    return *values, to_dense(weight.kernel(weight.init(a), a))

  of_weight, of_input, stored = map(np.asarray, run(a))
  for channel in (*of_weight.T, *of_input):
    low, high = np.unique(channel)
    assert low == -high
  np.testing.assert_array_equal(stored, of_weight)


def test_react_learns_where_the_sign_changes():
  part = OPERATORS["react"](STEPS)[1]
  x = jnp.array([[0.2, -0.4], [0.3, 0.1]])
  grads = jax.grad(lambda t: part(t, x, NOW, None).sum())(part.init(x))
  np.testing.assert_allclose(grads["0"]["shift"], bireal(x).sum(0), rtol=1e-6)


@pytest.mark.parametrize(("order", "left"), [(1, 1 - 2 / np.pi), (2, 0.130)])
def test_bases_leave_the_known_energy(order, left):
  w = jax.random.normal(jax.random.key(0), (8192, 4))
  part = Bases(order)
  off = part(part.init(w), w, NOW, None) - w
  found = jnp.square(off).sum() / jnp.square(w).sum()
  np.testing.assert_allclose(found, left, atol=0.005)  # four samples of 8192


def test_sizes_of_bases_are_learned():
  w = jax.random.normal(jax.random.key(0), (32, 3))
  part = Bases(2)
  theta = part.init(w)
  g = jax.random.normal(jax.random.key(1), w.shape)
  grads = jax.grad(lambda t: (part(t, w, NOW, None) * g).sum())(theta)
  rest = w - theta["size0"] * sign(w, clip)
  np.testing.assert_allclose(grads["size1"], (g * sign(rest, clip)).sum(0), rtol=1e-5)
  # size0 also moves the rest that the second sign sees: - size1 clip(rest) sign(w)
  want = (g * sign(w, clip) * (1 - theta["size1"] * clip(rest))).sum(0)
  np.testing.assert_allclose(grads["size0"], want, rtol=1e-5)


def test_a_weight_cannot_be_stored_by_token():
  with pytest.raises(ValueError, match="output channels"):
    Binary(magnitude=-1).kernel({}, jnp.ones((4, 4)))


SITES = {name: Parts(*make(STEPS)) for name, make in OPERATORS.items()} | {
  "lsq": Parts(LsqWeight(3), TokenRange(4)),
  "bases": Parts(Bases(2), LsqInput(4)),
  "branch": Parts(Branch(LsqWeight(4), 4, 10), TokenRange(4)),
}


@pytest.mark.parametrize("name", SITES)
def test_a_site_multiplies_as_it_is_packed(name):
  """The same bits for few rows, which are multiplied in chunks on CPU, and for many."""
  parts = SITES[name]
  w = jax.random.normal(jax.random.key(0), (256, 8)) / 16
  x = jax.random.normal(jax.random.key(1), (12, 256))
  dot = lambda x, w: matmul(w, x, lambda x, w: qdot(x, w, FLOAT))

  @jax.jit
  def run(theta, w):
    return [parts(theta, rows, w, dot, jnp.int32(END), None) for rows in (x[:4], x)]

  theta = jax.jit(parts.init)(w, x)
  packed = jax.jit(lambda t, w: pack_kernel(parts.kernel(t, w)))(theta, w)
  for fake, stored in zip(run(theta, w), run(theta, packed)):
    np.testing.assert_array_equal(fake, stored)
