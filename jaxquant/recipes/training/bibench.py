"""BiBench: the operators of binarization side by side (arXiv:2301.11233)."""

from jaxquant.ops.qdot import FLOAT, Rule
from jaxquant.quantizers import (
  Binary,
  Centered,
  Chain,
  Clamped,
  Fourier,
  Parts,
  Scale,
  Shift,
  Unit,
  bireal,
  clip_open,
  identity,
)
from jaxquant.recipe import Recipe

SIGN, CURVED = Binary(), Binary(bireal)
SIZED = Binary(magnitude=-2, scale_in_grad=False)
CENTERED = Chain((Centered(), Binary(magnitude=-2)))
OPERATORS = {  # (weight, input, output), in the form for linear layers
  "bnn": lambda steps: (SIGN, SIGN, None),
  "xnor": lambda steps: (CENTERED, Binary(magnitude=-1), None),
  "dorefa": lambda steps: (Binary(clip_open, -2), Binary(clip_open), None),
  "bireal": lambda steps: (SIZED, CURVED, None),
  "xnor_pp": lambda steps: (SIGN, SIGN, Scale()),
  "react": lambda steps: (SIZED, Chain((Shift(), CURVED)), None),
  "recu": lambda steps: (
    Chain((Centered(), Unit(by=8**0.5), Clamped(steps=steps), Binary(identity))),
    Chain((Unit(-1), CURVED)),
    Scale(),
  ),
  "fda": lambda steps: (Fourier(steps=steps, magnitude=-2, axis=-2), Fourier(steps=steps), None),
}


def bibench(
  operator: str = "react", *, steps: int = 1000, float_sites: str = "embed|head"
) -> Recipe:
  """One bit for weights and inputs, by one of the eight operators.

  ReActNet's activation function (RPReLU) belongs to the model.

  Args:
    operator: a key of `OPERATORS`.
    steps: of the run, for the schedules of ReCU and FDA.
    float_sites: pattern of sites that stay in high precision.
  """
  rule = Rule(learned=Parts(*OPERATORS[operator](steps)))
  return Recipe(((float_sites, FLOAT), (".*", rule)), name=f"bibench_{operator}")
