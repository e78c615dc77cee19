"""What a solver needs to know about the inputs of a contraction: pure functions of x [M, K].

All math is float32. Leading axes are free (batched experts: x [E, M, K] gives [E, ...]). Here K is
per channel: `amax` is over tokens, not over blocks as in `jaxquant.scales`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Tree = jax.Array | tuple[jax.Array, ...]

WHOLE = 1024  # up to here X^T X is added to a sum at once


def amax(x: jax.Array) -> jax.Array:
  """Largest magnitude of each channel, max_m |x_mk|; NaN stays visible.

  Args:
    x: [..., M, K].

  Returns:
    float32 [..., K].

  Example:
    >>> import jax.numpy as jnp
    >>> amax(jnp.array([[1.0, -3.0], [-2.0, 0.0]])).tolist()
    [2.0, 3.0]
  """
  # As integers: non-negative floats are ordered like their bits, with NaN on top. A float maximum
  # on XLA:CPU (jaxlib 0.12.0) drops a NaN from long axes.
  bits = jax.lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.int32)
  return jax.lax.bitcast_convert_type(bits.max(-2), jnp.float32)


def mean_abs(x: jax.Array) -> jax.Array:
  """Mean magnitude of each channel, sum_m |x_mk| / M: AWQ's importance (arXiv:2306.00978, 3.2).

  Args:
    x: [..., M, K].

  Returns:
    float32 [..., K].

  Example:
    >>> import jax.numpy as jnp
    >>> mean_abs(jnp.array([[1.0, -3.0], [-2.0, 0.0]])).tolist()
    [1.5, 1.5]
  """
  return _ratio(_sum_abs(x))


def hessian(x: jax.Array, weight: jax.Array | None = None) -> jax.Array:
  """H = X^T diag(weight) X, a sum over tokens: no factor 2, no division by M.

  The curvature of the layer's squared output error, tr(dW^T H dW) = ||X dW||^2 (arXiv:2210.17323,
  eq. 1). Token weights are those of RSQ (arXiv:2503.01820); a mask is a weight of 0 and 1.

  Args:
    x: [..., M, K].
    weight: [..., M], or None for ones.

  Returns:
    float32 [..., K, K], symmetric.

  Example:
    >>> import jax.numpy as jnp
    >>> hessian(jnp.array([[1.0, 2.0], [0.0, 1.0]])).tolist()
    [[1.0, 2.0], [2.0, 5.0]]
  """
  x = x.astype(jnp.float32)
  right = x if weight is None else x * weight.astype(jnp.float32)[..., None]
  # HIGHEST: TPUs and GPUs would otherwise multiply in bfloat16 or TF32.
  return jnp.einsum("...mk,...mj->...kj", x, right, precision=jax.lax.Precision.HIGHEST)


def _hessian_onto(h: jax.Array, x: jax.Array) -> jax.Array:
  """H + X^T X; for large K a few rows at a time, so that no product is held beside the sum."""
  x = x.astype(jnp.float32)
  k = x.shape[-1]
  pieces = math.gcd(k, 8) if k > WHOLE else 1

  def step(i: jax.Array, h: jax.Array) -> jax.Array:
    take = lambda a, axis: jax.lax.dynamic_slice_in_dim(a, i * (k // pieces), k // pieces, axis)
    some = jnp.einsum("...mk,...mj->...kj", take(x, -1), x, precision=jax.lax.Precision.HIGHEST)
    return jax.lax.dynamic_update_slice_in_dim(h, take(h, -2) + some, i * (k // pieces), -2)

  return jax.lax.fori_loop(0, pieces, step, h) if pieces > 1 else h + hessian(x)


def rms(x: jax.Array) -> jax.Array:
  """Root mean square of each channel, sqrt(sum_m x_mk^2 / M).

  Args:
    x: [..., M, K].

  Returns:
    float32 [..., K].

  Example:
    >>> import jax.numpy as jnp
    >>> rms(jnp.array([[1.0, -3.0], [-1.0, 3.0]])).tolist()
    [1.0, 3.0]
  """
  return jnp.sqrt(_ratio(_sum_square(x)))


def attention_probabilities(
  q: jax.Array, k: jax.Array, mask: jax.Array, *, scale: float
) -> jax.Array:
  """softmax(scale * q k^T) over the keys, as `jaxquant.ops.attention.attend` has it inside.

  Args:
    q: [B, T, H, D], rotated.
    k: [B, S, Hkv, D], rotated.
    mask: bool, broadcastable to [B, T, S].
    scale: multiplies the logits.

  Returns:
    float32 [B, H, T, S].

  Example:
    >>> import jax.numpy as jnp
    >>> one = jnp.ones((1, 2, 1, 4))
    >>> attention_probabilities(one, one, jnp.tri(2, dtype=bool), scale=0.5)[0, 0].tolist()
    [[1.0, 0.0], [0.5, 0.5]]
  """
  grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
  logits = jnp.einsum("bthgd,bshd->bhgts", grouped, k, preferred_element_type=jnp.float32)
  mask = jnp.broadcast_to(mask, (q.shape[0], q.shape[1], k.shape[1]))
  lowest = jnp.finfo(jnp.float32).min
  p = jax.nn.softmax(jnp.where(mask[:, None, None], scale * logits, lowest), axis=-1)
  return p.reshape(q.shape[0], q.shape[2], *p.shape[-2:])


def token_importance(probabilities: jax.Array, r_min: float = 0.005) -> jax.Array:
  """RSQ's weight of each token: how much attention it draws, over all heads and queries.

      a_s = sum_ht A_hts;  rho = r / mean(r),  r = r_min + (1 - r_min) (a - min a) / (max a - min a)

  AttnCon of arXiv:2503.01820; minimum, maximum and mean are over the sequence. To be used as
  `hessian(x, rho)`; r_min = 1 gives ones.

  Args:
    probabilities: [..., H, T, S].
    r_min: importance of the least attended token, above 0 so that every token counts.

  Returns:
    float32 [..., S], of mean 1.

  Raises:
    ValueError: for r_min outside (0, 1].

  Example:
    >>> import jax.numpy as jnp
    >>> rho = token_importance(jnp.array([[[1.0, 0.0], [0.5, 0.5]]]), r_min=0.5)
    >>> float(rho[0] / rho[1])
    2.0
  """
  if not 0 < r_min <= 1:
    raise ValueError(f"token_importance: r_min must be in (0, 1], got {r_min}")
  mass = probabilities.astype(jnp.float32).sum((-3, -2))
  low, high = mass.min(-1, keepdims=True), mass.max(-1, keepdims=True)
  span = jnp.where(high > low, high - low, 1)  # equal masses: all count as the least one
  r = r_min + (1 - r_min) * (mass - low) / span
  return r / r.mean(-1, keepdims=True)


def count(x: jax.Array) -> jax.Array:
  """How many tokens, M.

  Args:
    x: [..., M, K].

  Returns:
    int32 [...].

  Example:
    >>> import jax.numpy as jnp
    >>> int(count(jnp.ones((5, 2))))
    5
  """
  return jnp.full(x.shape[:-2], x.shape[-2], jnp.int32)


def total(a: Tree, b: Tree) -> Tree:
  """Sum of two partial results."""
  return jax.tree.map(jnp.add, a, b)


def largest(a: Tree, b: Tree) -> Tree:
  """Elementwise maximum of two partial results."""
  return jax.tree.map(jnp.maximum, a, b)


def same(a: Tree) -> Tree:
  """The partial result is the result."""
  return a


@dataclasses.dataclass(frozen=True)
class Statistic:
  """A function of x that can be accumulated over batches.

      finish(combine(combine(of(x1), of(x2)), of(x3))) == the statistic of all tokens

  Static and hashable by its functions: use module-level functions, not closures made per call.

  Attributes:
    of: x [..., M, K] -> partial result, an array or a tuple of arrays.
    combine: (partial, partial) -> partial; associative.
    finish: partial -> what the solver gets.
    add: (partial, x) -> combine(partial, of(x)) in less memory; None: exactly that.
  """

  of: Callable[[jax.Array], Tree]
  combine: Callable[[Tree, Tree], Tree] = total
  finish: Callable[[Tree], Tree] = same
  add: Callable[[Tree, jax.Array], Tree] | None = dataclasses.field(default=None, compare=False)

  def __call__(self, x: jax.Array) -> Tree:
    """The statistic of one batch x [..., M, K]."""
    return self.finish(self.of(x))

  def onto(self, partial: Tree, x: jax.Array) -> Tree:
    """The partial result with one batch x [..., M, K] more."""
    return self.combine(partial, self.of(x)) if self.add is None else self.add(partial, x)

  def over(self, batches: jax.Array) -> Tree:
    """The statistic of batches [B, ..., M, K], one after the other.

    Example:
      >>> import jax.numpy as jnp
      >>> AMAX.over(jnp.array([[[1.0], [2.0]], [[-4.0], [0.0]]])).tolist()
      [4.0]
    """

    def step(partial: Tree, x: jax.Array) -> tuple[Tree, None]:
      return self.onto(partial, x), None

    return self.finish(jax.lax.scan(step, self.of(batches[0]), batches[1:])[0])


def several(*statistics: Statistic) -> Statistic:
  """A tuple of statistics from one look at x, for solvers that need more than one.

  Args:
    *statistics: the parts, in the order in which the solver gets them.

  Example:
    >>> import jax.numpy as jnp
    >>> both = several(MEAN_ABS, HESSIAN)
    >>> [a.tolist() for a in both(jnp.array([[1.0], [-3.0]]))]
    [[2.0], [[10.0]]]
    >>> both == several(MEAN_ABS, HESSIAN)  # equal parts share a compilation
    True
  """
  each = lambda name: _Each(tuple(getattr(s, name) for s in statistics))
  return Statistic(each("of"), each("combine"), each("finish"), _EachOnto(statistics))


@dataclasses.dataclass(frozen=True)
class _Each:
  """Functions side by side: all get the same x, or each its part of partial results."""

  parts: tuple[Callable, ...]

  def __call__(self, *args: Tree) -> tuple[Tree, ...]:
    if len(args) == 1 and not isinstance(args[0], tuple):
      return tuple(f(args[0]) for f in self.parts)
    return tuple(f(*part) for f, *part in zip(self.parts, *args, strict=True))


@dataclasses.dataclass(frozen=True)
class _EachOnto:
  """Each partial result with x more."""

  parts: tuple[Statistic, ...]

  def __call__(self, partial: Tree, x: jax.Array) -> tuple[Tree, ...]:
    return tuple(s.onto(a, x) for s, a in zip(self.parts, partial, strict=True))


def _sum_abs(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  return jnp.abs(x.astype(jnp.float32)).sum(-2), count(x)


def _sum_square(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  return jnp.square(x.astype(jnp.float32)).sum(-2), count(x)


def _root_ratio(partial: tuple[jax.Array, jax.Array]) -> jax.Array:
  return jnp.sqrt(_ratio(partial))


def _ratio(partial: tuple[jax.Array, jax.Array]) -> jax.Array:
  numerator, tokens = partial
  return numerator / tokens[..., None]


class LayerAttention(NamedTuple):
  """What the attention of one layer does with a batch.

  Attributes:
    x: [B, T, K], what q, k and v read.
    q: [B, T, H, D], rotated.
    k: [B, T, Hkv, D], rotated.
    probabilities: float32 [B, H, T, T].
    w_o: [H, D, N].
    rope: cos and sin [B, T, 1, D/2], or None.
  """

  x: jax.Array
  q: jax.Array
  k: jax.Array
  probabilities: jax.Array
  w_o: jax.Array
  rope: tuple[jax.Array, jax.Array] | None


def _needs_attention(x: jax.Array) -> Tree:
  raise ValueError(
    f"this statistic needs the attention of its layer, not only inputs {list(x.shape)}; it is "
    "collected by jaxquant.model_blocks.attention_statistics"
  )


@dataclasses.dataclass(frozen=True)
class AttentionStatistic(Statistic):
  """A statistic that sees the attention of its layer too; sums over batches.

  Attributes:
    layer: (x [M, K], name of the site in its layer ("q", "up"), LayerAttention) -> partial result.
  """

  of: Callable[[jax.Array], Tree] = _needs_attention
  layer: Callable[[jax.Array, str, LayerAttention], Tree] = dataclasses.field(kw_only=True)


AMAX = Statistic(amax, largest)
MEAN_ABS = Statistic(_sum_abs, finish=_ratio)
RMS = Statistic(_sum_square, finish=_root_ratio)
HESSIAN = Statistic(hessian, add=_hessian_onto)
COUNT = Statistic(count)


@functools.cache  # one object per size: statistics are compared by their functions
def block_hessian(size: int) -> Statistic:
  """The blocks of `size` channels on the diagonal of X^T X: all that an error within a block sees.

  Of x [..., M, K], float32 [..., ceil(K/size), size, size]; a ragged tail is filled with zeros. For
  size << K that is K/size times less to hold and to compute than `HESSIAN`.

  Example:
    >>> import jax.numpy as jnp
    >>> block_hessian(2)(jnp.array([[1.0, 2.0, 3.0]])).tolist()
    [[[1.0, 2.0], [2.0, 4.0]], [[9.0, 0.0], [0.0, 0.0]]]
  """

  def of(x: jax.Array) -> jax.Array:
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % size)])
    blocks = x.reshape(*x.shape[:-1], -1, size)
    return hessian(jnp.moveaxis(blocks, -2, -3))

  return Statistic(of)
