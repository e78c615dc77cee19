"""A low-rank branch that helps training and is taken away again."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxquant.kernels import LowRank, Sum
from jaxquant.ops.tracked import State
from jaxquant.quantizers.parts import Part


@dataclasses.dataclass(frozen=True)
class Branch(Part):
  """QVGen: w^ = Q(w) + L diag(a) R, whose rank decays to nothing (arXiv:2505.11497).

  L, R start as the rank-r SVD of w - Q(w). In phase p of T steps the first r / 2^(p+1) columns have
  a = 1, as many more fade, a = (1 + cos(pi t / T)) / 2, the rest have none. Between phases
  `rebalanced` sorts what is left by its singular values, so that the least of it fades next.

  Attributes:
    inner: the quantizer that stays.
    rank: r, a power of two.
    steps: T.
  """

  inner: Part
  rank: int = 32
  steps: int = 444

  def __post_init__(self) -> None:
    """Raises ValueError for a rank that cannot be halved down to one."""
    if self.rank < 1 or self.rank & (self.rank - 1):
      raise ValueError(f"Branch: the rank is halved in each phase, so it is 2^n; got {self.rank}")

  @property
  def random(self) -> bool:
    """Whether `inner` is."""
    return self.inner.random

  @property
  def phases(self) -> int:
    """After so many phases of `steps` the branch is gone."""
    return self.rank.bit_length()

  def init(self, a: jax.Array) -> State:
    """The parameters of `inner`, L [K, r] and R [r, N]."""
    inner = self.inner.init(a)
    q = self.inner(inner, a, jnp.zeros((), jnp.int32), jnp.zeros(2, jnp.uint32))
    l, r = _factors(a - q, self.rank)
    return {"inner": inner, "l": l, "r": r}

  def weights(self, clock: jax.Array) -> jax.Array:
    """A [r] at a step."""
    phase, t = clock // self.steps, clock % self.steps
    left = jnp.where(phase < self.phases, self.rank >> jnp.minimum(phase, 30), 0)
    fading = 0.5 * (1 + jnp.cos(jnp.pi * t / self.steps))
    column = jnp.arange(self.rank)
    return jnp.where(column < left // 2, 1.0, jnp.where(column < left, fading, 0.0))

  def __call__(self, theta: State, a: jax.Array, clock: jax.Array, key: jax.Array | None) -> Sum:
    """Q(w) and the branch beside it."""
    q = self.inner(theta["inner"], a, clock, key)
    return Sum((q, LowRank(theta["l"] * self.weights(clock), theta["r"])))

  def kernel(self, theta: State, w: jax.Array) -> object:
    """That of `inner`: the branch is for training alone."""
    return self.inner.kernel(theta["inner"], w)

  def rebalanced(self, theta: State, clock: jax.Array) -> State:
    """L and R of the columns that are left, as balanced factors by falling singular value."""
    keep = self.weights(clock) > 0
    l, r = _factors((theta["l"] * keep) @ theta["r"], self.rank)
    return {**theta, "l": l * keep, "r": r}


def _factors(a: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
  """U sqrt(S) [K, r] and sqrt(S) V^T [r, N]; zeros where a has fewer singular values."""
  u, s, v = jnp.linalg.svd(a, full_matrices=False)
  root = jnp.sqrt(s)
  l, r = (u * root)[:, :rank], (root[:, None] * v)[:rank]
  pad = rank - l.shape[1]
  return jnp.pad(l, ((0, 0), (0, pad))), jnp.pad(r, ((0, pad), (0, 0)))
