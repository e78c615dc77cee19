"""A low-rank branch that helps training and is taken away again."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxquant.kernels import LowRank, Sum, to_dense
from jaxquant.ops.tracked import State
from jaxquant.quantizers.parts import Part


@dataclasses.dataclass(frozen=True)
class Branch(Part):
  """QVGen: w^ = Q(w) + L diag(a) R, whose rank decays to nothing (arXiv:2505.11497).

  L, R start as the rank-r SVD of w - Q(w). In phase p of T steps the first r / 2^(p+1) columns have
  a = 1, as many more fade, a = (1 + cos(pi t / T)) / 2, the rest have none. Between phases
  `renewed` sorts what is left by its singular values, so that the least of it fades next
  (`jaxquant.state.between_steps`). Moments of an optimizer stay in the old basis.

  Attributes:
    inner: the quantizer that stays.
    rank: r, a power of two.
    steps: T.
  """

  inner: Part
  rank: int = 32
  steps: int = 444

  stored = True

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
    """After so many phases of T steps the branch is gone."""
    return self.rank.bit_length()

  def init(self, a: jax.Array) -> State:
    """The parameters of `inner`, L [K, r] and R [r, N]."""
    inner = self.inner.init(a)
    q = self.inner(inner, a, jnp.zeros((), jnp.int32), jnp.zeros(2, jnp.uint32))
    l, r = _balanced(*_svd(a - q), self.rank)
    return {"inner": inner, "l": l, "r": r}

  def weights(self, clock: jax.Array) -> jax.Array:
    """A [r] at a step."""
    phase, t = clock // self.steps, clock % self.steps
    left = jnp.where(phase < self.phases, self.rank >> jnp.minimum(phase, 30), 0)
    fading = 0.5 * (1 + jnp.cos(jnp.pi * t / self.steps))
    column = jnp.arange(self.rank)
    return jnp.where(column < left // 2, 1.0, jnp.where(column < left, fading, 0.0))

  def _branch(self, theta: State, clock: jax.Array) -> LowRank:
    return LowRank(theta["l"] * self.weights(clock), theta["r"])

  def __call__(
    self, theta: State, a: jax.Array, clock: jax.Array, key: jax.Array | None
  ) -> jax.Array:
    """Q(w) + L diag(a) R."""
    return self.inner(theta["inner"], a, clock, key) + to_dense(self._branch(theta, clock))

  def weight(self, theta: State, w: jax.Array, clock: jax.Array, key: jax.Array | None) -> Sum:
    """Q(w) as it is stored, and the branch beside it."""
    return Sum((self.inner.weight(theta["inner"], w, clock, key), self._branch(theta, clock)))

  def kernel(self, theta: State, w: jax.Array) -> object:
    """That of `inner`: the branch is for training alone."""
    return self.inner.kernel(theta["inner"], w)

  def due(self, step: int) -> bool:
    """At the ends of phases, while there is a branch."""
    return step % self.steps == 0 and 0 < step <= self.phases * self.steps

  def renewed(self, theta: State, clock: jax.Array) -> State:
    """L and R of the columns that are left, as balanced factors by falling singular value.

    L = Q_l C_l and R^T = Q_r C_r give the SVD of L R by that of C_l C_r^T, [r, r].
    """
    keep = self.weights(clock) > 0
    (ql, cl), (qr, cr) = jnp.linalg.qr(theta["l"] * keep), jnp.linalg.qr(theta["r"].T * keep)
    u, s, v = _svd(_exact(cl, cr.T))
    l, r = _balanced(_exact(ql, u), s, _exact(qr, v), self.rank)
    return {**theta, "l": l * keep, "r": r * keep[:, None]}


def _exact(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _svd(a: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """U [K, k], S [k] falling, V [N, k]."""
  u, s, vt = jnp.linalg.svd(a, full_matrices=False)
  return u, s, vt.T


def _balanced(u: jax.Array, s: jax.Array, v: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
  """U sqrt(S) [K, rank] and sqrt(S) V^T [rank, N]; zeros beyond the rank of S."""
  root = jnp.sqrt(s[:rank])
  pad = [(0, 0), (0, rank - root.shape[0])]
  return jnp.pad(u[:, :rank] * root, pad), jnp.pad(v[:, :rank] * root, pad).T
