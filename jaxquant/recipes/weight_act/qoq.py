"""QoQ, the W4A8 of QServe (arXiv:2405.04532)."""

import jax

from jaxquant.formats import INT8, UINT4_G128_INT8, Format
from jaxquant.nested import progressive, within_int8
from jaxquant.ops.qdot import FLOAT, Operand, Rule
from jaxquant.recipe import Recipe
from jaxquant.scales import ScaleRule
from jaxquant.solvers.gptq import gptq
from jaxquant.statistics import HESSIAN
from jaxquant.steps import RotateStream, SmoothKeys
from jaxquant.tensor import QTensor


def fixed_scales(w: jax.Array, h: jax.Array, fmt: Format, *, rule: ScaleRule) -> QTensor:
  """GPTQ by falling curvature under the scales of the weight as it came.

  Error feedback can move a weight past the end of its group: such codes stay within int8.
  """
  return within_int8(gptq(w, h, fmt, rule=rule, order=True, static_groups=True))


def qoq(
  fmt: Format = UINT4_G128_INT8,
  *,
  protect: int = 119,
  rotate: bool = True,
  keys: bool = False,
  float_sites: str = "embed|head",
) -> Recipe:
  """W4A8: int4 groups that decode to int8 values of their column, GPTQ; x int8 per token.

  Progressive group quantization (section 4.1) with the protective range, on a rotated residual
  stream (section 4.3). The smoothing and reordering of what the other modules read, and the 4-bit
  cache, are not part of it.

  Args:
    fmt: of the weights, integers under integer scales.
    protect: of `progressive`.
    rotate: rotate the residual stream of the model, which must have a graph.
    keys: fold SmoothAttention (section 4.2) into q and k, for a 4-bit cache.
    float_sites: pattern of sites that stay in high precision.
  """
  rule = Rule(x=Operand(INT8), w=Operand(fmt, scales=progressive(protect)))
  rules = ((float_sites, FLOAT), (".*", rule))
  steps = (RotateStream(),) * rotate + (SmoothKeys(),) * keys
  return Recipe(rules, fixed_scales, HESSIAN, name="qoq", prepare=steps)
