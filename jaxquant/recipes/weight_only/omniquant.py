"""OmniQuant (arXiv:2308.13137): learned weight clipping, and learned scales of activations."""

from jaxquant.blocks import BlockSolve
from jaxquant.estimators import through_scale
from jaxquant.formats import UINT2_G64, Format
from jaxquant.ops.qdot import FLOAT, Operand, Rule
from jaxquant.recipe import Recipe
from jaxquant.reconstruct import Steps
from jaxquant.solvers.learned_rounding import Clipping
from jaxquant.statistics import AMAX
from jaxquant.steps import LearnScales, Smooth


def omniquant(
  fmt: Format = UINT2_G64,
  x: Format | None = None,
  *,
  steps: int = 60,
  rate: float = 1e-2,
  scale_rate: float = 5e-3,
  both: bool = False,
  float_sites: str = "embed|head",
) -> Recipe:
  """The range of every group learned by Adam, block by block, for the block's own output.

  With quantized activations the scales between norms and what reads them are learned along, from
  those of SmoothQuant. Of the paper's transformations the shifts (for models with biases) and the
  scales of o's input and between q and k are not in it. The paper takes 20 epochs over 128 windows
  of 2048 tokens.

  Args:
    fmt: of the weights.
    x: of the activations, whose scale is its largest magnitude; None: float, only ranges learn.
    steps: of Adam per block, one calibration batch each.
    rate: of the clipping parameters.
    scale_rate: of the logarithm of the scales.
    both: also learn from the float block on the quantized inputs (aug_loss).
    float_sites: pattern of sites that stay in high precision.
  """
  scales = None if x is None else LearnScales(scale_rate)
  plan = Steps(steps)
  solve = BlockSolve(Clipping(learning_rate=rate), both=both, plan=plan, scales=scales)
  seen = Operand(x, gradient=None if x is None else through_scale())
  rules = ((float_sites, FLOAT), (".*", Rule(x=seen, w=Operand(fmt))))
  prepare = () if x is None else (Smooth(),)
  return Recipe(rules, solve=solve, statistic=AMAX, name="omniquant", prepare=prepare)
