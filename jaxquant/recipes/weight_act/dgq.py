"""DGQ (arXiv:2310.04836)."""

from jaxquant.formats import INT8, INT8_TENSOR, UINT4_G128_INT8, Format
from jaxquant.ops.qdot import FLOAT, Operand, Rule
from jaxquant.ops.tracked import Static
from jaxquant.recipe import Recipe
from jaxquant.solvers.dual_grained import dual_grained
from jaxquant.statistics import HESSIAN
from jaxquant.steps.channels import Percentile


def dgq(
  fmt: Format = UINT4_G128_INT8,
  *,
  smooth: bool = True,
  static: bool = False,
  float_sites: str = "embed|head",
) -> Recipe:
  """W4A8: int4 groups found by their output error, held by integer scales of an int8 column.

  Percentile smoothing first, of what norms feed. The paper has x under one static scale per tensor;
  the default is int8 per token, which loses less (BUILD_NOTES).

  Args:
    fmt: of the weights, integers under integer scales.
    smooth: fold the smoothing into the model, which must have a graph.
    static: one scale per tensor of x, from calibration data.
    float_sites: pattern of sites that stay in high precision.
  """
  x = Operand(INT8_TENSOR, Static()) if static else Operand(INT8)
  rules = ((float_sites, FLOAT), (".*", Rule(x=x, w=Operand(fmt))))
  steps = (Percentile(),) if smooth else ()
  return Recipe(rules, dual_grained, HESSIAN, name="dgq", prepare=steps)
