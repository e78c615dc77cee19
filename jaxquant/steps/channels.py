"""Channel scales by the rules of single papers that smooth: a percentile, a gap, an even weight."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp

from jaxquant.fold import fold_scale
from jaxquant.graph import Edge, matrix, shared
from jaxquant.prepare import Context
from jaxquant.sites import flat_params
from jaxquant.solvers.coarse_to_fine import coarse_to_fine
from jaxquant.statistics import AMAX, Statistic, Tree
from jaxquant.steps.rotate import WithoutData
from jaxquant.steps.smooth import MaximaScales, edges


@dataclasses.dataclass(frozen=True)
class Percentile(MaximaScales):
  """Only outlier channels are scaled down, to the level of the largest other ones.

      s_k = max(a_k / b, 1),  a_k = max|X_k|,  b the value at rank `share` of a from above

  DGQ's smoothing (arXiv:2310.04836, section 3.3). It has no power to tune.

  Attributes:
    share: of the channels that count as outliers. Where more of them are outliers, `b` is one of
      them and nothing is smoothed.
    norms_only: leave v -> o and up -> down alone.
  """

  share: float = 0.005
  norms_only: bool = True
  statistic: Statistic | None = dataclasses.field(default=AMAX, repr=False)

  def scale(self, a: jax.Array, edge: Edge, variables: dict) -> jax.Array:
    """The s of the formula."""
    del edge, variables
    rank = min(int(a.shape[-1] * self.share), a.shape[-1] - 1)
    b = jnp.flip(jnp.sort(a, -1), -1)[..., rank, None]
    return jnp.where(b > 0, jnp.maximum(a / jnp.where(b > 0, b, 1), 1), 1)


@dataclasses.dataclass(frozen=True)
class OutlierChannels(MaximaScales):
  """Only outlier channels are scaled down, by the root of how far they are above the others.

      s_k = sqrt(a_k / t) where a_k > t, else 1;  a_k = max|X_k|,  t = `coarse_to_fine`(a)

  CBQ's activations (arXiv:2312.07950, coarse-to-fine preprocessing).

  Attributes:
    norms_only: leave v -> o and up -> down alone.
  """

  norms_only: bool = True
  statistic: Statistic | None = dataclasses.field(default=AMAX, repr=False)

  def scale(self, a: jax.Array, edge: Edge, variables: dict) -> jax.Array:
    """The s of the formula."""
    del edge, variables
    t = coarse_to_fine(a)[..., None]
    return jnp.where(a > t, jnp.sqrt(a / jnp.where(t > 0, t, a)), 1)


@dataclasses.dataclass(frozen=True)
class EvenWeights(WithoutData):
  """Every input channel of a weight gets the same mean magnitude: FireQ's channel-wise scaling.

      t_k = g / mean_n |W_kn|;  x / t, w * t,  over all weights that read the channel

  arXiv:2505.20839. The constants g that it tunes per model are here the mean |W| of the weights.

  Attributes:
    readers: pattern of the sites whose edges are scaled.
  """

  readers: str = ".*(gate|up|down)"

  def apply(self, variables: dict, context: Context, stats: dict[str, Tree]) -> dict:
    """Edge by edge; a channel without weights keeps its scale."""
    del stats
    for edge in edges(context):
      if all(re.fullmatch(self.readers, r.site) for r in edge.readers):
        flat = flat_params(variables)
        weights = jnp.concatenate([jnp.abs(matrix(flat, r)) for r in edge.readers], -1)
        mean = shared(edge, weights.mean(-1))
        t = mean.mean(-1, keepdims=True) / jnp.where(mean > 0, mean, 1)
        variables = fold_scale(variables, context.graph, edge, jnp.where(mean > 0, t, 1))
    return variables
