"""Outliers found twice: past the fence of the quartiles, then behind the widest gap."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxquant.formats import Format
from jaxquant.scales import ScaleRule
from jaxquant.solvers.rtn import rtn


@functools.partial(jnp.vectorize, excluded=("fence", "spread"), signature="(n)->()")
def coarse_to_fine(x: jax.Array, *, fence: float = 1.5, spread: float = 1.0) -> jax.Array:
  """The largest magnitude that is no outlier: what is above it, and nothing else, is one.

      coarse: O = {a > Q3 + fence (Q3 - Q1)}, a = |x|, Q1 and Q3 its quartiles
      fine: the split of O with the largest (min O_outlier - max O_kept)^2 - spread Var(O_kept)

  The detection of CBQ (arXiv:2312.07950, coarse-to-fine preprocessing); both constants are its.
  O_kept is the part of O below the split. Where it is empty the gap is to the largest value inside
  the fence, which the paper leaves open. Without anything past the fence there are no
  outliers; data with long tails and no gaps lose all that is past it.

  Args:
    x: [..., n]; leading axes are apart. Finite.
    fence: interquartile ranges from the third quartile to the fence.
    spread: what the variance of the kept part counts.

  Returns:
    float32 [...]; the largest |x| if there are no outliers.

  Example:
    >>> import jax.numpy as jnp
    >>> x = jnp.array([1.0, -1.2, 0.8, 1.1, -0.9, 1.0, 9.0, -8.0])
    >>> jnp.abs(x) > coarse_to_fine(x)
    Array([False, False, False, False, False, False,  True,  True], dtype=bool)
  """
  a = jnp.sort(jnp.abs(x.astype(jnp.float32)))
  q1, q3 = _quantile(a, 0.25), _quantile(a, 0.75)
  limit = q3 + fence * (q3 - q1)
  coarse = a > limit
  below = lambda v: jnp.cumsum(jnp.concatenate([jnp.zeros_like(v[:1]), v[:-1]]))
  past = jnp.where(coarse, a - limit, 0)
  n = jnp.maximum(below(coarse.astype(jnp.float32)), 1)
  variance = below(jnp.square(past)) / n - jnp.square(below(past) / n)
  gap = a - jnp.concatenate([a[:1], a[:-1]])
  merit = jnp.square(gap) - spread * jnp.maximum(variance, 0)
  split = jnp.argmax(jnp.where(coarse, merit, -jnp.inf))
  return jnp.where(coarse.any(), a[split - 1], a[-1])


def _quantile(a: jax.Array, share: float) -> jax.Array:
  """Of sorted values, between neighbours linearly."""
  at = share * (len(a) - 1)
  low = int(at)
  return a[low] + (at - low) * (a[min(low + 1, len(a) - 1)] - a[low])


@functools.partial(jax.jit, static_argnames=("fmt", "rule", "inner"))
def truncated(
  w: jax.Array,
  statistic: jax.Array | None,
  fmt: Format,
  *,
  rule: ScaleRule | None = None,
  inner: object = rtn,
) -> object:
  """A solver on weights whose outliers are cut to the largest other weight.

      inner(clip(w, -t, t)), t = `coarse_to_fine` of all of w

  CBQ's weights (arXiv:2312.07950). This changes the function, so it is no step before quantization
  but part of it: what is learned afterwards sees the error.

  Args:
    w: [K, N].
    statistic: of the inner solver.
    fmt: the format.
    rule: of the scales; by default the one that the format implies.
    inner: the solver.

  Returns:
    What the inner solver returns.
  """
  t = coarse_to_fine(w.reshape(-1))
  return inner(jnp.clip(w, -t, t), statistic, fmt, rule=rule)
