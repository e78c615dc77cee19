"""AWQ's scale search against its formula in float64: the power, the scales and the codes.

The vectors come from tests/golden/make_awq.py, which says how.
"""

import importlib.util
import pathlib

import jax.numpy as jnp
import numpy as np

from jaxquant.encoding import encode
from jaxquant.formats import UINT3_G128
from jaxquant.graph import Graph, Norm, Weight
from jaxquant.ops.qdot import weight_only
from jaxquant.prepare import Context
from jaxquant.recipe import Recipe
from jaxquant.steps import SearchScales

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
