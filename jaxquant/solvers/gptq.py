"""GPTQ: quantize row after row of w [K, N], and let the rows that are left absorb each error.

Nested loops, none of them in Python: lazy blocks of rows, groups of the format in a block (whose
scale is found when they are due), panels in a group, rows in a panel. Entering a block, group or
panel costs one matrix product; only rows are updated one by one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxquant.encoding import encode
from jaxquant.formats import Format
from jaxquant.scales import ScaleRule, Scales, default_rule
from jaxquant.solvers.cholesky import dead_channels, error_feedback, matmul_f32
from jaxquant.tensor import QTensor, dequantize, scale_values, to_blocks

PANEL = 16  # rows updated one by one; 128 took twice as long (K=1024, N=4096, 2 cores)

Out = Any  # what travels with the errors: a tree of arrays
Chunk = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Out]]
RowScales = Callable[[jax.Array], Scales]  # row -> scales [1, N / block_n]


class Stored(NamedTuple):
  """What a QTensor keeps of one group, each [1, N / block_n]."""

  scale: jax.Array
  zero_point: jax.Array | None
  offset: jax.Array | None


class Factor(NamedTuple):
  """What `gptq` needs of a Hessian, found once for all weights that meet the same inputs.

  Attributes:
    feedback: float32 [K, K] from `error_feedback`, in the order of `perm`.
    dead: bool [K], channels that were zero for all tokens.
    perm: int32 [K], the order to take channels in, with all scales found in w; or None.
  """

  feedback: jax.Array
  dead: jax.Array
  perm: jax.Array | None


# (rows of a group, its first row) -> scales to quantize with, scales to store
GroupScales = Callable[[jax.Array, jax.Array], tuple[Scales, Stored]]


@functools.partial(jax.jit, static_argnames=("fmt", "rule", "block", "order", "static_groups"))
def gptq(
  w: jax.Array,
  hessian: jax.Array | Factor,
  fmt: Format,
  *,
  rule: ScaleRule | None = None,
  damp: float = 0.01,
  block: int = 128,
  order: bool = False,
  static_groups: bool = False,
) -> QTensor:
  """Error feedback along K. Lowers tr(dW^T H dW), dW = dequantize(q) - w.

      e_k = w_k - Q(w_k);  w_j <- w_j - V_kj e_k for j > k,  V from `error_feedback`

  arXiv:2210.17323, algorithm 1; act-order with static groups as in arXiv:2509.23202. Scales of a
  group come from its weights at the moment its first row is due, except where one scale spans K,
  with `static_groups` or with `order`: then from w. A second-level scale (NVFP4, double
  quantization) always comes from w. Weights of dead channels (H_kk = 0) become zero.

  Args:
    w: [K, N].
    hessian: X^T X, float32 [K, K], of any positive scale; or what `factor` made of it with the
      same options, of which `damp`, `order` and `static_groups` then do nothing here.
    fmt: any Format.
    rule: how scales are found; by default the one that the format implies.
    damp: added to the diagonal, relative to its mean; grows if H is not positive definite.
    block: rows per lazy update, rounded to whole groups. Speed only.
    order: take channels by falling H_kk; implies static groups, which stay contiguous.
    static_groups: find all scales in w before any error is fed back.

  Returns:
    QTensor of grid values; all NaN if H has no usable factor (see `error_feedback`), and NaN from a
    non-finite weight downwards in its column.

  Raises:
    ValueError: if shapes do not fit. Stacked layers go through `jax.vmap`.

  Example:
    >>> import jax, jax.numpy as jnp, jaxquant as jq
    >>> from jaxquant.statistics import hessian
    >>> x = jax.random.normal(jax.random.key(0), (64, 4)) @ jnp.tri(4)
    >>> w = jax.random.normal(jax.random.key(1), (4, 8))
    >>> q, r = gptq(w, hessian(x), jq.formats.INT4), jq.encode(w, jq.formats.INT4)
    >>> bool(proxy_loss(w, q, hessian(x)) < proxy_loss(w, r, hessian(x)))
    True
  """
  given = isinstance(hessian, Factor)
  _check(w, hessian.feedback if given else hessian)
  options = {"damp": damp, "order": order, "static_groups": static_groups}
  found = hessian if given else factor(hessian, **options)
  w = w.astype(jnp.float32)
  w = jnp.where(found.dead[:, None] & jnp.isfinite(w), 0, w)
  return feed_back(w, found.feedback, fmt, rule=rule, block=block, perm=found.perm)


def factor(
  hessian: jax.Array,
  *,
  damp: float = 0.01,
  order: bool = False,
  static_groups: bool = False,
  **others: object,
) -> Factor:
  """The half of `gptq` that no weight enters.

  Args:
    hessian: X^T X, float32 [K, K].
    damp: as in `gptq`, like the next two.
    order: take channels by falling H_kk.
    static_groups: find all scales in w.
    **others: options of `gptq` that the factor does not depend on.

  Example:
    >>> import jax.numpy as jnp, jaxquant as jq
    >>> w, h = jnp.array([[3.0], [7.4]]), jnp.array([[2.0, 1.0], [1.0, 2.0]])
    >>> one, two = gptq(w, h, jq.formats.INT4), gptq(w, factor(h), jq.formats.INT4)
    >>> bool((one.data == two.data).all())
    True
  """
  del others
  dead = dead_channels(hessian)
  perm = jnp.argsort(-jnp.diagonal(hessian)) if order else jnp.arange(hessian.shape[0])
  if order:
    hessian = hessian[perm][:, perm]
  return Factor(error_feedback(hessian, damp), dead, perm if order or static_groups else None)


gptq.factor = factor  # `jaxquant.solving.factored` looks for it


def feed_back(
  w: jax.Array,
  feedback: jax.Array,
  fmt: Format,
  *,
  rule: ScaleRule | None = None,
  block: int = 128,
  perm: jax.Array | None = None,
) -> QTensor:
  """`gptq` once its factor is known: solvers with many weights to one Hessian find it once.

  Args:
    w: float32 [K, N], without dead channels.
    feedback: [K, K] from `error_feedback`, in the order of `perm`.
    fmt: any Format.
    rule: how scales are found.
    block: rows per lazy update.
    perm: int32 [K], the order to take channels in, all scales found in w; None: as they come,
      scales found on the way.

  Returns:
    QTensor of grid values; all NaN if feedback is.

  Example:
    >>> import jax.numpy as jnp, jaxquant as jq
    >>> jq.dequantize(feed_back(jnp.array([[3.0], [7.4]]), jnp.eye(2), jq.formats.INT4)).shape
    (2, 1)
  """
  k = w.shape[0]
  w = jnp.where(jnp.isnan(feedback[0, 0]), jnp.nan, w)  # all or nothing
  rule = rule or default_rule(fmt)
  found = _find(w, fmt, rule)
  whole = encode(w, fmt, scales=found)
  size = fmt.block or k
  if perm is None and size < k:
    block = min(max(block // size, 1), -(-k // size)) * size
    scales = _group_scales(w, whole, found, rule, size)
    return _with_moving_scales(w, feedback, whole, scales, size, block)
  perm = jnp.arange(k) if perm is None else perm
  block = min(block, -(-k // PANEL) * PANEL)
  data = _with_fixed_scales(w[perm], feedback, whole, found, perm // size, block)
  return dataclasses.replace(whole, data=data[jnp.argsort(perm)])


@jax.jit
def proxy_loss(w: jax.Array, q: QTensor | jax.Array, hessian: jax.Array) -> jax.Array:
  """The layer's output error relative to its output, tr(dW^T H dW) / tr(W^T H W).

  Args:
    w: [..., K, N].
    q: what stands for w, a QTensor or an array [..., K, N].
    hessian: [..., K, K].

  Returns:
    float32 [...].

  Example:
    >>> import jax.numpy as jnp
    >>> float(proxy_loss(jnp.array([[2.0], [4.0]]), jnp.array([[2.0], [3.0]]), jnp.eye(2)))
    0.05000000074505806
  """
  value = dequantize(q) if isinstance(q, QTensor) else q

  def energy(a: jax.Array) -> jax.Array:
    return (a * matmul_f32(hessian.astype(jnp.float32), a)).sum((-2, -1))

  w = w.astype(jnp.float32)
  return energy(value.astype(jnp.float32) - w) / energy(w)


def _check(w: jax.Array, hessian: jax.Array) -> None:
  if w.ndim != 2 or hessian.shape != (w.shape[0], w.shape[0]):
    raise ValueError(
      f"gptq wants w [K, N] and hessian [K, K], got {list(w.shape)} and {list(hessian.shape)}. "
      "Use jax.vmap for stacked layers."
    )


def _find(w: jax.Array, fmt: Format, rule: ScaleRule) -> Scales:
  """The rule's scales of w [R, N], as `encode` would ask for them."""
  return rule(to_blocks(jnp.where(jnp.isfinite(w), w, 0), fmt, -2), fmt)


def _sweep(rows: jax.Array, push: jax.Array, size: int, solve: Chunk) -> tuple[jax.Array, Out]:
  """Solves rows [R, N] in chunks of `size`, each after the errors of those above were fed to it.

  errors <- solve(rows[chunk] - push[:, chunk]^T errors). Errors that are not made yet are zero, so
  that one product of fixed shape brings a chunk up to date; nested, the products shrink with the
  distance, and the last level has few rows to touch row by row.

  Args:
    rows: [R, N], R a multiple of `size`.
    push: [R, R], unit upper triangular.
    size: rows per chunk.
    solve: (rows [size, N], push [size, size], first row) -> (errors [size, N], anything).

  Returns:
    Errors [R, N], and what else `solve` returned, stacked by chunk.
  """
  if size == rows.shape[0]:
    errors, out = solve(rows, push, jnp.int32(0))
    return errors, jax.tree.map(lambda a: a[None], out)

  def chunk(errors: jax.Array, start: jax.Array) -> tuple[jax.Array, Out]:
    columns = jax.lax.dynamic_slice_in_dim(push, start, size, 1)
    current = jax.lax.dynamic_slice_in_dim(rows, start, size) - matmul_f32(columns.T, errors)
    mine, out = solve(current, jax.lax.dynamic_slice_in_dim(columns, start, size), start)
    return jax.lax.dynamic_update_slice(errors, mine, (start, 0)), out

  return jax.lax.scan(chunk, jnp.zeros_like(rows), jnp.arange(0, rows.shape[0], size))


def _rows(
  rows: jax.Array, push: jax.Array, fmt: Format, scales: RowScales
) -> tuple[jax.Array, jax.Array]:
  """Row by row; errors and grid values [R, N]."""
  one_row = dataclasses.replace(fmt, scale=None)  # scales come as values, already stored

  def row(work: jax.Array, xs: tuple[jax.Array, jax.Array]):
    i, v = xs
    x = jax.lax.dynamic_slice_in_dim(work, i, 1)
    q = encode(x, one_row, scales=scales(i))
    error = x - dequantize(q)
    return work - v[:, None] * error, (error[0], q.data[0])

  return jax.lax.scan(row, rows, (jnp.arange(rows.shape[0]), push))[1]


def _panels(
  rows: jax.Array, push: jax.Array, fmt: Format, scales: RowScales
) -> tuple[jax.Array, jax.Array]:
  """`_rows` in chunks that stay in a core's cache."""

  def solve(rows: jax.Array, push: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _rows(rows, push, fmt, lambda i: scales(start + i))

  errors, data = _sweep(rows, push, math.gcd(rows.shape[0], PANEL), solve)
  return errors, data.reshape(rows.shape)


def _with_fixed_scales(
  w: jax.Array, push: jax.Array, q: QTensor, found: Scales, group: jax.Array, block: int
) -> jax.Array:
  """Grid values [K, N]; row i belongs to group[i] and has the scale that q has for it."""
  values = found._replace(scale=scale_values(q.scale))
  group = jnp.pad(group, (0, block), mode="edge")

  def lazy(rows: jax.Array, push: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
    def scales(i: jax.Array) -> Scales:
      at = group[start + i]
      return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, at, 1), values)

    return _panels(rows, push, q.fmt, scales)

  return _sweep(*_pad(w, push, block), block, lazy)[1].reshape(-1, w.shape[1])[: w.shape[0]]


def _with_moving_scales(
  w: jax.Array, push: jax.Array, q: QTensor, scales: GroupScales, size: int, block: int
) -> QTensor:
  """Each group's scale comes from its rows as they are when their turn comes."""

  def lazy(rows: jax.Array, push: jax.Array, first: jax.Array) -> tuple[jax.Array, Out]:
    def group(rows: jax.Array, push: jax.Array, start: jax.Array) -> tuple[jax.Array, Out]:
      mine, stored = scales(rows, first + start)
      errors, data = _panels(rows, push, q.fmt, lambda i: mine)
      return errors, (data, stored)

    return _sweep(rows, push, size, group)

  k, n = w.shape
  _, (data, stored) = _sweep(*_pad(w, push, block), block, lazy)
  rows = jax.tree.map(lambda a: a.reshape(-1, a.shape[-1])[: -(-k // size)], stored)
  if isinstance(q.scale, QTensor):
    rows = rows._replace(scale=dataclasses.replace(q.scale, data=rows.scale))
  return dataclasses.replace(q, data=data.reshape(-1, n)[:k], **rows._asdict())


def _pad(w: jax.Array, push: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
  """To whole blocks, by rows that push nothing on others and that nothing pushes on."""
  pad = -w.shape[0] % block
  return jnp.pad(w, ((0, pad), (0, 0))), jnp.pad(push, ((0, pad), (0, pad)))


def _group_scales(
  w: jax.Array, q: QTensor, found: Scales, rule: ScaleRule, size: int
) -> GroupScales:
  """Scales of a group from its rows, under the second level that w itself has."""
  fmt, k = q.fmt, w.shape[0]
  top = jnp.max(jnp.abs(w), where=jnp.isfinite(w), initial=0)
  has_second_level = isinstance(found.scale, QTensor)

  def scales(rows: jax.Array, start: jax.Array) -> tuple[Scales, Stored]:
    if k % size:  # a ragged tail repeats its last row, as `to_blocks` does
      rows = rows[jnp.clip(jnp.minimum(jnp.arange(size), k - 1 - start), 0)]
    if has_second_level:  # a second block, with the largest weight, keeps that level at w's
      rows = jnp.concatenate([jnp.clip(rows, -top, top), jnp.full_like(rows, top)])
    s = _find(rows, fmt, rule)
    value = scale_values(s.scale)[:1]
    if isinstance(q.scale, QTensor):
      level = _second_level(q.scale, start // size, value)
      stored, value = level.data, dequantize(level)
    else:
      stored = value = encode(rows, fmt, scales=s).scale
    mine = Scales(value, *(None if a is None else a[:1] for a in s[1:]))
    return mine, Stored(stored, mine.zero_point, mine.offset)

  return scales


def _second_level(whole: QTensor, group: jax.Array, value: jax.Array) -> QTensor:
  """A group's scale [1, B] stored under the second level that was found in all of w."""
  groups = whole.data.shape[-2]
  at = group // min(whole.fmt.block or groups, groups)
  level = Scales(scale_values(whole.scale), whole.zero_point, whole.offset)
  level = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, at, 1), level)
  return encode(value, dataclasses.replace(whole.fmt, scale=None), scales=level)
