"""GPTQ (arXiv:2210.17323)."""

import jax
import jax.numpy as jnp

from jaxquant.formats import INT4_G128, Format
from jaxquant.kernels import Pre
from jaxquant.named_functions import bound
from jaxquant.ops.qdot import FLOAT, weight_only
from jaxquant.recipe import Recipe
from jaxquant.solvers.gptq import gptq
from jaxquant.statistics import HESSIAN
from jaxquant.transforms import permute


def w4a16_gptq(
  fmt: Format = INT4_G128,
  *,
  order: bool = False,
  static_groups: bool = False,
  damp: float = 0.01,
  block: int = 128,
  float_sites: str = "embed|head",
) -> Recipe:
  """Weights in `fmt` with error feedback through the Hessian X^T X of the calibration inputs.

  Differs from the paper's code in two points: inputs come from the float model, unless
  `.replace(inputs="quantized")` asks for those of already quantized blocks; groups smaller than
  `block` see all errors of the groups before them.

  Args:
    fmt: of the weights.
    order: take channels by falling H_kk (act-order). Without `static_groups`, groups are runs of
      that order, and the kernel permutes its input (the code's g_idx).
    static_groups: find all scales before any error is fed back.
    damp: added to the diagonal of H, relative to its mean. At 2 bits more than the published .01
      and `order` pay where a few channels are hot (BUILD_NOTES, gates).
    block: rows per lazy update.
    float_sites: pattern of sites that stay in high precision.
  """
  rules = ((float_sites, FLOAT), (".*", weight_only(fmt)))
  if order and not static_groups:
    solve = bound(_in_order, damp=damp, block=block)
  else:
    options = {"order": order, "static_groups": static_groups, "damp": damp, "block": block}
    solve = bound(gptq, **options)
  return Recipe(rules, solve=solve, statistic=HESSIAN, name="w4a16_gptq")


def _in_order(w: jax.Array, hessian: jax.Array, fmt: Format, **options: object) -> Pre:
  perm = jnp.argsort(-jnp.diagonal(hessian))
  turn = permute(perm)
  return Pre(turn, gptq(turn.fold(w), hessian[perm][:, perm], fmt, **options))
