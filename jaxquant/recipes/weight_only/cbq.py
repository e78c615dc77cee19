"""CBQ (arXiv:2312.07950): outliers first, then low-rank rounding learned across blocks."""

from jaxquant.blocks import BlockSolve
from jaxquant.formats import INT2_G64, Format
from jaxquant.ops.qdot import FLOAT, Operand, Rule
from jaxquant.recipe import Recipe
from jaxquant.reconstruct import Steps, mse_kl
from jaxquant.solvers.coarse_to_fine import truncated
from jaxquant.solvers.learned_rounding import Rounding
from jaxquant.statistics import AMAX
from jaxquant.steps.channels import OutlierChannels


def cbq(
  fmt: Format = INT2_G64,
  x: Format | None = None,
  *,
  rank: int | None = 5,
  window: int = 2,
  overlap: int = 1,
  steps: int = 120,
  rate: float = 1e-2,
  scale_rate: float = 1e-3,
  strength: float = 0.1,
  float_sites: str = "embed|head",
) -> Recipe:
  """Outliers are detected (CFP), weights cut to the largest others, and outlier channels smoothed.

  Then rounding V0 + A B and the step sizes of weights are learned for the output of `window` blocks
  together. Rank, steps, rates and the strength of the penalty are not taken from the paper, which
  learns the step sizes of activations too; here those are per token. Outlier channels are smoothed
  only if activations are quantized.

  Args:
    fmt: of the weights, integers.
    x: of the activations; None leaves them in float.
    rank: of A B; None learns a free V (AdaRound).
    window: blocks learned together.
    overlap: blocks that the next window learns again.
    steps: of Adam per window, one calibration batch each.
    rate: of the rounding.
    scale_rate: of the step sizes, relative.
    strength: of the pull towards whole steps.
    float_sites: pattern of sites that stay in high precision.
  """
  learner = Rounding(rank, learning_rate=rate, scale_rate=scale_rate, strength=strength)
  solve = BlockSolve(
    learner, truncated, loss=mse_kl, plan=Steps(steps), window=window, overlap=overlap
  )
  rules = ((float_sites, FLOAT), (".*", Rule(x=Operand(x), w=Operand(fmt))))
  prepare = () if x is None else (OutlierChannels(),)
  return Recipe(rules, solve=solve, statistic=AMAX, name="cbq", prepare=prepare)
