"""CHON: hot channels are compensated in NVFP4 training (arXiv:2602.02047)."""

from jaxquant.formats import NVFP4, NVFP4_2D, Format
from jaxquant.ops.hadamard import RHT_SIGNS
from jaxquant.ops.qdot import FLOAT, Operand, Rotation, Rule
from jaxquant.ops.tracked import HotChannels
from jaxquant.recipe import Recipe
from jaxquant.rounding import stochastic

POST_QK = {"softmax": ".*attn/v", "gla": ".*attn/o|.*attn/gk.*"}  # sites, by kind of attention


def chon(
  *,
  k: int | None = None,
  every: int = 100,
  residual: Format | None = NVFP4,
  patch_x: bool = True,
  patch_w: bool = True,
  patch_wgrad: bool = False,
  attention: str = "softmax",
  float_sites: str = "embed|head",
) -> Recipe:
  """NVFP4 training whose forward GEMMs add the residuals of the k worst input channels again.

  The rule is that of `nvfp4` and a `HotChannels` patch of the forward product; backward GEMMs see
  the unpatched tensors, unless dw is patched too. What acts on the result of q k^T stays in high
  precision: the values of softmax attention, the output and gate projections of gated linear
  attention. The text that could be read gives neither k, nor the interval, nor the precision of the
  residuals, nor what the backward pass does: defaults are ours.

  Args:
    k: patched channels; None: a sixteenth of K, at least 16.
    every: steps between two choices of channels.
    residual: format of the residuals; None: high precision.
    patch_x: the ablations: residuals of x.
    patch_w: and of w. Without both it is NVFP4 with protected sites.
    patch_wgrad: the same channels are rows of dw, whose residuals of x and g are added there.
    attention: "softmax" or "gla", a key of `POST_QK`.
    float_sites: pattern of further sites in high precision.
  """
  weight, rht = Operand(NVFP4_2D), Rotation(16, RHT_SIGNS)
  patch = HotChannels(k, residual, patch_x, patch_w, every, patch_wgrad)
  rule = Rule(
    x=Operand(NVFP4),
    w=weight,
    dgrad_g=Operand(NVFP4, rounding=stochastic),
    dgrad_w=weight,
    wgrad_x=Operand(NVFP4, rotation=rht),
    wgrad_g=Operand(NVFP4, rounding=stochastic, rotation=rht),
    patch=patch if patch_x or patch_w else None,
  )
  protected = f"{float_sites}|{POST_QK[attention]}"
  return Recipe(((protected, FLOAT), (".*", rule)), name="chon")
