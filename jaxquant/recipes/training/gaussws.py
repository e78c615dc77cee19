"""GaussWS: training under noise of the size of rounding (arXiv:2505.11170)."""

from jaxquant.ops.qdot import FLOAT, Rule
from jaxquant.quantizers import GaussianNoise, Parts
from jaxquant.recipe import Recipe


def gaussws(
  *, start: float = 6.0, target: float = 4.0, block: int = 32, float_sites: str = "embed|head"
) -> Recipe:
  """Weights under noise: w + R max_block |w| 2^(1 - b), cast to bf16.

  R in {0, +-1, +-2} is fresh at every step. b is learned per square block and decays from `start`
  bits towards `target`. Activations and gradients stay as the model has them (bf16 in the paper).
  The trained weights are plain: quantize them with any recipe, evaluate them in float.

  Args:
    start: bits at the first step.
    target: bits towards which weight decay pulls.
    block: edge of the blocks.
    float_sites: pattern of sites without noise.
  """
  rule = Rule(learned=Parts(weight=GaussianNoise(start, target, block)))
  return Recipe(((float_sites, FLOAT), (".*", rule)), name="gaussws")
