"""Learned step sizes: uniform quantizers whose scale and offset are trained.

    t = (a - beta) / s;   a^ = round(clip(t, lo, hi)) s + beta

Gradients (arXiv:1902.08153, eqs. 3 and 5; LSQ+, arXiv:2004.09576): where lo < t < hi, to `a` 1, to
s round(t) - t, to beta 0; elsewhere 0, lo or hi, and 1. The forward value is that of `encode` and
`dequantize`, so a packed weight has the same bits.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.encoding import encode
from jaxquant.estimators import straight_through
from jaxquant.formats import Format, int_grid, uint_grid
from jaxquant.ops.tracked import State
from jaxquant.quantizers.parts import Part
from jaxquant.scales import Scales
from jaxquant.tensor import QTensor, dequantize, rounded

SMALLEST = 1e-8  # a step that training drove to zero or below


def stepped(
  a: jax.Array, step: jax.Array, offset: jax.Array | None, fmt: Format, axis: int
) -> jax.Array:
  """The quantized values of a, differentiable in all three.

  Args:
    a: float32 [M, K] or [K, N].
    step: positive, broadcasts against a.
    offset: likewise, or None.
    fmt: one scale per axis or tensor, as step has.
    axis: that blocks run along.
  """
  q = encoded(*jax.lax.stop_gradient((a, step, offset)), fmt, axis)
  shift = 0.0 if offset is None else offset
  # lax.clamp passes nothing at the bounds themselves, as the published formulas; jnp.clip half.
  inside = jax.lax.clamp(np.float32(fmt.elem.lo), (a - shift) / step, np.float32(fmt.elem.hi))
  codes = inside + jax.lax.stop_gradient(q.data - inside)
  return straight_through(codes * step + shift, dequantize(q))


def encoded(
  a: jax.Array, step: jax.Array, offset: jax.Array | None, fmt: Format, axis: int
) -> QTensor:
  """The codes behind `stepped`."""
  return encode(a, fmt, axis=axis, scales=Scales(step, offset=offset))


def damped(p: jax.Array, factor: float) -> jax.Array:
  """P with its gradient times a factor (LSQ's 1 / sqrt(count * hi))."""
  return straight_through(p * factor, jax.lax.stop_gradient(p))


def positive(step: jax.Array) -> jax.Array:
  """The step, or the smallest one where training drove it below; its gradient passes always."""
  return straight_through(step, jax.lax.stop_gradient(jnp.maximum(step, SMALLEST)))


@dataclasses.dataclass(frozen=True)
class LsqWeight(Part):
  """A weight with a learned step and offset per output channel (LSQ+).

  They start at the best of `grid` ranges, [min w, max w] times a factor, by sum |w - w^|^p.

  Attributes:
    bits: of the codes, unsigned with an offset.
    grid: ranges tried.
    shrink: the factors run from 1 down to 1 - shrink.
    p: of the norm.
    damp: scale the gradients of step and offset by 1 / sqrt(K * hi).
  """

  bits: int = 4
  grid: int = 100
  shrink: float = 0.8
  p: float = 2.4
  damp: bool = True

  stored = True

  @property
  def fmt(self) -> Format:
    """The format that `kernel` packs to."""
    return Format(uint_grid(self.bits), offset=True)

  def init(self, a: jax.Array) -> State:
    """Step and offset [N] by the grid."""
    lo, hi = a.min(-2), a.max(-2)

    def range_of(i: jax.Array) -> State:
      keep = 1 - self.shrink * i / (self.grid - 1)
      return {"step": (hi - lo) * keep / self.fmt.elem.hi, "offset": lo * keep}

    def error(i: jax.Array) -> jax.Array:
      return (jnp.abs(dequantize(self.kernel(range_of(i), a)) - a) ** self.p).sum(-2)

    return range_of(jnp.argmin(jax.lax.map(error, jnp.arange(self.grid)), 0))

  def __call__(
    self, theta: State, a: jax.Array, clock: jax.Array, key: jax.Array | None
  ) -> jax.Array:
    """The quantized weight, float32 [K, N]."""
    factor = (a.shape[0] * self.fmt.elem.hi) ** -0.5 if self.damp else 1.0
    step, offset = damped(theta["step"], factor), damped(theta["offset"], factor)
    return stepped(a, positive(step)[None], offset[None], self.fmt, -2)

  def kernel(self, theta: State, w: jax.Array) -> QTensor:
    """The codes, with the same steps and offsets."""
    return encoded(w, positive(theta["step"])[None], theta["offset"][None], self.fmt, -2)


@dataclasses.dataclass(frozen=True)
class LsqInput(Part):
  """Inputs with one learned step per tensor, symmetric (LSQ); it starts at 2 mean |x| / sqrt(hi).

  Attributes:
    bits: of the codes.
  """

  bits: int = 4

  @property
  def fmt(self) -> Format:
    """Signed integers from -2^(b - 1) on, one scale."""
    return Format(int_grid(self.bits, full=True), None, None)

  def init(self, a: jax.Array) -> State:
    """The step, a scalar."""
    return {"step": 2 * jnp.abs(a).mean() / jnp.sqrt(jnp.float32(self.fmt.elem.hi))}

  def __call__(
    self, theta: State, a: jax.Array, clock: jax.Array, key: jax.Array | None
  ) -> jax.Array:
    """The quantized inputs, float32 [M, K]."""
    step = positive(damped(theta["step"], (a.size * self.fmt.elem.hi) ** -0.5))
    return stepped(a, step.reshape(1, 1), None, self.fmt, -1)


@dataclasses.dataclass(frozen=True)
class TokenRange(Part):
  """Inputs by the range of each token, clipped by two learned factors (arXiv:2505.11497).

      s = (sigmoid(up) max(x) - sigmoid(lo) min(x)) / (2^b - 1),  beta = sigmoid(lo) min(x)

  Attributes:
    bits: of the codes.
    start: of both sigmoids.
  """

  bits: int = 4
  start: float = 0.95

  @property
  def fmt(self) -> Format:
    """Unsigned integers above the smallest value of each token."""
    return Format(uint_grid(self.bits), offset=True)

  def init(self, a: jax.Array) -> State:
    """Two logits."""
    del a
    logit = jnp.log(jnp.float32(self.start / (1 - self.start)))
    return {"clip_up": logit, "clip_lo": logit}

  def __call__(
    self, theta: State, a: jax.Array, clock: jax.Array, key: jax.Array | None
  ) -> jax.Array:
    """The quantized inputs, float32 [M, K]; the range itself passes no gradient to x."""
    lo, hi = jax.lax.stop_gradient((a.min(-1, keepdims=True), a.max(-1, keepdims=True)))
    lo = rounded(jnp.minimum(lo, 0) * jax.nn.sigmoid(theta["clip_lo"]))
    hi = rounded(jnp.maximum(hi, 0) * jax.nn.sigmoid(theta["clip_up"]))
    step = positive((hi - lo) / self.fmt.elem.hi)
    return stepped(a, step, lo, self.fmt, -1)
