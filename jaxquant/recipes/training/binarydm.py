"""BinaryDM: one-bit diffusion models with two bases where it matters (arXiv:2404.05662)."""

from jaxquant.ops.qdot import FLOAT, Rule
from jaxquant.quantizers import Bases, LsqInput, Parts
from jaxquant.recipe import Recipe


def binarydm(
  *,
  order: int = 2,
  input_bits: int = 4,
  single: str | None = None,
  float_sites: str = "embed|head",
) -> Recipe:
  """Learned sizes of sign(w) and of the sign of what it leaves; LSQ inputs per tensor.

  The paper's second half is a loss, `jaxquant.quantizers.mimic_loss`; its progressive schedule of
  binarizing group by group is not in the released code, and not here.

  Args:
    order: bases of a weight.
    input_bits: of inputs.
    single: pattern of the deep sites that get one basis.
    float_sites: pattern of sites that stay in high precision: the paper's first and last three.
  """
  rule = lambda bases: Rule(learned=Parts(weight=Bases(bases), input=LsqInput(input_bits)))
  deep = () if single is None else ((single, rule(1)),)
  return Recipe(((float_sites, FLOAT), *deep, (".*", rule(order))), name="binarydm")
