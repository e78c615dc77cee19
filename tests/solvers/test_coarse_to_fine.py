"""Coarse-to-fine outliers: exactly the injected ones, in weights and in channels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import formats as F
from jaxquant.graph import Graph, Norm, Weight
from jaxquant.kernels import to_dense
from jaxquant.models import shipped
from jaxquant.ops.qdot import Operand, Rule
from jaxquant.prepare import Context
from jaxquant.recipe import Recipe
from jaxquant.recipes.weight_only.cbq import cbq
from jaxquant.sites import flat_params
from jaxquant.solvers.coarse_to_fine import coarse_to_fine, truncated
from jaxquant.solvers.rtn import rtn
from jaxquant.steps.channels import OutlierChannels


@functools.cache
def weight(name):
  """A drawn [64, 96], or the first layer of a trained one."""
  if name == "normal":
    return np.asarray(jax.random.normal(jax.random.key(0), (64, 96)))
  if name == "laplace":
    return np.asarray(jax.random.laplace(jax.random.key(0), (64, 96)))
  flat = flat_params(shipped.load()[1])
  return np.asarray(flat[(*name.split("/"), "kernel")][0])


def injected(name, count, low, high):
  """The weight with `count` entries between `low` and `high` times its largest; where they are."""
  w = weight(name)
  rng = np.random.default_rng(1)
  at = rng.choice(w.size, count, replace=False)
  top = np.abs(w).max()
  out = w.copy().ravel()
  out[at] = rng.uniform(low, high, count) * rng.choice([-1, 1], count) * top
  mask = np.zeros(w.size, bool)
  mask[at] = True
  return out.reshape(w.shape), mask.reshape(w.shape)


@pytest.mark.parametrize(
  ("name", "count", "low", "high"),
  [
    ("normal", 1, 2, 2),
    ("normal", 8, 3, 4),
    ("laplace", 8, 3, 4),
    ("layers/attn/v", 5, 3, 4),
    ("layers/mlp/down", 40, 4, 5),
  ],
)
def test_exactly_the_injected_weights_are_flagged(name, count, low, high):
  """The check of the specification, on drawn and on trained weights."""
  w, mask = injected(name, count, low, high)
  np.testing.assert_array_equal(np.abs(w) > coarse_to_fine(w.reshape(-1)), mask)


def by_the_book(x, fence=1.5, spread=1.0):
  """The paper's loop in float64; the first split's neighbour is the largest value in the fence."""
  a = np.sort(np.abs(np.asarray(x, np.float64)).ravel())
  q1, q3 = np.quantile(a, [0.25, 0.75])
  found = a[a > q3 + fence * (q3 - q1)]
  inside = a[: len(a) - len(found)]
  best, threshold = -np.inf, a[-1]
  for i in range(len(found)):
    kept = found[:i]
    below = kept[-1] if i else inside[-1]
    merit = (found[i] - below) ** 2 - spread * (kept.var() if i else 0)
    if merit > best:
      best, threshold = merit, below
  return threshold


CASES = {
  "normal": jax.random.normal(jax.random.key(1), (4000,)),
  "heavy": jax.random.t(jax.random.key(2), 3.0, (4000,)),
  "odd": jnp.array([1.0, 1.1, 0.9, 1.2, 1.0, 5.0, 5.5, 9.0, -9.5]),
  "none past the fence": jnp.linspace(-1.0, 1.0, 50),
  "equal": jnp.full(7, -2.0),
  "mostly zero": jnp.zeros(16).at[3].set(5.0),
}


@pytest.mark.parametrize("spread", [0.0, 1.0, 20.0])
@pytest.mark.parametrize("name", CASES)
def test_threshold_is_that_of_the_loop(name, spread):
  want = by_the_book(CASES[name], spread=spread)
  # Equal to a member of x, so equal but for its float32 digits.
  np.testing.assert_allclose(coarse_to_fine(CASES[name], spread=spread), want, rtol=1e-7)


def test_leading_axes_are_apart():
  x = jnp.stack([CASES["normal"], 3 * CASES["heavy"]])
  np.testing.assert_array_equal(coarse_to_fine(x), jnp.stack([coarse_to_fine(r) for r in x]))


def test_truncated_is_the_inner_solver_on_what_is_left():
  w, mask = injected("normal", 8, 3, 4)
  kept = np.abs(w[~mask]).max()
  fmt = F.Format(F.int_grid(4), 16)
  q = truncated(jnp.asarray(w), None, fmt)
  np.testing.assert_array_equal(to_dense(q), to_dense(rtn(jnp.clip(w, -kept, kept), None, fmt)))
  error = lambda q: float(jnp.square(to_dense(q) - w)[~mask].mean())
  assert error(q) < 0.6 * error(rtn(jnp.asarray(w), None, fmt))


# Channels.

GRAPH = Graph((), (Norm("norm", (Weight("a"), Weight("b"))),))


def test_outlier_channels_go_down_to_the_root_of_their_excess():
  """a / s = sqrt(a t) for outliers, all else stays; x / s meets w * s."""
  amax = jnp.array([1.0, 1.2, 0.9, 1.1, 1.0, 0.8, 19.2, 30.0])
  rule = Rule(x=Operand(F.INT4), w=Operand(F.INT4))
  context = Context(None, GRAPH, Recipe(((".*", rule),)), ())
  w = jax.random.normal(jax.random.key(0), (8, 4))
  params = {"norm": {"scale": jnp.ones(8)}, "a": {"kernel": w}, "b": {"kernel": 2 * w}}
  found = OutlierChannels().apply({"params": params}, context, {"a": amax})["params"]
  s = np.r_[np.ones(6), 4.0, 5.0]
  np.testing.assert_allclose(1 / found["norm"]["scale"], s, rtol=1e-6)
  np.testing.assert_allclose(found["b"]["kernel"], 2 * w * s[:, None], rtol=1e-6)


def test_recipe_smooths_only_what_it_quantizes():
  assert cbq().prepare == ()
  assert cbq(F.INT4, F.INT4).prepare == (OutlierChannels(),)
  assert cbq().solve.begin is truncated
