"""Integers against floats in fine-grained blocks (INT v.s. FP, arXiv:2510.25602)."""

from jaxquant.formats import E8M0, MXINT8, Format
from jaxquant.ops.qdot import FLOAT, Operand, Rotation, Rule
from jaxquant.recipe import Recipe
from jaxquant.scales import ocp_ceil


def int_vs_fp(
  fmt: Format = MXINT8,
  *,
  training: bool = True,
  rotation: int | None = None,
  float_sites: str = "embed|head",
) -> Recipe:
  """One format for every operand, round to nearest, each from the high-precision tensor.

  The study's pairs are MXINT8, 6, 4 against MXFP8 (E4M3), MXFP6 (E2M3), MXFP4, and NVINT4 against
  NVFP4. Powers of two are rounded up, so nothing clips. Integers are symmetric (no -2^(b-1)): with
  that code a block's extreme saturates on the positive side only, which biases gradients.
  `jaxquant.diagnostics.qsnr` has the theory of which of a pair wins, by crest factor.

  Args:
    fmt: of all operands.
    training: all six operands; else x and w only (the study of inference).
    rotation: block of a Hadamard rotation along each contraction first; None: none. The study
      uses 32 for inference; it lets NVINT4 pass NVFP4.
    float_sites: pattern of sites that stay in high precision.
  """
  turn = None if rotation is None else Rotation(rotation)
  each = Operand(fmt, ocp_ceil if fmt.scale == E8M0 else None, rotation=turn)
  rule = Rule(each, each, each, each, each, each) if training else Rule(x=each, w=each)
  turned = "" if rotation is None else f"+h{rotation}"
  return Recipe(((float_sites, FLOAT), (".*", rule)), name=f"{fmt}{turned}")
