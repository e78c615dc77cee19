"""Learned step sizes: uniform quantizers whose scale and offset are trained.

    t = (a - beta) / s;   a^ = round(clip(t, lo, hi)) s + beta

Gradients (arXiv:1902.08153, eqs. 3 and 5; LSQ+, arXiv:2004.09576): to `a` 1 inside the range and 0
outside; to s round(t) - t inside, lo or hi outside; to beta 0 inside, 1 outside. The forward value
is that of `encode` and `dequantize`, so a packed weight has the same bits.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxquant.encoding import encode
from jaxquant.estimators import straight_through
from jaxquant.formats import Format, int_grid, uint_grid
from jaxquant.ops.tracked import State
from jaxquant.quantizers.parts import Part
from jaxquant.scales import Scales
from jaxquant.tensor import QTensor, dequantize, pack

SMALLEST = 1e-8  # a step that training drove to zero or below


def stepped(
  a: jax.Array, step: jax.Array, offset: jax.Array | None, fmt: Format, axis: int
) -> jax.Array:
  """The quantized values of a, differentiable in all three.

  Args:
    a: [M, K] or [K, N].
    step: positive, broadcasts against a.
    offset: likewise, or None.
    fmt: one scale per axis or tensor, as step has.
    axis: that blocks run along.
  """
  shift = 0.0 if offset is None else offset
  inside = jnp.clip((a - shift) / step, fmt.elem.lo, fmt.elem.hi)
  rounded = inside + jax.lax.stop_gradient(jnp.round(inside) - inside)
  values = dequantize(encoded(a, step, offset, fmt, axis))
  return straight_through(rounded * step + shift, jax.lax.stop_gradient(values))


def encoded(
  a: jax.Array, step: jax.Array, offset: jax.Array | None, fmt: Format, axis: int
) -> QTensor:
  """The codes behind `stepped`."""
  return encode(a, fmt, axis=axis, scales=Scales(step, offset=offset))


def damped(p: jax.Array, factor: float) -> jax.Array:
  """P with its gradient times a factor (LSQ's 1 / sqrt(count * hi))."""
  return straight_through(p * factor, jax.lax.stop_gradient(p))


@dataclasses.dataclass(frozen=True)
class LsqWeight(Part):
  """A weight with a learned step and offset per output channel (LSQ+).

  They start at the best of `grid` ranges shrunk towards the middle, by sum |w - w^|^p.

  Attributes:
    bits: of the codes, unsigned with an offset.
    grid: ranges tried.
    shrink: of the smallest range, 1 - shrink.
    p: of the norm.
    damp: scale the gradients of step and offset by 1 / sqrt(K * hi).
  """

  bits: int = 4
  grid: int = 100
  shrink: float = 0.8
  p: float = 2.4
  damp: bool = True

  @property
  def fmt(self) -> Format:
    """The format that `kernel` packs to."""
    return Format(uint_grid(self.bits), offset=True)

  def init(self, a: jax.Array) -> State:
    """Step and offset [N] by the grid."""
    lo, hi = a.min(-2), a.max(-2)

    def ranges(i: jax.Array) -> tuple[jax.Array, jax.Array]:
      keep = 1 - self.shrink * i / self.grid
      return (hi - lo) * keep / self.fmt.elem.hi, lo * keep

    def error(i: jax.Array) -> jax.Array:
      step, offset = ranges(i)
      values = dequantize(encoded(a, self._step(step), offset[None], self.fmt, -2))
      return (jnp.abs(values - a) ** self.p).sum(-2)

    best = jnp.argmin(jax.lax.map(error, jnp.arange(self.grid)), 0)
    step, offset = ranges(best)
    return {"step": step, "offset": offset}

  @staticmethod
  def _step(step: jax.Array) -> jax.Array:
    return jnp.maximum(step, SMALLEST)[None]

  def __call__(
    self, theta: State, a: jax.Array, clock: jax.Array, key: jax.Array | None
  ) -> jax.Array:
    """The quantized weight, float32 [K, N]."""
    slow = functools.partial(damped, factor=(a.shape[0] * self.fmt.elem.hi) ** -0.5)
    slow = slow if self.damp else lambda p: p
    step, offset = self._step(slow(theta["step"])), slow(theta["offset"])[None]
    return stepped(a.astype(jnp.float32), step, offset, self.fmt, -2)

  def kernel(self, theta: State, w: jax.Array) -> QTensor:
    """The packed weight."""
    step, offset = self._step(theta["step"]), theta["offset"][None]
    return pack(encoded(w.astype(jnp.float32), step, offset, self.fmt, -2))


@dataclasses.dataclass(frozen=True)
class LsqInput(Part):
  """Inputs with one learned step per tensor, symmetric (LSQ); it starts at 2 mean |x| / sqrt(hi).

  Attributes:
    bits: of the codes.
  """

  bits: int = 4

  @property
  def fmt(self) -> Format:
    """Signed integers, one scale."""
    return Format(int_grid(self.bits), None, None)

  def init(self, a: jax.Array) -> State:
    """The step, a scalar."""
    return {"step": 2 * jnp.abs(a).mean() / jnp.sqrt(jnp.float32(self.fmt.elem.hi))}

  def __call__(
    self, theta: State, a: jax.Array, clock: jax.Array, key: jax.Array | None
  ) -> jax.Array:
    """The quantized inputs, float32 [M, K]."""
    step = damped(theta["step"], (a.size * self.fmt.elem.hi) ** -0.5)
    step = jnp.maximum(step, SMALLEST).reshape(1, 1)
    return stepped(a.astype(jnp.float32), step, None, self.fmt, -1)


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
    a = a.astype(jnp.float32)
    lo, hi = jax.lax.stop_gradient((a.min(-1, keepdims=True), a.max(-1, keepdims=True)))
    lo = jnp.minimum(lo, 0) * jax.nn.sigmoid(theta["clip_lo"])
    hi = jnp.maximum(hi, 0) * jax.nn.sigmoid(theta["clip_up"])
    step = jnp.maximum((hi - lo) / self.fmt.elem.hi, SMALLEST)
    return stepped(a, step, lo, self.fmt, -1)
