"""Gradients of quantizers: what passes back through x -> s Q(x / s).

An estimator is a function (x, q, g) -> gradient with respect to x, where q is the QTensor of x and
g the gradient with respect to its values. None is the straight-through estimator, g itself. All are
about u = x / s in units of the element's grid, and s is each block's scale.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.named_functions import parametrised
from jaxquant.tensor import (
  QTensor,
  block_sizes,
  from_blocks,
  per_block,
  reciprocal,
  scale_values,
  to_blocks,
  unpack,
)

Estimator = Callable[[jax.Array, QTensor, jax.Array], jax.Array]


@jax.custom_vjp
def straight_through(x: jax.Array, q: jax.Array) -> jax.Array:
  """Q itself, to the last bit, with the gradient of x.

  x + stop_gradient(q - x) is one rounding away from q.
  """
  del x
  return q


straight_through.defvjp(lambda x, q: (q, None), lambda _, g: (g, jnp.zeros_like(g)))


def _units(x: jax.Array, q: QTensor) -> jax.Array:
  """U = x / s."""
  inverse = reciprocal(scale_values(unpack(q).scale))
  blocks = to_blocks(x.astype(jnp.float32), q.fmt, q.axis)
  return from_blocks(blocks * per_block(inverse), x.shape)


def clipped_ste(x: jax.Array, q: QTensor, g: jax.Array) -> jax.Array:
  """G where |u| <= max of the grid, else 0: nothing can be learned about what saturates."""
  return jnp.where(jnp.abs(_units(x, q)) <= q.fmt.elem.max, g, 0)


def trusted(x: jax.Array, q: QTensor, g: jax.Array) -> jax.Array:
  """G where |u| < max of the grid, else 0: the clipping mask of Quartet's kernel."""
  return jnp.where(jnp.abs(_units(x, q)) < q.fmt.elem.max, g, 0)


@parametrised
def trust(factor: float) -> Estimator:
  """G where |x - q| <= factor * s, else 0: QuEST's trust mask (arXiv:2502.05003, section 3.2).

  On a half-step grid of b bits s is the step, 2 alpha rms / (2^b - 1), and the paper's
  T = alpha rms / (2^b - 1) is half of it: factor 1/2.
  """

  def estimate(x: jax.Array, q: QTensor, g: jax.Array) -> jax.Array:
    u = _units(x, q)
    return jnp.where(jnp.abs(u - unpack(q).data) <= factor, g, 0)

  return estimate


@parametrised
def dge(k: float = 5.0, most: float = 3.0) -> Estimator:
  """G * min(Q'(u), most), Q'(u) = (1 / k) |2 (u - lo) / width - 1|^(1 / k - 1) between grid values.

  The differentiable gradient estimator of arXiv:2501.17116, section 3.1. Zero beyond the grid.
  """

  def estimate(x: jax.Array, q: QTensor, g: jax.Array) -> jax.Array:
    t = _within(_units(x, q), q)
    slope = jnp.maximum(jnp.abs(2 * t - 1), 1e-6) ** (1 / k - 1) / k
    inside = (t >= 0) & (t <= 1)
    return jnp.where(inside, g * jnp.minimum(slope, most), 0)

  return estimate


@parametrised
def spline(steepness: float = 2.0, flat: float = 0.5) -> Estimator:
  """G * Q'(u) of a piecewise linear Q: `flat` near grid values, `steepness` around midpoints.

  The steep middle is (1 - flat) / (steepness - flat) of an interval, so the slopes average to one
  (the piecewise-linear relaxation of arXiv:2509.17791; its constants are ours). With flat = 0 a
  weight near a grid value has no gradient and stays: a regression that reaches .12 with the
  straight-through estimator then stops at .26.
  """
  middle = (1 - flat) / (steepness - flat)

  def estimate(x: jax.Array, q: QTensor, g: jax.Array) -> jax.Array:
    t = _within(_units(x, q), q)
    slope = jnp.where(jnp.abs(t - 0.5) <= middle / 2, steepness, flat)
    return jnp.where((t >= 0) & (t <= 1), g * slope, 0)

  return estimate


def _within(u: jax.Array, q: QTensor) -> jax.Array:
  """Where u lies between its neighbours on the grid, 0 to 1; outside of that beyond the grid."""
  values = np.unique(q.fmt.elem.values())  # sorted, one zero
  values = values[np.isfinite(values)].astype(np.float32)
  table = jnp.asarray(values)
  above = jnp.clip(jnp.searchsorted(table, u, method="compare_all"), 1, len(values) - 1)
  lo, hi = table[above - 1], table[above]
  return (u - lo) / (hi - lo)


@parametrised
def through_scale(inner: Estimator | None = None, sharpness: float | None = None) -> Estimator:
  """The gradient of s Q(x / s) with s = max |x| / max, the scale included.

  x^_i = s Q(u_i):  dx^_i/dx_j = Q'(u_i) [i = j] + (Q(u_i) - u_i Q'(u_i)) ds/dx_j, where ds/dx_j is
  sign(x_j) / max at the largest element of the block (arXiv:2509.17791). With the straight-through
  Q' = 1 the second term carries the quantization error.

  Args:
    inner: estimator that gives Q'(u) g; None: g.
    sharpness: ds/dx_j in proportion to softmax(sharpness * |x| / max |x|) instead of at the
      largest alone.
  """

  def estimate(x: jax.Array, q: QTensor, g: jax.Array) -> jax.Array:
    ones = jnp.ones_like(g)
    slope = ones if inner is None else inner(x, q, ones)
    u = _units(x, q)
    blocks = lambda a: _zero_padded(a, q)
    error = blocks(g * (unpack(q).data - u * slope)).sum((-3, -1), keepdims=True)
    a = jnp.abs(blocks(x))
    largest = a.max((-3, -1), keepdims=True)
    if sharpness is None:
      share = (a == largest).astype(jnp.float32)
    else:
      share = jnp.exp(sharpness * (a / jnp.where(largest == 0, 1, largest) - 1))
    share = share / share.sum((-3, -1), keepdims=True)
    through = error * share * jnp.sign(blocks(x)) / q.fmt.elem.max
    return g * slope + from_blocks(through, x.shape)

  return estimate


def _zero_padded(a: jax.Array, q: QTensor) -> jax.Array:
  """Blocks whose ragged tail adds nothing to a sum."""
  r, c = block_sizes(q.fmt, a.shape, q.axis)
  tail = [(0, -a.shape[-2] % r), (0, -a.shape[-1] % c)]
  a = jnp.pad(a.astype(jnp.float32), [(0, 0)] * (a.ndim - 2) + tail)
  return to_blocks(a, q.fmt, q.axis)
