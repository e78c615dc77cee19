"""AWQ (arXiv:2306.00978)."""

from jaxquant.formats import UINT4_G128, Format
from jaxquant.ops.qdot import FLOAT, weight_only
from jaxquant.recipe import Recipe
from jaxquant.solvers.clip_search import clip_search
from jaxquant.statistics import HESSIAN, block_hessian
from jaxquant.steps import SearchScales


def awq(fmt: Format = UINT4_G128, *, steps: int = 20, float_sites: str = "embed|head") -> Recipe:
  """Channels that meet large activations are scaled up before rounding, then ranges are clipped.

  Two simplifications: both errors are those of each weight's own output, tr(dW^T H dW), where the
  code compares the output of a whole attention or MLP; and q and k are clipped too.

  Args:
    fmt: of the weights; the paper's is asymmetric with blocks of 128.
    steps: powers of the mean activation that are tried.
    float_sites: pattern of sites that stay in high precision.
  """
  rules = ((float_sites, FLOAT), (".*", weight_only(fmt)))
  seen = HESSIAN if fmt.block is None else block_hessian(fmt.block)
  return Recipe(rules, clip_search, seen, name="awq", prepare=(SearchScales(steps),))
