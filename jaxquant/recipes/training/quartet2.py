"""Quartet II: NVFP4 training with unbiased gradients (arXiv:2601.22813)."""

from jaxquant import scales
from jaxquant.eden import MSEden
from jaxquant.formats import NVFP4
from jaxquant.ops.qdot import FLOAT, Operand, Rotation, Rule, Source
from jaxquant.recipe import Recipe


def quartet2(
  *, rotation: int = 128, four_over_six: bool = False, float_sites: str = "embed|head"
) -> Recipe:
  """Nearest rounding forward, MS-EDEN for all four backward operands.

  Forward operands are NVFP4 in blocks of 16, weights too, neither tiled nor rotated. Backward ones
  are made from them, rotated with signs that are new in every step and rounded by `MSEden`: codes
  to nearest, scales at random. Its error is less than half that of stochastic rounding.

  Args:
    rotation: size of the backward rotation and of MS-EDEN's groups: 128 in the kernels, 32 the
      default of the published code. Contractions are padded to a multiple.
    four_over_six: forward block maxima at 6 or 4, whichever has the lower error; the kernels do.
    float_sites: pattern of sites that stay in high precision.
  """
  ahead = Operand(NVFP4, scales.four_over_six if four_over_six else None)
  turned = Rotation(rotation, random=True)
  back = Operand(NVFP4, MSEden(rotation), rotation=turned, source=Source.FORWARD)
  rule = Rule(ahead, ahead, back, back, back, back)
  return Recipe(((float_sites, FLOAT), (".*", rule)), name="quartet2")
