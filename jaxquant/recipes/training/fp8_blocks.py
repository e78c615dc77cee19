"""FP8 training in blocks: the recipe of DeepSeek-V3 (arXiv:2412.19437, section 3.3)."""

from jaxquant.formats import E4M3_1X128, E4M3_128X128
from jaxquant.ops.qdot import FLOAT, Operand, Rule
from jaxquant.recipe import Recipe
from jaxquant.scales import fp8_scale, fp8_scale_pow2


def fp8_blocks(*, pow2: bool = False, float_sites: str = "embed|head") -> Recipe:
  """E4M3 everywhere: x and g in 1 x 128 along each contraction, w in 128 x 128 tiles.

  Scales are current. Row-wise and column-wise copies of x and g are both quantized from the
  high-precision tensor; the tiles of w serve fprop and dgrad. Fine blocks make up for the range
  that E4M3 lacks for gradients. The paper adds partial sums in float32 every 128 of K; here all
  sums are float32. It also keeps the attention core, norms and router in high precision (recalled).

  Args:
    pow2: scales are powers of two (Transformer Engine's default; the paper's for some activations).
    float_sites: pattern of sites that stay in high precision.
  """
  scales = fp8_scale_pow2 if pow2 else fp8_scale
  a, w = Operand(E4M3_1X128, scales), Operand(E4M3_128X128, scales)
  return Recipe(((float_sites, FLOAT), (".*", Rule(a, w, a, w, a, a))), name="fp8_blocks")
