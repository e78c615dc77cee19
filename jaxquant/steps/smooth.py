"""Scales that move range between activations and weights, from the inputs' maxima."""

from __future__ import annotations

import abc
import dataclasses

import jax
import jax.numpy as jnp

from jaxquant.fold import fold_scale
from jaxquant.graph import Edge, matrix, shared
from jaxquant.prepare import Context
from jaxquant.sites import flat_params
from jaxquant.statistics import AMAX, Statistic, Tree

SMALLEST = 1e-5  # of a smoothing scale, as in SmoothQuant's code


def edges(context: Context, norms_only: bool = False) -> tuple[Edge, ...]:
  """Edges into which a scale folds and one of whose readers the recipe quantizes."""
  graph = context.graph
  return tuple(
    edge
    for edge in (graph.norms if norms_only else graph.edges)
    if not graph.tied(edge) and any(context.quantized(r.site) for r in edge.readers)
  )


class MaximaScales(abc.ABC):
  """A step that scales the channels of edges by a function of their largest magnitudes.

  Subclasses are dataclasses with `norms_only` and `statistic`, and define `scale`.
  """

  norms_only: bool
  statistic: Statistic | None

  def sites(self, context: Context) -> tuple[tuple[str, ...], ...]:
    """The first reader of each edge; the others have the same input."""
    return tuple((e.readers[0].site,) for e in edges(context, self.norms_only))

  @abc.abstractmethod
  def scale(self, a: jax.Array, edge: Edge, variables: dict) -> jax.Array:
    """What to divide the channels of an edge by: [..., N] from max|X_k| [..., N]."""

  def apply(self, variables: dict, context: Context, stats: dict[str, Tree]) -> dict:
    """Edge by edge."""
    for edge in edges(context, self.norms_only):
      if edge.readers[0].site in stats:
        s = self.scale(shared(edge, stats[edge.readers[0].site]), edge, variables)
        variables = fold_scale(variables, context.graph, edge, s, donate=context.donate)
    return variables


@dataclasses.dataclass(frozen=True)
class Smooth(MaximaScales):
  """SmoothQuant: outliers move from activations to weights; arXiv:2211.10438, eq. 4.

      s_k = max|X_k|^alpha / max_n |W_kn|^(1 - alpha);  x / s, w * s

  The maximum of W is over all weights that read the channel. A channel that is zero on all
  calibration data, or in all weights, keeps its scale.

  Attributes:
    alpha: how much of the range the weights take.
    norms_only: leave v -> o and up -> down alone, as the paper does.
  """

  alpha: float = 0.5
  norms_only: bool = True
  statistic: Statistic | None = dataclasses.field(default=AMAX, repr=False)

  def scale(self, a: jax.Array, edge: Edge, variables: dict) -> jax.Array:
    """The s of the formula."""
    flat = flat_params(variables)
    weights = [jnp.abs(matrix(flat, r)).max(-1) for r in edge.readers]
    w = shared(edge, jnp.stack(weights).max(0))
    s = jnp.maximum(a**self.alpha / w ** (1 - self.alpha), SMALLEST)
    return jnp.where((a > 0) & (w > 0), s, 1)
