"""SmoothQuant (arXiv:2211.10438)."""

import dataclasses

from jaxquant.formats import INT8, Format
from jaxquant.ops.qdot import FLOAT, Operand, Rule
from jaxquant.ops.tracked import Static
from jaxquant.recipe import Recipe, Solve
from jaxquant.solvers.rtn import rtn
from jaxquant.statistics import HESSIAN
from jaxquant.steps import Smooth


def smoothquant(
  fmt: Format = INT8,
  *,
  alpha: float = 0.5,
  static: bool = False,
  solve: Solve = rtn,
  float_sites: str = "embed|head",
) -> Recipe:
  """W8A8 after outliers were divided out of the activations that norms put out (section 4).

  Activations are scaled per token and on the fly, the paper's O1, or by one static scale per tensor
  from calibration data, its O3 (table 2). Weights have a scale per output channel; the paper's have
  one per tensor.

  Args:
    fmt: of weights and activations.
    alpha: share of the range that the weights take; 0.5 in the paper.
    static: O3 instead of O1.
    solve: of the weights; `gptq` sees the smoothed inputs.
    float_sites: pattern of sites that stay in high precision.
  """
  whole = dataclasses.replace(fmt, block=None, block_n=None)
  x = Operand(whole, Static()) if static else Operand(fmt)
  rules = ((float_sites, FLOAT), (".*", Rule(x=x, w=Operand(fmt))))
  statistic = None if solve is rtn else HESSIAN
  name = "smoothquant_static" if static else "smoothquant"
  return Recipe(rules, solve, statistic, name=name, prepare=(Smooth(alpha),))
