"""NVFP4 pretraining (arXiv:2509.25149)."""

from jaxquant import scales
from jaxquant.formats import NVFP4, NVFP4_2D, NVFP4_ROW
from jaxquant.named_functions import bound
from jaxquant.nested import per_row
from jaxquant.ops.hadamard import RHT_SIGNS
from jaxquant.ops.qdot import FLOAT, Operand, Rotation, Rule, Source
from jaxquant.recipe import Recipe
from jaxquant.rounding import nearest_even, stochastic


def nvfp4(
  *,
  disable_rht: bool = False,
  disable_sr: bool = False,
  disable_2d: bool = False,
  shrink: bool = False,
  four_over_six: bool = False,
  row_scaled: bool = False,
  backward_override: Source | None = None,
  float_sites: str = "embed|head",
) -> Recipe:
  """W4A4 forward and backward: 2D weight tiles, RHT on wgrad, stochastic rounding of gradients.

  - w in 16 x 16 tiles, so that w and w^T are the same numbers in fprop and dgrad;
  - g rounded stochastically in both backward GEMMs, everything else to nearest even;
  - both wgrad operands rotated along the tokens by a 16 x 16 randomized Hadamard transform with one
    fixed sign vector, and quantized from the high-precision tensors.

  The paper also keeps about 15 % of the blocks, mostly the last ones, in BF16 (recalled, not
  checked). All layers of a scan are one site; build the model with scan=False, where they have
  names, and say which: float_sites="embed|head|layers_(10|11)/.*" for the last two of twelve.

  Args:
    disable_rht: wgrad operands are not rotated.
    disable_sr: gradients are rounded to nearest even.
    disable_2d: w in blocks of 16, along K in fprop and along N in dgrad.
    shrink: map block maxima of g to 6 * 16/17, so that none saturates after its scale is rounded
      and stochastic rounding has no bias (the 17/16 override in the code of arXiv:2601.22813).
    four_over_six: of the operands that are neither rotated nor random, block maxima at 6 or 4,
      whichever has the lower error (arXiv:2512.02010).
    row_scaled: the forward x has a float32 scale per token instead of one per tensor, so that its
      codes do not depend on what else is in the batch (an option of Transformer Engine).
    backward_override: dx and dw in high precision, of the original x and w (`Source.ORIGINAL`), or
      of what the forward GEMM saw, kept packed (`Source.FORWARD`: the exact gradient of fake
      quantization); Transformer Engine's "high_precision" and "dequantized". None: NVFP4.
    float_sites: pattern of sites that stay in high precision.
  """
  near = scales.four_over_six if four_over_six else None
  noisy = bound(scales.nvfp4, top=6 * 16 / 17) if shrink else None
  rounding = nearest_even if disable_sr else stochastic
  rht = None if disable_rht else Rotation(16, RHT_SIGNS)
  x = Operand(NVFP4_ROW, per_row(near or scales.nvfp4)) if row_scaled else Operand(NVFP4, near)
  w = Operand(NVFP4 if disable_2d else NVFP4_2D, near)
  rule = Rule(
    x=x,
    w=w,
    dgrad_g=Operand(NVFP4, noisy, rounding),
    dgrad_w=w,
    wgrad_x=Operand(NVFP4, rotation=rht),
    wgrad_g=Operand(NVFP4, noisy, rounding, rht),
  )
  if backward_override is not None:
    seen = Operand(source=backward_override)
    rule = Rule(x, w, dgrad_w=seen, wgrad_x=seen, keep_packed=backward_override is Source.FORWARD)
  return Recipe(((float_sites, FLOAT), (".*", rule)), name="nvfp4")
