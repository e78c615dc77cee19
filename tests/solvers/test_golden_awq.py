"""AWQ's scale search against its formula in float64: the power, the scales and the codes.

The vectors come from tests/golden/make_awq.py, which says how.
"""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.encoding import encode
from jaxquant.formats import UINT3_G128, Format, int_grid
from jaxquant.graph import Graph, Norm, Weight
from jaxquant.ops.qdot import weight_only
from jaxquant.prepare import Context
from jaxquant.recipe import Recipe
from jaxquant.statistics import HESSIAN, MEAN_ABS
from jaxquant.steps import SearchScales
from jaxquant.steps.search import _spread

PATH = pathlib.Path(__file__).parents[1] / "golden" / "make_awq.py"
SPEC = importlib.util.spec_from_file_location("make_awq", PATH)
MAKER = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(MAKER)
GOLDEN = dict(np.load(MAKER.PATH))
GRAPH = Graph((), (Norm("norm", (Weight("0"), Weight("1"))),))


def test_search_equals_its_formula():
  """The gate of the specification, 99.9 % of the codes; scales to the last bits of float32."""
  assert 0 < GOLDEN["power"] < MAKER.GRID - 1  # an inner point of the grid, not where it starts
  x, weights = MAKER.inputs()
  step = SearchScales(MAKER.GRID)
  context = Context(None, GRAPH, Recipe(((".*", weight_only(UINT3_G128)),)), ())
  params = {str(i): {"kernel": jnp.asarray(w)} for i, w in enumerate(weights)}
  params["norm"] = {"scale": jnp.ones(MAKER.K)}
  ready = step.apply({"params": params}, context, {"0": step.statistic(jnp.asarray(x))})["params"]
  np.testing.assert_allclose(1 / ready["norm"]["scale"], GOLDEN["scale"], rtol=1e-5)
  for i in range(len(weights)):
    q = encode(ready[str(i)]["kernel"], UINT3_G128)
    codes = np.asarray(q.data) - UINT3_G128.elem.lo
    assert (codes == GOLDEN[f"codes_{i}"]).mean() >= 0.999


@pytest.mark.parametrize(("fmt", "tile"), [(UINT3_G128, 1), (Format(int_grid(4), 16, 16), 16)])
def test_columns_that_decide_are_whole_tiles_evenly_spread(fmt, tile):
  """`columns` of them decide what they would decide alone, each for as many as it stands for."""
  k, n, some = 128, 96, 32
  key = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(key[0], (256, k)) * jnp.geomspace(1, 30, k)
  weights = [jax.random.normal(i, (k, width)) for i, width in zip(key[1:], (n, some))]
  found = MEAN_ABS(x), HESSIAN(x)
  operands = (weight_only(fmt).w,) * 2
  best = lambda columns, ws: SearchScales(columns=columns).best(operands, *found, tuple(ws))
  taken = {1: [0, 3, 6, 9], 16: list(range(16)) + list(range(80, 96))}[tile]
  kept = _spread(weights[0], some, tile)
  for i, column in enumerate(taken):
    np.testing.assert_array_equal(kept[:, i], weights[0][:, column])
  assert kept.shape == (k, some)
  alike = [jnp.tile(kept, (1, n // some)), weights[1]]  # every one of the chosen three times
  np.testing.assert_array_equal(best(some, weights), best(None, alike))
  np.testing.assert_array_equal(best(n, weights), best(None, weights))
