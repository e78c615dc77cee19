"""Scales that make keys even, so that a few bits hold them; queries take the scales back.

Letters: B batch, T time, G key/value heads, D head dim.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxquant.fold import fold_pair
from jaxquant.formats import INT8
from jaxquant.model_blocks import attention_statistics
from jaxquant.ops.qdot import weight_only
from jaxquant.prepare import Context
from jaxquant.recipe import Recipe
from jaxquant.statistics import AttentionStatistic, LayerAttention, Statistic, Tree, amax, largest

Measure = Callable[[jax.Array], jax.Array]


def pair_amax(k: jax.Array) -> jax.Array:
  """Largest magnitude of either channel of a rotary pair, max_t max(|k_i|, |k_(i + D/2)|).

  Args:
    k: rotated keys, [B, T, G, D].

  Returns:
    float32 [G, D/2].

  Example:
    >>> import jax.numpy as jnp
    >>> pair_amax(jnp.array([[[[3.0, 0.0, -4.0, 1.0]]]])).tolist()
    [[4.0, 1.0]]
  """
  a = amax(k.reshape(-1, k.shape[-2] * k.shape[-1])).reshape(k.shape[-2:])
  return jnp.maximum(*jnp.split(a, 2, -1))


def pair_norm(k: jax.Array) -> jax.Array:
  """Largest norm of a rotary pair, max_t sqrt(k_i^2 + k_(i + D/2)^2): the same before RoPE.

  Args:
    k: keys, rotated or not, [B, T, G, D].

  Returns:
    float32 [G, D/2].

  Example:
    >>> import jax.numpy as jnp
    >>> pair_norm(jnp.array([[[[3.0, 0.0, -4.0, 1.0]]]])).tolist()
    [[5.0, 1.0]]
  """
  a, b = jnp.split(k.astype(jnp.float32), 2, -1)
  return amax(jnp.hypot(a, b).reshape(-1, a.shape[-2] * a.shape[-1])).reshape(a.shape[-2:])


@dataclasses.dataclass(frozen=True)
class _OfKeys:
  """A measure of a layer's rotated keys, as an `AttentionStatistic` wants it."""

  measure: Measure

  def __call__(self, x: jax.Array, site: str, attention: LayerAttention) -> jax.Array:
    del x, site
    return self.measure(attention.k)


@dataclasses.dataclass(frozen=True)
class SmoothKeys:
  """Keys / s and queries * s, one s for each rotary pair of a key head; no score changes.

      s = (a / level)^alpha,  a = measure of the pair over all calibration tokens

  SmoothAttention of QServe is `SmoothKeys()` (arXiv:2405.04532, section 4.2: pair_amax, alpha 0.5);
  the pre-RoPE half of FireQ's RoPE-aware scaling is `SmoothKeys(pair_norm, alpha=1.0, level=8.0)`
  (arXiv:2505.20839; level as in its code). Query heads that share a key head take its scales. A
  pair that is zero on all calibration data keeps its scale.

  Attributes:
    measure: rotated keys [B, T, G, D] -> [G, D/2].
    alpha: how much of the range the queries take; at 1 all pairs become equally large.
    level: what a pair is measured against; for a format with free scales only a common factor.
  """

  measure: Measure = pair_amax
  alpha: float = 0.5
  level: float = 1.0
  statistic: Statistic | None = dataclasses.field(default=None, repr=False)
  reads_batches: ClassVar[bool] = True

  def __post_init__(self) -> None:
    """Raises ValueError for a level that is not positive."""
    if not self.level > 0:
      raise ValueError(f"SmoothKeys: level must be positive, got {self.level}")

  def sites(self, context: Context) -> tuple[tuple[str, ...], ...]:
    """None: it looks at the attention of each layer, not at inputs of sites."""
    del context
    return ()

  def apply(self, variables: dict, context: Context, stats: dict[str, Tree]) -> dict:
    """Folds the scales into q and k of each pair of the graph.

    Raises:
      ValueError: without batches; for a model whose attention nobody registered
        (`jaxquant.model_blocks.attention_statistics`); for a pair without RoPE.
    """
    del stats
    pairs = context.graph.pairs
    if not all(pair.rope for pair in pairs):
      raise ValueError(f"{context.recipe.name}: SmoothKeys scales rotary pairs; a pair has no RoPE")
    keys = "|".join(re.escape(pair.key.site) for pair in pairs)
    statistic = AttentionStatistic(combine=largest, layer=_OfKeys(self.measure))
    name = f"{context.recipe.name}: SmoothKeys"
    reads = Recipe(((keys, weight_only(INT8)),), statistic=statistic, name=name)
    found = attention_statistics(context.model, variables, reads, context.batches)
    for pair in pairs:
      a = found[pair.key.site]
      s = jnp.where(a > 0, (a / self.level) ** self.alpha, 1.0)
      variables = fold_pair(variables, pair, s)
    return variables
