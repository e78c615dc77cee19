"""SwitchBack: int8 but for the weight gradient (arXiv:2304.13013)."""

from jaxquant.formats import INT8, INT8_TENSOR
from jaxquant.ops.qdot import FLOAT, STE, Operand, Rule
from jaxquant.recipe import Recipe


def switchback(*, save_int8: bool = False, float_sites: str = "embed|head") -> Recipe:
  """Int8 rows of x and g, one scale per weight; dw = x^T g in high precision.

  The contraction of dw is as long as the batch has tokens, and its noise grows with it; the other
  two GEMMs are as long as the model is wide. The paper trains with StableAdamW
  (`jaxquant.training.optimizer(..., method="stable_adamw")`) and a layerscale that starts at zero
  beside it, which belongs to the model and is not here (details recalled).

  Args:
    save_int8: keep the quantized x for dw, in int8, instead of x itself (the memory-saving
      variant).
    float_sites: pattern of sites that stay in high precision.
  """
  rows, tensor = Operand(INT8), Operand(INT8_TENSOR)
  saved = STE if save_int8 else Operand()
  rule = Rule(rows, tensor, rows, tensor, wgrad_x=saved, keep_packed=save_int8)
  return Recipe(((float_sites, FLOAT), (".*", rule)), name="switchback")
