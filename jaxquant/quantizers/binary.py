"""One-bit weights and activations: signs, their magnitudes, and what passes back through them.

A slope is the derivative that stands in for that of the sign, a function of the argument. The sign
of 0 is +1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxquant.formats import BINARY
from jaxquant.kernels import Sum
from jaxquant.named_functions import parametrised
from jaxquant.ops.tracked import State
from jaxquant.quantizers.parts import Part
from jaxquant.tensor import QTensor, pack

Slope = Callable[[jax.Array], jax.Array]


def clip(x: jax.Array) -> jax.Array:
  """1 where |x| <= 1 (arXiv:1602.02830, section 1.3)."""
  return (jnp.abs(x) <= 1).astype(jnp.float32)


def clip_open(x: jax.Array) -> jax.Array:
  """1 where |x| < 1."""
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

  def slope(x: jax.Array) -> jax.Array:
    odd = 2 * jnp.arange(terms + 1, dtype=jnp.float32) + 1
    series = jnp.cos(omega * odd * x[..., None]).sum(-1)
    return jnp.where(jnp.abs(x) <= 1, 4 * omega / jnp.pi * series, 0)

  return slope


def sign(x: jax.Array, slope: Slope) -> jax.Array:
  """+1 for x >= 0, else -1; backward g * slope(x).

  Example:
    >>> import jax
    >>> sign(jnp.array([-0.2, 0.0, 3.0]), clip).tolist()
    [-1.0, 1.0, 1.0]
    >>> jax.grad(lambda x: sign(x, bireal))(0.25).item()
    1.5
  """

  @jax.custom_vjp
  def hard(x: jax.Array) -> jax.Array:
    return jnp.where(x >= 0, 1.0, -1.0).astype(x.dtype)

  hard.defvjp(lambda x: (hard(x), x), lambda x, g: (g * slope(x).astype(g.dtype),))
  return hard(x)


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

  def __call__(
    self, theta: State, a: jax.Array, clock: jax.Array, key: jax.Array | None
  ) -> jax.Array:
    """The binarized tensor."""
    signs = sign(a, self.slope)
    if self.magnitude is None:
      return signs
    size = jax.lax.stop_gradient(jnp.abs(a).mean(self.magnitude, keepdims=True))
    if self.scale_in_grad:
      return signs * size
    return signs + jax.lax.stop_gradient(signs * size - signs)

  def kernel(self, theta: State, w: jax.Array) -> QTensor:
    """One bit a weight and a scale per output channel."""
    if self.magnitude not in (None, -2):
      raise ValueError(
        "the magnitudes of a packed weight are those of its output channels, axis -2"
      )
    size = jnp.ones((1, w.shape[1])) if self.magnitude is None else jnp.abs(w).mean(-2)[None]
    return one_bit(w, size)


def one_bit(w: jax.Array, size: jax.Array) -> QTensor:
  """Signs of w [K, N] times a size per output channel [1, N], packed."""
  return pack(QTensor(jnp.where(w >= 0, 1.0, -1.0), size.astype(jnp.float32), fmt=BINARY, axis=-2))


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

  def init(self, a: jax.Array) -> State:
    """Sizes [N] of each basis."""
    sizes, rest = {}, a
    for i in range(self.order):
      sizes[f"size{i}"] = jnp.abs(rest).mean(-2)
      rest = rest - sizes[f"size{i}"] * jnp.where(rest >= 0, 1.0, -1.0)
    return sizes

  def __call__(self, theta: State, a: jax.Array, clock: jax.Array, key: jax.Array | None) -> Sum:
    """The bases as terms, like the packed weight has them."""
    terms, rest = [], a
    for i in range(self.order):
      terms.append(theta[f"size{i}"] * sign(rest, self.slope))
      rest = rest - terms[-1]
    return Sum(tuple(terms))

  def kernel(self, theta: State, w: jax.Array) -> Sum:
    """One bit a weight and basis."""
    terms, rest = [], w.astype(jnp.float32)
    for i in range(self.order):
      size = theta[f"size{i}"][None]
      terms.append(one_bit(rest, size))
      rest = rest - size * jnp.where(rest >= 0, 1.0, -1.0)
    return Sum(tuple(terms))


NINE_TERMS = fourier()


@dataclasses.dataclass(frozen=True)
class Fourier(Part):
  """FDA's binarizer: sign(a) + c eta(a), c = (1 + cos(pi t / steps)) / 20, which fades to nothing.

  eta is a small network along K, fc(K -> K / 64), ReLU, fc(-> K), plus 0.1 sin(a); the sign's slope
  is `fourier` (arXiv:2201.10938).

  Attributes:
    slope: of the sign.
    steps: until eta is gone.
    magnitude: as of `Binary`, of the sum.
    axis: of K in the tensor, -2 for weights.
  """

  slope: Slope = NINE_TERMS
  steps: int = 1000
  magnitude: int | None = None
  axis: int = -1

  def init(self, a: jax.Array) -> State:
    """Two small matrices."""
    k = a.shape[self.axis]
    hidden = max(1, k // 64)
    down = jax.random.normal(jax.random.key(0), (k, hidden)) / jnp.sqrt(k)
    return {"down": down, "up": jnp.zeros((hidden, k))}

  def __call__(
    self, theta: State, a: jax.Array, clock: jax.Array, key: jax.Array | None
  ) -> jax.Array:
    """The binarized tensor with what is left of eta."""
    along = jnp.moveaxis(a, self.axis, -1)
    eta = jax.nn.relu(along @ theta["down"]) @ theta["up"]
    fading = 0.05 * (1 + jnp.cos(jnp.pi * jnp.minimum(clock / self.steps, 1.0)))
    found = sign(a, self.slope) + fading * (jnp.moveaxis(eta, -1, self.axis) + 0.1 * jnp.sin(a))
    if self.magnitude is None:
      return found
    return found * jax.lax.stop_gradient(jnp.abs(a).mean(self.magnitude, keepdims=True))

  def kernel(self, theta: State, w: jax.Array) -> QTensor:
    """The signs that are left at the end."""
    return Binary(self.slope, self.magnitude).kernel(theta, w)
