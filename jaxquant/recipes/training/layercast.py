"""LayerCast: 16-bit weights, float32 everywhere else (arXiv:2506.09501)."""

from jaxquant.formats import BFLOAT16, Format
from jaxquant.ops.qdot import weight_only
from jaxquant.recipe import Recipe


def layercast(fmt: Format = BFLOAT16) -> Recipe:
  """Weights in `fmt`, widened to float32 next to their product; every site, the head included.

  The order of a sum depends on batch, padding and number of devices; float32 makes the difference
  too small to change a greedy token, bf16 does not. Float32 needs the memory of float32 only where
  it lasts, so weights stay narrow. Activations, scores, logits and the cache have the type of the
  model, which therefore has to be built with dtype=float32; products are then taken in float32 on
  every backend. Norms and biases (a thousandth of the bytes) stay as they are.

  Args:
    fmt: of the stored weights; any narrower one is decoded to float32 instead.
  """
  return Recipe(((".*", weight_only(fmt)),), name="layercast")
