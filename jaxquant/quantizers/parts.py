"""What a quantizer-aware site is made of: a part for the weight, one for the input, one for y.

    y = output(dot(input(x), weight(w)))

A part is a frozen dataclass: it makes its parameters from the first tensor that it sees, and maps
tensors to tensors. Papers differ in which parts they put where. Weights are [K, N] with a scale per
output channel [1, N], inputs [M, K] with a scale per token [M, 1] or per tensor: `axis` -2 and -1.

A weight part that can store what it makes (`stored`) multiplies by just that while it trains, as a
`Trained` node: fake quantization and the packed weight take one path of `qdot` and give one result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxquant import kernels, scales
from jaxquant.estimators import straight_through
from jaxquant.ops.tracked import Learned, State
from jaxquant.rounding import fold

END = np.int32(2**31 - 1)  # a clock at which every schedule is over


@struct.dataclass
class Trained:
  """A weight in training: it multiplies as it will be stored and learns through its float values.

      y = x @ stored,   gradients of x @ values

  Attributes:
    values: [K, N], differentiable; the numbers of `stored`.
    stored: any kernel.
  """

  values: jax.Array
  stored: object


@kernels.matmul.register
def _(kernel: Trained, x: jax.Array, dot: kernels.Dot) -> jax.Array:
  stored, at = jax.lax.stop_gradient((kernel.stored, x))
  # Nobody reads the value of the first product: compilers drop it and keep its gradient.
  y = kernels.matmul(stored, at, dot)
  return straight_through(dot(x, kernel.values), jax.lax.stop_gradient(y))


@kernels.to_dense.register
def _(kernel: Trained) -> jax.Array:
  return kernels.to_dense(kernel.stored)


def mean(a: jax.Array, axis: int) -> jax.Array:
  """Mean of a [R, C] along -2, [1, C], or -1, [R, 1]: the same bits in every program."""
  return scales.mean(a[None, :, :, None] if axis == -2 else a[:, None, None, :])


class Part:
  """A differentiable map of one tensor, with parameters.

  Attributes:
    random: whether a call needs a key.
    stored: whether `kernel` can store a weight.
  """

  random = False
  stored = False

  def init(self, a: jax.Array) -> State:
    """Parameters; {} for none."""
    del a
    return {}

  def __call__(
    self, theta: State, a: jax.Array, clock: jax.Array, key: jax.Array | None
  ) -> jax.Array:
    """The values that the contraction sees, of `a`'s shape."""
    raise TypeError(f"{type(self).__name__} is abstract")

  def weight(
    self, theta: State, w: jax.Array, clock: jax.Array, key: jax.Array | None
  ) -> jax.Array | object:
    """The weight [K, N] as the contraction sees it in training."""
    values = self(theta, w, clock, key)
    return Trained(values, self.kernel(theta, w)) if self.stored else values

  def kernel(self, theta: State, w: jax.Array) -> object:
    """What a trained weight is stored as: a kernel, not packed yet."""
    raise ValueError(
      f"{self} trains weights that stay in float: quantize the trained model with a recipe that is "
      "not learned"
    )

  def due(self, step: int) -> bool:
    """Whether `renewed` has something to do after so many steps."""
    del step
    return False

  def renewed(self, theta: State, clock: jax.Array) -> State:
    """The parameters as the next step shall find them (`jaxquant.state.between_steps`)."""
    del clock
    return theta

  def __str__(self) -> str:
    """Its name and what differs from the defaults: `Binary(slope=bireal, magnitude=-2)`."""
    fields = dataclasses.fields(self)
    found = {f.name: getattr(self, f.name) for f in fields if getattr(self, f.name) != f.default}
    return f"{type(self).__name__}({', '.join(f'{k}={_name(v)}' for k, v in found.items())})"


def _name(value: object) -> str:
  if isinstance(value, tuple):
    return f"[{', '.join(map(_name, value))}]"
  return getattr(value, "__name__", None) or str(value)


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
    """As `Learned`; parts work in float32, and a packed weight is past its part."""
    if self.random and key is None:
      raise ValueError(f"{self} is random and no key came in: pass rngs={{'sr': key}} to apply")
    given = lambda name: theta.get(name, {})
    noise = lambda i: None if key is None else fold(key, i)
    dtype = x.dtype
    if self.weight is not None and not kernels.is_node(w):
      w = self.weight.weight(given("weight"), w.astype(jnp.float32), clock, noise(0))
    if self.input is not None:
      x = self.input(given("input"), x.astype(jnp.float32), clock, noise(1)).astype(dtype)
    y = dot(x, w)
    if self.output is not None:
      y = self.output(given("output"), y.astype(jnp.float32), clock, noise(2)).astype(dtype)
    return y

  def kernel(self, theta: State, w: jax.Array) -> object:
    """The packed weight."""
    return w if self.weight is None else self.weight.kernel(theta.get("weight", {}), w)

  def due(self, step: int) -> bool:
    """Whether the weight's part is due."""
    return self.weight is not None and self.weight.due(step)

  def renewed(self, theta: State, clock: jax.Array) -> State:
    """With those of the weight renewed."""
    return {**theta, "weight": self.weight.renewed(theta["weight"], clock)}

  def __str__(self) -> str:
    """`parts(weight ..., input ...)`."""
    named = [(n, getattr(self, n)) for n in ("weight", "input", "output")]
    return f"parts({', '.join(f'{n} {p}' for n, p in named if p is not None)})"


@dataclasses.dataclass(frozen=True)
class Chain(Part):
  """One part after the other.

  A weight is stored as the last part stores what the others leave once their schedules are over.

  Attributes:
    parts: in order.
  """

  parts: tuple[Part, ...]

  @property
  def random(self) -> bool:
    """Whether one of them is."""
    return any(p.random for p in self.parts)

  @property
  def stored(self) -> bool:
    """Whether the last of them is."""
    return self.parts[-1].stored

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
    """What the last of them makes."""
    a = self._before(theta, a, clock, key)
    return self.parts[-1](self._last(theta), a, clock, self._key(key, len(self.parts) - 1))

  def weight(
    self, theta: State, w: jax.Array, clock: jax.Array, key: jax.Array | None
  ) -> jax.Array | object:
    """The last part's."""
    w = self._before(theta, w, clock, key)
    return self.parts[-1].weight(self._last(theta), w, clock, self._key(key, len(self.parts) - 1))

  def kernel(self, theta: State, w: jax.Array) -> object:
    """That of the last part."""
    return self.parts[-1].kernel(self._last(theta), self._before(theta, w, END, None))

  def _before(self, theta: State, a: jax.Array, clock: jax.Array, key: jax.Array | None):
    for i, part in enumerate(self.parts[:-1]):
      a = part(theta.get(str(i), {}), a, clock, self._key(key, i))
    return a

  def _last(self, theta: State) -> State:
    return theta.get(str(len(self.parts) - 1), {})

  @staticmethod
  def _key(key: jax.Array | None, i: int) -> jax.Array | None:
    return None if key is None else fold(key, i)


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
    return a - mean(a, self.axis)


@dataclasses.dataclass(frozen=True)
class Unit(Part):
  """A / std(a) along `axis`, times `by`."""

  axis: int = -2
  by: float = 1.0

  def __call__(
    self, theta: State, a: jax.Array, clock: jax.Array, key: jax.Array | None
  ) -> jax.Array:
    """Differentiable, the deviation included; a constant stays what it is."""
    variance = a.var(self.axis, keepdims=True)
    return a * (self.by / jnp.sqrt(jnp.where(variance > 0, variance, 1)))


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
    tau = rate * jnp.exp(jnp.minimum(clock / self.steps, 1.0)) + self.first - rate
    bound = -mean(jnp.abs(a), self.axis) * jnp.log(2 - 2 * tau)
    bound = jax.lax.stop_gradient(bound)
    return jnp.clip(a, -bound, bound)
