"""Quartet: all three GEMMs in MXFP4 (arXiv:2505.14669)."""

from jaxquant.estimators import trusted
from jaxquant.formats import MXFP4, MXFP4_TENSOR
from jaxquant.ops.qdot import FLOAT, Operand, Rotation, Rule, Source
from jaxquant.recipe import Recipe
from jaxquant.rounding import stochastic
from jaxquant.scales import quartet as range_matched
from jaxquant.scales import quest


def quartet(*, float_sites: str = "embed|head") -> Recipe:
  """QuEST forward, unbiased stochastic rounding backward, a Hadamard rotation under every GEMM.

  - fprop: x and w rotated in blocks of 32, scaled for the least squared error of a normal (`quest`:
    some elements clip), rounded to nearest;
  - backward: the *quantized* x and w and the gradient, rotated with fresh signs, 3/4 of the range
    used so that nothing clips, rounded stochastically: the gradient of the quantized product is
    unbiased;
  - dx and dw lose what belongs to clipped elements and leave the forward rotation.

  The paper quantizes all linear layers except the head.

  Args:
    float_sites: pattern of sites that stay in high precision.
  """
  ahead = Operand(MXFP4, quest, rotation=Rotation(32), gradient=trusted)
  back = Operand(MXFP4_TENSOR, range_matched, stochastic, Rotation(32, random=True), Source.FORWARD)
  rule = Rule(ahead, ahead, back, back, back, back)
  return Recipe(((float_sites, FLOAT), (".*", rule)), name="quartet")
