"""FireQ (arXiv:2505.20839)."""

from jaxquant.formats import E4M3_TOKEN, INT4_G128_E4M3, Format
from jaxquant.nested import power_of_tensor
from jaxquant.ops.qdot import FLOAT, Operand, Rule
from jaxquant.recipe import Recipe
from jaxquant.steps import SmoothKeys, pair_norm
from jaxquant.steps.channels import EvenWeights

EVEN_KEYS = SmoothKeys(pair_norm, alpha=1.0, level=8.0)  # before RoPE; level of the published code


def fireq(
  fmt: Format = INT4_G128_E4M3,
  *,
  even: bool = True,
  keys: bool = False,
  float_sites: str = "embed|head",
) -> Recipe:
  """W4A8: int4 groups with E4M3 scales under a power of two per tensor, x E4M3 per token.

  Channel-wise scaling of what the feed-forward weights read comes first. The published kernel
  rounds code times scale to E4M3 once more before the GEMM; here the product is exact. The 4-bit
  cache, and the part of its RoPE-aware scaling that runs online after RoPE, are not part of it.

  Args:
    fmt: of the weights.
    even: fold the channel-wise scaling into the model, which must have a graph.
    keys: fold the RoPE-aware scaling of keys into q and k, for a 4-bit cache; it calibrates.
    float_sites: pattern of sites that stay in high precision.
  """
  rule = Rule(x=Operand(E4M3_TOKEN), w=Operand(fmt, scales=power_of_tensor))
  steps = (EvenWeights(),) * even + (EVEN_KEYS,) * keys
  return Recipe(((float_sites, FLOAT), (".*", rule)), name="fireq", prepare=steps)
