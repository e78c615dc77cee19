"""The design space of FP4 training (arXiv:2509.17791), as options that combine freely."""

from jaxquant.estimators import Estimator
from jaxquant.formats import E2M1, E8M0, Format, Grid
from jaxquant.observers import smoothed
from jaxquant.ops.qdot import FLOAT, Operand, Rotation, Rule
from jaxquant.recipe import Recipe
from jaxquant.rounding import Rounding, nearest_even
from jaxquant.scales import ScaleRule, ocp_floor


def fp4_space(
  *,
  block: int = 32,
  scale: Grid | Format | None = E8M0,
  rule: ScaleRule = ocp_floor,
  smooth: float | None = None,
  forward: Rounding = nearest_even,
  backward: Rounding = nearest_even,
  fprop: Rotation | None = None,
  dgrad: Rotation | None = None,
  wgrad: Rotation | None = None,
  gradient: Estimator | None = None,
  float_sites: str = "embed|head",
) -> Recipe:
  """E2M1 in all six operands; the default is naive MXFP4.

  `jaxquant.design_space` enumerates the options by name and has their cost.

  Args:
    block: elements along the contraction that share a scale.
    scale: how it is stored; a Format has a scale of its own (tensor scaling).
    rule: how it is found.
    smooth: sharpness of a softmax in place of the block's maximum; None: the maximum.
    forward: rounding of x and w.
    backward: rounding of the four backward operands.
    fprop: rotation of x and w, and so on for the other two GEMMs.
    dgrad: of g and w.
    wgrad: of x and g.
    gradient: estimator of the gradient through w (`jaxquant.estimators`); x is straight-through,
      because slopes multiply from layer to layer.
    float_sites: pattern of sites that stay in high precision.
  """
  fmt = Format(E2M1, block, scale=scale)
  rule = rule if smooth is None else smoothed(smooth, rule)
  x, w = (Operand(fmt, rule, forward, fprop, gradient=g) for g in (None, gradient))
  dx, dw = (Operand(fmt, rule, backward, rotation) for rotation in (dgrad, wgrad))
  each = Rule(x, w, dx, dx, dw, dw)
  return Recipe(((float_sites, FLOAT), (".*", each)), name="fp4_space")
