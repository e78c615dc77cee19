"""Vector quantization: vectors of weights on the codewords of a learned codebook."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.scipy.sparse.linalg import cg

from jaxquant.formats import Format
from jaxquant.grids import Grid
from jaxquant.kernels import Codebook, Sparse, Sum
from jaxquant.rounding import round_to
from jaxquant.solvers.cholesky import dead_channels, energy, error_feedback, matmul_f32
from jaxquant.solvers.gptq import PANEL, _pad, _sweep
from jaxquant.solvers.kmeans import kmeans, nearest

Books = tuple[jax.Array, ...]  # [k, v] each: a vector is the sum of one codeword of each


@functools.partial(
  jax.jit,
  static_argnames=(
    *("fmt", "v", "k", "k_residual", "outliers", "normalize", "order", "second_order", "steps"),
    "tune",
  ),
)
def vptq(
  w: jax.Array,
  hessian: jax.Array,
  fmt: Format,
  *,
  v: int = 4,
  k: int = 256,
  k_residual: int = 0,
  outliers: float = 0.0,
  normalize: bool = False,
  order: bool = True,
  second_order: bool = True,
  damp: float = 0.01,
  steps: int = 100,
  tune: int = 0,
  seed: int = 0,
) -> Codebook | Sum:
  """Vectors along N on codewords, row after row of K, errors fed to the rows that are left.

      w[i, v j : v (j + 1)] ~ C1[a_ij] + C2[b_ij];  w_j <- w_j - V_ij e_i for j > i

  All v weights of a vector belong to one channel, so its loss is H_kk |e|^2 and the nearest
  codeword is the best one. C1 is the k-means of the vectors of w, weighted by H_kk; C2 that of the
  errors which a first sweep with C1 alone leaves (arXiv:2409.17066, secs. 3.1 to 3.3). Outlier
  channels get the rest of their rows in float16 instead of a codebook of their own. At the end
  codewords may be moved for the indices that were found (`tune_books`).

  Args:
    w: [K, N]; v divides N.
    hessian: X^T X, float32 [K, K].
    fmt: its element is what codebooks are stored in.
    v: weights per vector.
    k: codewords; an index takes 8 bits up to 256 of them, then 16.
    k_residual: codewords of C2; 0: none.
    outliers: share of channels, by H_kk, that also store what the codewords leave of them.
    normalize: divide each channel of w by its root mean square first, and store that.
    order: take channels by falling H_kk.
    second_order: feed errors back; else each vector gets its nearest codeword.
    damp: as in `gptq`.
    steps: at most, of k-means.
    tune: iterations on the codewords at the end; 0 leaves them.
    seed: of the start of k-means.

  Returns:
    Codebook with vectors along N, or a Sum of two, or of them and Sparse rows. NaN if H has no
    usable factor.

  Raises:
    ValueError: if shapes do not fit, or if there are fewer vectors than codewords.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from jaxquant import formats, kernels
    >>> w = jax.random.normal(jax.random.key(0), (32, 32))
    >>> q = vptq(w, jnp.eye(32), formats.Format(formats.FP16), k=16)
    >>> q.index.shape, q.index.dtype, kernels.to_dense(q).shape
    ((32, 8), dtype('uint8'), (32, 32))
  """
  _check(w, hessian, fmt, v)
  w = w.astype(jnp.float32)
  w = jnp.where(dead_channels(hessian)[:, None] & jnp.isfinite(w), 0, w)
  importance = jnp.diagonal(hessian).astype(jnp.float32)
  perm = jnp.argsort(-importance) if order else jnp.arange(len(w))
  push = error_feedback(hessian[perm][:, perm], damp)
  rows = jnp.where(jnp.isnan(push[0, 0]), jnp.nan, w[perm])  # all or nothing
  push = push if second_order else jnp.eye(len(w))
  few = math.ceil(outliers * len(w))
  kept = jnp.zeros(len(w), bool).at[jnp.argsort(-importance[perm])[:few]].set(True)
  scale = _rms(rows) if normalize else jnp.ones((len(w), 1))
  weights = importance[perm] * jnp.square(scale[:, 0])

  def learn(rows: jax.Array, size: int, key: jax.Array) -> jax.Array:
    points, per_row = (rows / scale).reshape(-1, v), rows.shape[1] // v
    found = kmeans(points, jnp.repeat(weights, per_row), size, key, steps=steps)
    return round_to(found, fmt.elem)

  first, second = jax.random.split(jax.random.key(seed))
  books: Books = (learn(rows, k, first),)
  index, errors, rest = _assign(rows, push, books, kept, scale)
  if k_residual:
    books += (learn(errors + rest, k_residual, second),)
    index, errors, rest = _assign(rows, push, books, kept, scale)
  if tune:
    words = decoded(index, books, scale)
    fixed = jnp.where(kept[:, None], words + rest, 0)
    parts = (rows - fixed, hessian[perm][:, perm], index, books, jnp.where(kept[:, None], 0, scale))
    books = tune_books(*parts, fmt.elem, steps=tune)
    rest = jnp.where(kept[:, None], fixed - decoded(index, books, scale), 0)
  back = jnp.argsort(perm)
  scale = scale[back] if normalize else jnp.ones((1, 1))
  terms = _codebooks([i[back] for i in index], books, scale, fmt)
  terms += [_rows(rest[back], kept[back], few)] if few else []
  return terms[0] if len(terms) == 1 else Sum(tuple(terms))


def _check(w: jax.Array, hessian: jax.Array, fmt: Format, v: int) -> None:
  if w.ndim != 2 or hessian.shape != (w.shape[0], w.shape[0]) or w.shape[1] % v:
    raise ValueError(
      f"vptq wants w [K, N] and hessian [K, K], with N a multiple of v={v}; got {list(w.shape)} "
      f"and {list(hessian.shape)}. Use jax.vmap for stacked layers."
    )
  if fmt.elem.dtype is None or not jnp.issubdtype(fmt.elem.dtype, jnp.floating):
    raise ValueError(f"vptq stores codewords in a float type, got {fmt.elem.name}; take FP16")


def _assign(
  rows: jax.Array, push: jax.Array, books: Books, kept: jax.Array, scale: jax.Array
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
  """Codewords times the scale [K, 1] of their row, row by row with error feedback.

  Returns:
    Indices [K, N / v] per book; errors [K, N]; what kept rows store beside their codewords [K, N].
  """
  (k, n), v = rows.shape, books[0].shape[1]
  block = min(128, -(-k // PANEL) * PANEL)
  keep, scales = jnp.pad(kept, (0, block)), jnp.pad(scale[:, 0], (0, block), constant_values=1)

  def row(work: jax.Array, xs: tuple) -> tuple[jax.Array, tuple]:
    i, push, keep, scale = xs
    left = (work[i] / scale).reshape(-1, v)
    index = []
    for book in books:
      index.append(nearest(left, book))
      left = left - book[index[-1]]
    left = left.reshape(n) * scale
    rest = jnp.where(keep, left.astype(jnp.float16).astype(jnp.float32), 0)
    return work - push[:, None] * (left - rest), (left - rest, index, rest)

  def panel(rows: jax.Array, push: jax.Array, start: jax.Array) -> tuple:
    mine = [jax.lax.dynamic_slice_in_dim(a, start, len(rows)) for a in (keep, scales)]
    _, (errors, index, rest) = jax.lax.scan(row, rows, (jnp.arange(len(rows)), push, *mine))
    return errors, (index, rest, errors)

  def lazy(rows: jax.Array, push: jax.Array, first: jax.Array) -> tuple:
    return _sweep(rows, push, PANEL, lambda r, p, start: panel(r, p, first + start))

  _, out = _sweep(*_pad(rows, push, block), block, lazy)
  index, rest, errors = jax.tree.map(lambda a: a.reshape(-1, a.shape[-1])[:k], out)
  return index, errors, rest


def decoded(index: list[jax.Array], books: Books, scale: jax.Array) -> jax.Array:
  """The weight [K, N] that indices [K, N / v] of some books and a scale [K, 1] stand for."""
  return sum(book[i].reshape(len(i), -1) for book, i in zip(books, index)) * scale


def tune_books(
  w: jax.Array,
  hessian: jax.Array,
  index: list[jax.Array],
  books: Books,
  scale: jax.Array,
  elem: Grid,
  *,
  steps: int,
  ridge: float = 1e-4,
) -> Books:
  """Codewords that leave less output error under the indices they have: weighted least squares.

      min over D of tr(E^T H E) + ridge sum_c m_c |D_c|^2,  E = W - scale sum_b (C_b + D_b)[a_b],
      m_c = sum of scale_k^2 H_kk over the vectors on codeword c

  The error is quadratic in all books together; conjugate gradients from the books there are, with
  m as preconditioner, never see its matrix. What one book gains the other can lose, so the least
  change of all is taken (the ridge), and float32 finds it. This is what VPTQ's tuning of centroids
  (arXiv:2409.17066) asks of a layer, which the paper learns by gradients. Codewords that nothing
  points at stay; if rounding to `elem` loses what was gained, all do.

  Args:
    w: [K, N].
    hessian: [K, K].
    index: [K, N / v] for each book.
    books: [k, v] each.
    scale: [K, 1]; rows with 0 do not count.
    elem: what codewords are stored in.
    steps: iterations at most.
    ridge: what a change costs.

  Returns:
    Books of the same shapes.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxquant.formats import FP16
    >>> w, index = jnp.array([[1.0, 2.0], [2.0, 4.0]]), [jnp.zeros((2, 1), int)]
    >>> tune_books(w, jnp.eye(2), index, (jnp.ones((1, 2)),), jnp.ones((2, 1)), FP16, steps=3)
    (Array([[1.5, 3. ]], dtype=float32),)
  """
  decode = lambda books: decoded(index, books, scale)
  gather = lambda a: jax.linear_transpose(decode, books)(a)[0]
  mass = gather(jnp.broadcast_to(jnp.diagonal(hessian)[:, None] * scale, w.shape))
  mass = jax.tree.map(lambda m: jnp.where(m > 0, m, 1), mass)

  def normal(change: Books) -> Books:
    fit = gather(matmul_f32(hessian, decode(change)))
    return jax.tree.map(lambda f, m, c: f + ridge * m * c, fit, mass, change)

  wanted = gather(matmul_f32(hessian, w - decode(books)))
  divided = lambda books: jax.tree.map(jnp.divide, books, mass)
  change, _ = cg(normal, wanted, tol=1e-4, maxiter=steps, M=divided)
  new = jax.tree.map(jnp.add, books, change)
  new = jax.tree.map(lambda b: round_to(b, elem), new)
  better = energy(hessian, w - decode(new)) < energy(hessian, w - decode(books))
  return jax.tree.map(lambda b, old: jnp.where(better, b, old), new, books)


def _codebooks(index: list[jax.Array], books: Books, scale: jax.Array, fmt: Format) -> list[object]:
  return [
    Codebook(
      i.astype(jnp.uint8 if len(book) <= 256 else jnp.uint16),
      book.astype(fmt.elem.dtype),
      scale,
      axis=-1,
    )
    for i, book in zip(index, books)
  ]


def _rows(rest: jax.Array, kept: jax.Array, few: int) -> Sparse:
  (at,) = jnp.nonzero(kept, size=few)
  like = jnp.zeros((len(kept), 0))
  return Sparse(at.astype(jnp.int32), rest[at].astype(jnp.float16), like)


def _rms(rows: jax.Array) -> jax.Array:
  """Root mean square of each row, [K, 1]; 1 for a row of zeros."""
  scale = jnp.sqrt(jnp.square(rows).mean(-1, keepdims=True))
  return jnp.where(scale == 0, 1, scale)
