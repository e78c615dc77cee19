"""AWQ (arXiv:2306.00978)."""

from jaxquant.formats import UINT4_G128, Format
from jaxquant.ops.qdot import FLOAT, weight_only
from jaxquant.recipe import Recipe
from jaxquant.solvers.by_site import BySite
from jaxquant.solvers.clip_search import clip_search
from jaxquant.solvers.rtn import rtn
from jaxquant.statistics import HESSIAN, block_hessian
from jaxquant.steps import SearchScales


def awq(
  fmt: Format = UINT4_G128,
  *,
  steps: int = 20,
  unclipped: str = ".*/(q|k)",
  float_sites: str = "embed|head",
) -> Recipe:
  """Channels that meet large activations are scaled up before rounding, then ranges are clipped.

  As in the published code, q and k keep their whole range. One simplification: both errors are
  those of each weight's own output, tr(dW^T H dW), where the code's scales are chosen by the output
  of a whole attention or MLP.

  Args:
    fmt: of the weights; the paper's is asymmetric with blocks of 128.
    steps: powers of the mean activation that are tried.
    unclipped: pattern of sites that are rounded to nearest in their whole range.
    float_sites: pattern of sites that stay in high precision.
  """
  rules = ((float_sites, FLOAT), (".*", weight_only(fmt)))
  seen = HESSIAN if fmt.block is None else block_hessian(fmt.block)
  solve = BySite(((unclipped, rtn),), clip_search)
  return Recipe(rules, solve, seen, name="awq", prepare=(SearchScales(steps),))
