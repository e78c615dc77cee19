"""The triangular factor of H^-1 that second-order solvers push errors with."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

RETRIES = 5  # with damping grown tenfold each time: from 0.01 up to 1000 times the mean diagonal
FIRST_RETRY = 1e-3  # of the mean diagonal, if damp is below a tenth of it (damp=0)
LEAF = 128  # a multithreaded LAPACK potrf of 1024 rows took 12 ms, but 1.2 s on busy cores
PANEL = range(128, 385)  # rows of H that `energy` takes at a time
LOOP = 512  # up to here a loop over leaves: three times the work of halves, half of their program


def dead_channels(hessian: jax.Array) -> jax.Array:
  """Channels that were zero for all tokens, H_kk = 0: bool [K]."""
  return jnp.diagonal(hessian) == 0


def error_feedback(hessian: jax.Array, damp: float | jax.Array = 0.01) -> jax.Array:
  """V = diag(U)^-1 U, U upper, U^T U = (H + damp mean(diag H) I)^-1.

  Row k of V says what an error of one in channel k, chosen last of channels 0..k, asks of the
  channels behind it: the least-squares change is -V[k, k+1:] (arXiv:2210.17323, eq. 3 and sec. 3.3,
  divided by U_kk). With the index reversal J and one Cholesky L L^T = J H J, U = J L^-1 J: no
  inverse of H is formed.

  A failed or rounded-away pivot (L_kk^2 <= sqrt(K) eps H_kk) is tried again with ten times the
  damping, at most `RETRIES` times. Dead channels get H_kk = 1 mean, which decouples them; unlike
  the published code they do not count in that mean.

  Args:
    hessian: float32 [K, K], symmetric and positive semidefinite up to rounding; any scale.
    damp: relative to the mean of the diagonal over live channels.

  Returns:
    float32 [K, K], unit upper triangular. All NaN if no damping made H positive definite, if H has
    a NaN or infinity, or if all channels are dead (no data): never a silent identity.

  Example:
    >>> import jax.numpy as jnp
    >>> error_feedback(jnp.array([[2.0, 1.0], [1.0, 2.0]]), 0.0).tolist()
    [[1.0, -0.5], [0.0, 1.0]]
  """
  k = hessian.shape[-1]
  h = hessian.astype(jnp.float32)
  diagonal = jnp.diagonal(h)
  dead = diagonal == 0
  mean = diagonal.sum() / (k - dead.sum())
  mean = jnp.where((mean > 0) & jnp.isfinite(h.sum()), mean, jnp.nan)
  floor = np.sqrt(k) * np.finfo(np.float32).eps * diagonal[::-1] / mean

  def attempt(state: tuple[jax.Array, jax.Array, jax.Array]):
    i, mine = jax.lax.optimization_barrier((state[0], h))  # else XLA does the rest before the loop
    grown = jnp.maximum(damp, FIRST_RETRY / 10) * 10.0**i
    inverse = inverse_cholesky(_Reversed(mine, mean, dead, jnp.where(i == 0, damp, grown), k))
    return i + 1, inverse, (jnp.diagonal(inverse) ** -2 > floor).all()  # false for NaN

  def again(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    i, _, good = state
    return ~good & (i <= RETRIES)

  start = (jnp.int32(0), jnp.zeros((k, k)), jnp.bool_(False))
  _, inverse, good = jax.lax.while_loop(again, attempt, start)
  unit = (inverse / jnp.diagonal(inverse)[:, None])[::-1, ::-1]
  return jnp.where(good, unit, jnp.nan)


class _Reversed(NamedTuple):
  """J (H / mean + damp I) J, or its first `size` rows and columns, made block by block.

  A copy of H for K = 2816 is a sixth of a model of four layers, and each block is read once.
  """

  h: jax.Array
  mean: jax.Array
  dead: jax.Array
  damp: jax.Array
  size: int

  @property
  def shape(self) -> tuple[int, int]:
    """Rows and columns."""
    return self.size, self.size

  def __getitem__(self, at: tuple[slice, slice]) -> jax.Array | _Reversed:
    """The first rows and columns stay as they are; any other block is an array."""
    (top, bottom, _), (left, right, _) = (s.indices(self.size) for s in at)
    if top == left == 0 and bottom == right:
      return self._replace(size=bottom)
    return self.block(slice(top, bottom), slice(left, right))

  def block(self, rows: slice, columns: slice) -> jax.Array:
    """An array."""
    k = self.h.shape[0]
    of = lambda s: slice(k - s.stop, k - s.start)
    found = self.h[of(rows), of(columns)][::-1, ::-1] / self.mean
    if rows != columns:
      return found  # zeros where channels are dead
    diagonal = jnp.where(self.dead[of(rows)][::-1], 1, jnp.diagonal(found)) + self.damp
    return jnp.where(jnp.eye(len(diagonal), dtype=bool), diagonal[:, None], found)


def inverse_cholesky(a: jax.Array | _Reversed) -> jax.Array:
  """L^-1 of a = L L^T, by halves, so that all but small blocks is matrix products.

      a = [[A, .], [C, B]]:  L21 = C L11^-T,  L22 = chol(B - L21 L21^T),
      (L^-1)21 = -L22^-1 L21 L11^-1

  Args:
    a: float32 [K, K], or what makes its blocks; only the lower triangle and the blocks on the
      diagonal are read.

  Returns:
    float32 [K, K] lower triangular, with NaN if a is not positive definite.

  Example:
    >>> import jax.numpy as jnp
    >>> inverse_cholesky(jnp.array([[4.0, 2.0], [2.0, 2.0]])).tolist()
    [[0.5, 0.0], [-0.5, 1.0]]
  """
  k = a.shape[-1]
  if k <= LOOP:
    whole = a.block(slice(0, k), slice(0, k)) if isinstance(a, _Reversed) else a
    return _leaf(whole) if k <= LEAF else _by_leaves(whole)
  m = _half(k)
  top = inverse_cholesky(a[:m, :m])
  cross = _times_lower(a[m:, :m], top, transposed=True)
  bottom = inverse_cholesky(_less_square(a[m:, m:], cross))
  left = -_lower_times(bottom, _times_lower(cross, top))
  return jnp.block([[top, jnp.zeros((m, k - m))], [left, bottom]])


def pivots(a: jax.Array) -> jax.Array:
  """The diagonal of L, a = L L^T: `inverse_cholesky` without what only the inverse needs.

  Args:
    a: float32 [K, K]; only the lower triangle and the blocks on the diagonal are read.

  Returns:
    float32 [K], with NaN if a is not positive definite.

  Example:
    >>> import jax.numpy as jnp
    >>> pivots(jnp.array([[4.0, 2.0], [2.0, 2.0]])).tolist()
    [2.0, 1.0]
  """
  k = a.shape[-1]
  if k <= LEAF:
    return jnp.diagonal(jax.lax.linalg.cholesky(a, symmetrize_input=False))
  m = _half(k)
  top = inverse_cholesky(a[:m, :m])
  cross = _times_lower(a[m:, :m], top, transposed=True)
  return jnp.concatenate([1 / jnp.diagonal(top), pivots(_less_square(a[m:, m:], cross))])


def _half(k: int) -> int:
  """About half of k, in whole loops or else leaves."""
  unit = LOOP if k > LOOP else LEAF
  return -(-k // (2 * unit)) * unit


def _times_lower(c: jax.Array, lower: jax.Array, *, transposed: bool = False) -> jax.Array:
  """C @ L or C @ L^T without most of the products by zeros."""
  k = lower.shape[0]
  if k <= LOOP:
    return matmul_f32(c, lower.T if transposed else lower)
  m = _half(k)
  a, b = c[:, :m], c[:, m:]
  corner = lower[m:, :m]
  near = _times_lower(a, lower[:m, :m], transposed=transposed)
  far = _times_lower(b, lower[m:, m:], transposed=transposed)
  if transposed:
    return jnp.concatenate([near, far + matmul_f32(a, corner.T)], 1)
  return jnp.concatenate([near + matmul_f32(b, corner), far], 1)


def _lower_times(lower: jax.Array, c: jax.Array) -> jax.Array:
  """L @ C, likewise."""
  k = lower.shape[0]
  if k <= LOOP:
    return matmul_f32(lower, c)
  m = _half(k)
  far = _lower_times(lower[m:, m:], c[m:]) + matmul_f32(lower[m:, :m], c[:m])
  return jnp.concatenate([_lower_times(lower[:m, :m], c[:m]), far])


def _less_square(a: jax.Array, c: jax.Array) -> jax.Array:
  """A - C C^T in the lower triangle and on the diagonal's blocks; above them stays a."""
  k = a.shape[0]
  if k <= LOOP:
    return a - matmul_f32(c, c.T)
  m = _half(k)
  left = a[m:, :m] - matmul_f32(c[m:], c[:m].T)
  near, far = _less_square(a[:m, :m], c[:m]), _less_square(a[m:, m:], c[m:])
  return jnp.block([[near, a[:m, m:]], [left, far]])


def _leaf(a: jax.Array) -> jax.Array:
  return _inverse_lower(jax.lax.linalg.cholesky(a, symmetrize_input=False))


def _inverse_lower(lower: jax.Array) -> jax.Array:
  """L^-1 [K, K] of a small lower triangle: both halves by substitution, side by side, then joined.

  XLA:CPU's triangular_solve took 4 ms for 128 rows on busy cores, the factor itself 0.1 ms.
  """
  k = lower.shape[0]
  m = -(-k // 2)
  full = jax.scipy.linalg.block_diag(lower, jnp.eye(1)) if k % 2 else lower
  halves = jnp.stack([full[:m, :m], full[m:, m:]])

  def row(i: jax.Array, done: jax.Array) -> jax.Array:
    mine = jax.lax.dynamic_slice_in_dim(halves, i, 1, 1)  # [2, 1, m]; what is not done is zero
    known = (mine.swapaxes(1, 2) * done).sum(1, keepdims=True)
    unit = (jnp.arange(m) == i).astype(lower.dtype)
    new = (unit - known) / jax.lax.dynamic_slice_in_dim(mine, i, 1, 2)
    return jax.lax.dynamic_update_slice_in_dim(done, new, i, 1)

  near, far = jax.lax.fori_loop(0, m, row, jnp.zeros_like(halves))
  left = -matmul_f32(far, matmul_f32(full[m:, :m], near))
  return jnp.block([[near, jnp.zeros((m, m))], [left, far]])[:k, :k]


def _by_leaves(a: jax.Array) -> jax.Array:
  """As `inverse_cholesky`, `LEAF` rows at a time below all rows that are done."""
  k = a.shape[0]
  pad = -k % LEAF
  a = jax.scipy.linalg.block_diag(a, jnp.eye(pad)) if pad else a

  def rows(done: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
    mine = jax.lax.dynamic_slice_in_dim(a, start, LEAF)
    cross = matmul_f32(mine, done.T)  # zero from the diagonal on, where `done` is
    corner = jax.lax.dynamic_slice_in_dim(mine, start, LEAF, 1) - matmul_f32(cross, cross.T)
    corner = _leaf(corner)
    left = -matmul_f32(corner, matmul_f32(cross, done))
    new = jax.lax.dynamic_update_slice(left, corner, (0, start))
    return jax.lax.dynamic_update_slice(done, new, (start, 0)), None

  return jax.lax.scan(rows, jnp.zeros_like(a), jnp.arange(0, k, LEAF))[0][:k, :k]


def energy(hessian: jax.Array, d: jax.Array) -> jax.Array:
  """tr(D^T H D) for a symmetric H from its lower triangle, by panels: half of the products of H D.

      sum_i tr(D_i^T (H_ii D_i + 2 sum_{j<i} H_ij D_j))

  A loop, because XLA:CPU keeps the parts of an unrolled one side by side: 5 instead of 59 MB for
  K = 2816, N = 1024, and 15 % less time. A K without a divisor in `PANEL` takes the whole product.

  Args:
    hessian: float32 [K, K], symmetric; the blocks above the diagonal are not read.
    d: float32 [K, N].

  Example:
    >>> import jax.numpy as jnp
    >>> float(energy(jnp.array([[2.0, 1.0], [1.0, 2.0]]), jnp.ones((2, 1))))
    6.0
  """
  k, n = d.shape
  size = max((s for s in PANEL if k % s == 0), default=k)
  rows = lambda i: jax.lax.dynamic_slice_in_dim(d, i * size, size)
  push = lambda i, j: matmul_f32(
    jax.lax.dynamic_slice(hessian, (i * size, j * size), (size, size)), rows(j)
  )

  def panel(i: jax.Array, total: jax.Array) -> jax.Array:
    start = jnp.zeros((size, n), d.dtype)
    before = jax.lax.fori_loop(0, i, lambda j, pushed: pushed + push(i, j), start)
    return total + (rows(i) * (push(i, i) + 2 * before)).sum(0)

  return jax.lax.fori_loop(0, k // size, panel, jnp.zeros(n, d.dtype)).sum()


def matmul_f32(a: jax.Array, b: jax.Array) -> jax.Array:
  """A @ b in float32 also where the default is bfloat16 or TF32."""
  return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
