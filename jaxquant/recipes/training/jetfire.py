"""Jetfire: int8 tiles for all three GEMMs (arXiv:2403.12422)."""

from jaxquant.formats import Format, int_grid
from jaxquant.ops.qdot import FLOAT, Operand, Rule
from jaxquant.recipe import Recipe
from jaxquant.rounding import stochastic

INT8_32X32 = Format(int_grid(8), 32, 32)


def jetfire(*, float_sites: str = "embed|head") -> Recipe:
  """Int8 in tiles of 32 x 32; gradients rounded stochastically.

  A tile is the same numbers along both axes, so each tensor needs one quantized copy. The paper's
  int8 *data flow* is not here: norms, nonlinearities and residual sums of the model read and write
  floats, where theirs read and write the tiles. So the output of dgrad is rounded stochastically
  where it enters the next contraction, not where it is made, and its two GEMMs draw noise each.
  Scales are float32; in FP16, as theirs, those of small gradients are zero without loss scaling.

  Args:
    float_sites: pattern of sites that stay in high precision.
  """
  tile, noisy = Operand(INT8_32X32), Operand(INT8_32X32, rounding=stochastic)
  rule = Rule(tile, tile, noisy, tile, tile, noisy)
  return Recipe(((float_sites, FLOAT), (".*", rule)), name="jetfire")
