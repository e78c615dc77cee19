"""FP8 training with a scale per tensor: delayed or current, hybrid formats (arXiv:2209.05433)."""

from jaxquant.formats import E4M3_TENSOR, E5M2_TENSOR, Format
from jaxquant.ops.qdot import FLOAT, Operand, Rule
from jaxquant.ops.tracked import Delayed, Tracked
from jaxquant.recipe import Recipe
from jaxquant.scales import ScaleRule


def fp8(
  scales: ScaleRule | Tracked = Delayed(),  # noqa: B008  a frozen value
  *,
  gradient: Format = E5M2_TENSOR,
  float_sites: str = "embed|head",
) -> Recipe:
  """E4M3 for x and w in all GEMMs, E5M2 for gradients: the HYBRID recipe of Transformer Engine.

  A delayed scale comes from the magnitudes of the steps before, so that a tensor is read once; its
  first step has the scale 1 and saturates what is larger than the format. A current one is found
  from the tensor itself (`jaxquant.scales.fp8_scale`, `fp8_scale_pow2`). Gradients have a wide
  range: in E4M3 more of them are flushed to zero than in E5M2. Sums are float32.

  Args:
    scales: of all six operands: `Delayed(history, margin, most_recent)`, or a rule.
    gradient: format of g; E4M3_TENSOR for all operands alike.
    float_sites: pattern of sites that stay in high precision.
  """
  a, g = Operand(E4M3_TENSOR, scales), Operand(gradient, scales)
  return Recipe(((float_sites, FLOAT), (".*", Rule(a, a, g, a, a, g))), name="fp8")
