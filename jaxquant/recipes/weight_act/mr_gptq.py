"""MR-GPTQ (arXiv:2509.23202)."""

import jax

from jaxquant.formats import MXFP4_TENSOR, Format
from jaxquant.ops.qdot import FLOAT, Operand, Rotation, Rule
from jaxquant.recipe import Recipe
from jaxquant.scales import ScaleRule
from jaxquant.solvers.gptq import gptq
from jaxquant.statistics import HESSIAN
from jaxquant.tensor import QTensor


def ordered(w: jax.Array, h: jax.Array, fmt: Format, *, rule: ScaleRule | None = None) -> QTensor:
  """GPTQ by falling curvature; scales found in w first, so that blocks stay contiguous."""
  return gptq(w, h, fmt, rule=rule, order=True)


def mr_gptq(
  fmt: Format = MXFP4_TENSOR,
  *,
  block: int | None = 128,
  scales: ScaleRule | None = None,
  float_sites: str = "embed|head",
) -> Recipe:
  """W4A4 in FP4 blocks: Hadamard rotation of every site's input, then GPTQ in the rotated basis.

  Weights are rotated once, activations on the fly before they are quantized (section 4). The paper
  finds the rotation helpful for MXFP4 and harmful for NVFP4 with nearest scales. Its MXFP4 has 4/3
  of the OCP floor scale, as one constant per tensor: the floor would clip the largest elements of a
  rotated block, which an outlier makes nearly equal.

  Args:
    fmt: of weights and activations: `MXFP4_TENSOR`, `MXFP4` (the OCP floor) or `NVFP4`.
    block: of the rotation, divides K; 128 in the published code. None: no rotation.
    scales: of weights and activations; by default those that the format implies.
    float_sites: pattern of sites that stay in high precision.
  """
  rotation = None if block is None else Rotation(block)
  operand = Operand(fmt, scales, rotation=rotation)
  rules = ((float_sites, FLOAT), (".*", Rule(x=operand, w=operand)))
  return Recipe(rules, ordered, HESSIAN, name="mr_gptq")
