"""VPTQ (arXiv:2409.17066)."""

from jaxquant.formats import FP16, Format
from jaxquant.named_functions import bound
from jaxquant.ops.qdot import FLOAT, weight_only
from jaxquant.recipe import Recipe
from jaxquant.solvers.vq import vptq as solve
from jaxquant.statistics import HESSIAN

FP16_CODEWORDS = Format(FP16)


def vptq(
  v: int = 4,
  k: int = 256,
  *,
  k_residual: int = 0,
  outliers: float = 0.0,
  normalize: bool = False,
  tune: int = 10,
  second_order: bool = True,
  float_sites: str = "embed|head",
) -> Recipe:
  """Vectors of v weights on one of k codewords: log2(k) / v bits and the codebook, 2 by default.

  Differs from the paper's code: inputs come from the float model, outlier channels keep a float16
  rest instead of a codebook of their own, and codewords are tuned afterwards by least squares on
  each layer's output, where the code takes gradient steps (and may go on with the whole model).
  Channels are normalized without their mean.

  Args:
    v: weights per vector, along N.
    k: codewords.
    k_residual: codewords of the second codebook; 0: none.
    outliers: share of channels that also keep their rest.
    normalize: divide channels by their root mean square first; a float32 per channel is stored.
    tune: iterations on the codewords at the end; 0 leaves them as k-means does.
    second_order: feed errors to later channels; False is plain vector quantization.
    float_sites: pattern of sites that stay in high precision.
  """
  books = {"v": v, "k": k, "k_residual": k_residual, "outliers": outliers}
  solver = bound(solve, **books, normalize=normalize, tune=tune, second_order=second_order)
  rules = ((float_sites, FLOAT), (".*", weight_only(FP16_CODEWORDS)))
  return Recipe(rules, solve=solver, statistic=HESSIAN, name="vptq")
