"""One-bit weights and activations: signs, their magnitudes, and what passes back through them.

A slope is the derivative that stands in for that of the sign, a function of the argument. The sign
of 0 is +1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from jaxquant.estimators import straight_through
from jaxquant.formats import BINARY
from jaxquant.kernels import Sum
from jaxquant.named_functions import parametrised
from jaxquant.ops.tracked import State
from jaxquant.quantizers.parts import Part, Trained, mean
from jaxquant.tensor import QTensor

Slope = Callable[[jax.Array], jax.Array]


def clip(x: jax.Array) -> jax.Array:
  """1 where |x| <= 1 (arXiv:1602.02830, section 1.3)."""
  return (jnp.abs(x) <= 1).astype(jnp.float32)


def clip_open(x: jax.Array) -> jax.Array:
  """1 where |x| < 1 (the DoReFa operator of BiBench)."""
  return (jnp.abs(x) < 1).astype(jnp.float32)


def identity(x: jax.Array) -> jax.Array:
  """1 everywhere."""
  return jnp.ones_like(x)


def bireal(x: jax.Array) -> jax.Array:
  """max(0, 2 - 2 |x|): that of a piecewise quadratic sign (arXiv:1808.00278, eq. 8)."""
  return jnp.maximum(2 - 2 * jnp.abs(x), 0)


@parametrised
def fourier(terms: int = 9, omega: float = 0.1) -> Slope:
  """(4 omega / pi) sum_{i=0..n} cos((2 i + 1) omega x) where |x| <= 1, else 0 (arXiv:2201.10938).

  The derivative of a square wave's Fourier series with n + 1 terms.
  """
  return lambda x: _series(x, terms, terms, omega)


def _series(x: jax.Array, n: jax.Array | int, most: int, omega: float) -> jax.Array:
  """`fourier` with n terms of at most `most`."""

  def add(i: jax.Array, total: jax.Array) -> jax.Array:
    return total + jnp.where(i <= n, jnp.cos((2 * i + 1) * omega * x), 0)

  total = jax.lax.fori_loop(0, most + 1, add, jnp.zeros_like(x))
  return jnp.where(jnp.abs(x) <= 1, 4 * omega / jnp.pi * total, 0)


def sign(x: jax.Array, slope: Slope) -> jax.Array:
  """+1 for x >= 0, else -1; backward g * slope(x).

  Example:
    >>> import jax
    >>> sign(jnp.array([-0.2, 0.0, 3.0]), clip).tolist()
    [-1.0, 1.0, 1.0]
    >>> jax.grad(lambda x: sign(x, bireal))(0.25).item()
    1.5
  """
  x = jnp.asarray(x)
  return _sign(x, slope(jax.lax.stop_gradient(x)))


@jax.custom_vjp
def _sign(x: jax.Array, slope: jax.Array) -> jax.Array:
  del slope
  return jnp.where(x >= 0, 1.0, -1.0).astype(x.dtype)


_sign.defvjp(
  lambda x, slope: (_sign(x, slope), slope),
  lambda slope, g: (g * slope.astype(g.dtype), jnp.zeros_like(slope)),
)


@dataclasses.dataclass(frozen=True)
class Binary(Part):
  """sign(a), or sign(a) * mean |a| along an axis.

  Attributes:
    slope: of the sign.
    magnitude: axis of mean |a|: -2 for weights (a value per output channel), -1 for inputs (per
      token); None: plain signs.
    scale_in_grad: whether mean |a| also multiplies the gradient, as where it multiplies the sign;
      papers that write scale * sign(w) - clip(w) + clip(w) leave it out. It passes none itself.
  """

  slope: Slope = clip
  magnitude: int | None = None
  scale_in_grad: bool = True

  stored = True

  def __call__(
    self, theta: State, a: jax.Array, clock: jax.Array, key: jax.Array | None
  ) -> jax.Array:
    """The binarized tensor."""
    signs = sign(a, self.slope)
    if self.magnitude is None:
      return signs
    size = jax.lax.stop_gradient(mean(jnp.abs(a), self.magnitude))
    if self.scale_in_grad:
      return signs * size
    return straight_through(signs, jax.lax.stop_gradient(signs * size))

  def kernel(self, theta: State, w: jax.Array) -> QTensor:
    """One bit a weight and a scale per output channel."""
    if self.magnitude not in (None, -2):
      raise ValueError(
        f"{self}: the magnitudes of a stored weight are those of its output channels, axis -2"
      )
    size = jnp.ones((1, w.shape[1])) if self.magnitude is None else mean(jnp.abs(w), -2)
    return _one_bit(w, size)


def _one_bit(w: jax.Array, size: jax.Array) -> QTensor:
  """Signs of w [K, N] times a size per output channel [1, N]."""
  return QTensor(jnp.where(w >= 0, 1.0, -1.0), size.astype(jnp.float32), fmt=BINARY, axis=-2)


@dataclasses.dataclass(frozen=True)
class Bases(Part):
  """BinaryDM's multi-basis: sum_i s_i sign(r_i), r_1 = w, r_{i+1} = r_i - s_i sign(r_i).

  s_i are learned per output channel and start at mean |r_i| (arXiv:2404.05662, section 3.2; order 2
  in the paper's outer blocks, 1 in the deepest). Order 2 leaves 0.13 of the energy of Gaussian
  weights, order 1 1 - 2 / pi = 0.363.

  Attributes:
    order: number of bases.
    slope: of the signs.
  """

  order: int = 2
  slope: Slope = clip

  stored = True

  def init(self, a: jax.Array) -> State:
    """Sizes [N] of each basis."""
    sizes, rest = {}, a
    for i in range(self.order):
      size = mean(jnp.abs(rest), -2)
      sizes[f"size{i}"] = size[0]
      rest = rest - size * jnp.where(rest >= 0, 1.0, -1.0)
    return sizes

  def _terms(self, theta: State, w: jax.Array) -> Iterator[Trained]:
    rest = w
    for i in range(self.order):
      size = theta[f"size{i}"]
      values = size * sign(rest, self.slope)
      yield Trained(values, _one_bit(rest, size[None]))
      rest = rest - values

  def __call__(
    self, theta: State, a: jax.Array, clock: jax.Array, key: jax.Array | None
  ) -> jax.Array:
    """The sum of the bases."""
    return sum(term.values for term in self._terms(theta, a))

  def weight(self, theta: State, w: jax.Array, clock: jax.Array, key: jax.Array | None) -> Sum:
    """The bases as terms."""
    return Sum(tuple(self._terms(theta, w)))

  def kernel(self, theta: State, w: jax.Array) -> Sum:
    """One bit a weight and basis."""
    return Sum(tuple(term.stored for term in self._terms(theta, w)))


@dataclasses.dataclass(frozen=True)
class Fourier(Part):
  """FDA's binarizer: sign(a) + c eta(a), c = (1 + cos(pi t / steps)) / 20, which fades to nothing.

  eta is a small network along K, fc(K -> K / 64), ReLU, fc(-> K), plus 0.1 sin(a); the sign's slope
  is `fourier`, whose terms grow from `first` to `last` (arXiv:2201.10938).

  Attributes:
    first: n of the slope at the beginning.
    last: n at the end.
    steps: until eta is gone.
    magnitude: as of `Binary`, of the sum.
    axis: of K in the tensor, -2 for weights.
  """

  first: int = 9
  last: int = 18
  steps: int = 1000
  magnitude: int | None = None
  axis: int = -1

  stored = True

  def init(self, a: jax.Array) -> State:
    """Two small matrices: cosines, and zeros, so that eta starts as 0.1 sin(a)."""
    k = a.shape[self.axis]
    hidden = max(1, k // 64)
    angles = jnp.pi * (jnp.arange(k)[:, None] + 0.5) * (jnp.arange(hidden) + 1) / k
    return {"down": jnp.cos(angles) * jnp.sqrt(2 / k), "up": jnp.zeros((hidden, k))}

  def _signs(self, a: jax.Array, clock: jax.Array) -> jax.Array:
    n = self.first + (self.last - self.first) * jnp.minimum(clock / self.steps, 1.0)
    return sign(a, lambda x: _series(x, n, self.last, 0.1)) * self._size(a)

  def _eta(self, theta: State, a: jax.Array, clock: jax.Array) -> jax.Array:
    along = jnp.moveaxis(a, self.axis, -1)
    eta = jax.nn.relu(along @ theta["down"]) @ theta["up"]
    fading = 0.05 * (1 + jnp.cos(jnp.pi * jnp.minimum(clock / self.steps, 1.0)))
    return fading * (jnp.moveaxis(eta, -1, self.axis) + 0.1 * jnp.sin(a)) * self._size(a)

  def _size(self, a: jax.Array) -> jax.Array | float:
    if self.magnitude is None:
      return 1.0
    return jax.lax.stop_gradient(mean(jnp.abs(a), self.magnitude))

  def __call__(
    self, theta: State, a: jax.Array, clock: jax.Array, key: jax.Array | None
  ) -> jax.Array:
    """The binarized tensor with what is left of eta."""
    return self._signs(a, clock) + self._eta(theta, a, clock)

  def weight(self, theta: State, w: jax.Array, clock: jax.Array, key: jax.Array | None) -> Sum:
    """The signs as they are stored, and beside them what is left of eta."""
    return Sum((Trained(self._signs(w, clock), self.kernel(theta, w)), self._eta(theta, w, clock)))

  def kernel(self, theta: State, w: jax.Array) -> QTensor:
    """The signs that are left at the end."""
    return Binary(magnitude=self.magnitude).kernel(theta, w)
