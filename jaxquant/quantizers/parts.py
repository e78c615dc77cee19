"""What a quantizer-aware site is made of: a part for the weight, one for the input, one for y.

    y = output(dot(input(x), weight(w)))

A part is a frozen dataclass: it makes its parameters from the first tensor that it sees, and maps
tensors to tensors. Papers differ in which parts they put where. Weights are [K, N] with a scale per
output channel [1, N], inputs [M, K] with a scale per token [M, 1] or per tensor: `axis` -2 and -1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxquant.kernels import is_node
from jaxquant.ops.tracked import Learned, State
from jaxquant.rounding import fold


class Part:
  """A differentiable map of one tensor, with parameters.

  Attributes:
    random: whether a call needs a key.
  """

  random = False

  def init(self, a: jax.Array) -> State:
    """Parameters; {} for none."""
    del a
    return {}

  def __call__(
    self, theta: State, a: jax.Array, clock: jax.Array, key: jax.Array | None
  ) -> jax.Array:
    """The tensor as the contraction sees it; a weight may become a node of `jaxquant.kernels`."""
    raise TypeError(f"{type(self).__name__} is abstract")

  def kernel(self, theta: State, w: jax.Array) -> object:
    """The packed form of a weight; by default there is none."""
    raise ValueError(
      f"{self} trains weights that stay in float: quantize the trained model with a recipe that is "
      "not learned"
    )


@dataclasses.dataclass(frozen=True)
class Parts(Learned):
  """A site of parts, each optional.

  Attributes:
    weight: of w.
    input: of x.
    output: of y; its parameters are made from w.
  """

  weight: Part | None = None
  input: Part | None = None
  output: Part | None = None

  @property
  def random(self) -> bool:
    """Whether one of them is."""
    return any(p.random for p in (self.weight, self.input, self.output) if p is not None)

  def init(self, w: jax.Array, x: jax.Array) -> State:
    """The parameters of each part, by name."""
    w, x = w.astype(jnp.float32), x.astype(jnp.float32)
    found = {"weight": (self.weight, w), "input": (self.input, x), "output": (self.output, w)}
    made = {name: part.init(a) for name, (part, a) in found.items() if part is not None}
    return {name: theta for name, theta in made.items() if theta}

  def __call__(
    self,
    theta: State,
    x: jax.Array,
    w: object,
    dot: Callable[[jax.Array, object], jax.Array],
    clock: jax.Array,
    key: jax.Array | None,
  ) -> jax.Array:
    """As `Learned`; a packed weight is past its part."""

    def apply(name: str, part: Part | None, a: jax.Array, i: int) -> jax.Array:
      noise = None if key is None else fold(key, i)
      return a if part is None else part(theta.get(name, {}), a, clock, noise)

    if not is_node(w):
      w = apply("weight", self.weight, w, 0)
    y = dot(apply("input", self.input, x, 1).astype(x.dtype), w)
    return apply("output", self.output, y, 2).astype(y.dtype)

  def kernel(self, theta: State, w: jax.Array) -> object:
    """The packed weight."""
    return w if self.weight is None else self.weight.kernel(theta.get("weight", {}), w)

  def __str__(self) -> str:
    """`parts(weight ..., input ...)`."""
    named = [(n, getattr(self, n)) for n in ("weight", "input", "output")]
    return f"parts({', '.join(f'{n} {p}' for n, p in named if p is not None)})"


@dataclasses.dataclass(frozen=True)
class Chain(Part):
  """One part after the other.

  Attributes:
    parts: in order.
  """

  parts: tuple[Part, ...]

  @property
  def random(self) -> bool:
    """Whether one of them is."""
    return any(p.random for p in self.parts)

  def init(self, a: jax.Array) -> State:
    """Each from what the ones before leave of `a`."""
    found, clock = {}, jnp.zeros((), jnp.int32)
    for i, part in enumerate(self.parts):
      theta = part.init(a)
      found |= {str(i): theta} if theta else {}
      a = part(theta, a, clock, jnp.zeros(2, jnp.uint32))
    return found

  def __call__(
    self, theta: State, a: jax.Array, clock: jax.Array, key: jax.Array | None
  ) -> jax.Array:
    """The last of them."""
    for i, part in enumerate(self.parts):
      a = part(theta.get(str(i), {}), a, clock, None if key is None else fold(key, i))
    return a


@dataclasses.dataclass(frozen=True)
class Shift(Part):
  """A + t, with a learned t per channel [K] that starts at 0 (RSign of arXiv:2003.03488)."""

  def init(self, a: jax.Array) -> State:
    """Zeros."""
    return {"shift": jnp.zeros(a.shape[-1], jnp.float32)}

  def __call__(
    self, theta: State, a: jax.Array, clock: jax.Array, key: jax.Array | None
  ) -> jax.Array:
    """A + t."""
    return a + theta["shift"]


@dataclasses.dataclass(frozen=True)
class Scale(Part):
  """Y * alpha, with a learned alpha per output channel [N] that starts at 1 (arXiv:1909.13863)."""

  def init(self, a: jax.Array) -> State:
    """Ones."""
    return {"alpha": jnp.ones(a.shape[-1], jnp.float32)}

  def __call__(
    self, theta: State, a: jax.Array, clock: jax.Array, key: jax.Array | None
  ) -> jax.Array:
    """Y * alpha."""
    return a * theta["alpha"]


@dataclasses.dataclass(frozen=True)
class Centered(Part):
  """A - mean(a) along `axis`."""

  axis: int = -2

  def __call__(
    self, theta: State, a: jax.Array, clock: jax.Array, key: jax.Array | None
  ) -> jax.Array:
    """Differentiable, the mean included."""
    return a - a.mean(self.axis, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Unit(Part):
  """A / std(a) along `axis`, times `by`."""

  axis: int = -2
  by: float = 1.0

  def __call__(
    self, theta: State, a: jax.Array, clock: jax.Array, key: jax.Array | None
  ) -> jax.Array:
    """Differentiable, the deviation included; a constant stays what it is."""
    std = a.std(self.axis, keepdims=True)
    return a * (self.by / jnp.where(std > 0, std, 1))


@dataclasses.dataclass(frozen=True)
class Clamped(Part):
  """ReCU: a clamped to +-Q, Q = -mean |a| ln(2 - 2 tau), the tau quantile of a Laplacian.

  tau grows from `first` to `last` over `steps`, tau = A e^(t / steps) + B (arXiv:2103.12369).
  """

  axis: int = -2
  first: float = 0.85
  last: float = 0.99
  steps: int = 1000

  def __call__(
    self, theta: State, a: jax.Array, clock: jax.Array, key: jax.Array | None
  ) -> jax.Array:
    """Weights beyond Q are moved back to it, so that they can change sign again."""
    rate = (self.last - self.first) / (jnp.e - 1)
    t = jnp.minimum(clock / self.steps, 1.0)
    tau = rate * jnp.exp(t) + self.first - rate
    bound = -jnp.abs(a).mean(self.axis, keepdims=True) * jnp.log(2 - 2 * tau)
    bound = jax.lax.stop_gradient(bound)
    return jnp.clip(a, -bound, bound)
