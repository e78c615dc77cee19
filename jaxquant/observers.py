"""Observers: of some candidate ranges of a block, the one whose quantization costs least.

One search, `observe`, behind every rule of the field that is a search: the MSE grids of the GPTQ
family, percentiles, AWQ's clipping, the two grains of DGQ. They differ in three parts:

| part | choices |
|---|---|
| how a candidate narrows the blocks | `shrunk` (times p), `clamped` (to p max abs x) |
| what an error costs | `power_error` (weighted or not), `gram_error` (of the outputs) |
| which p are tried | any |
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxquant.encoding import encode
from jaxquant.formats import Format, Grid
from jaxquant.rounding import round_to
from jaxquant.scales import ScaleRule, Scales, absmax, parametrised
from jaxquant.tensor import QTensor, amax, per_block, reciprocal, rounded, scale_values

Narrow = Callable[[jax.Array, jax.Array], jax.Array]  # (blocks, p) -> blocks that the rule sees
Error = Callable[[jax.Array], jax.Array]  # differences [..., A, r, B, c] -> cost [..., A, B]


def shrunk(blocks: jax.Array, p: jax.Array) -> jax.Array:
  """The blocks times p: both ends of an asymmetric range shrink alike."""
  return blocks * p


def clamped(blocks: jax.Array, p: jax.Array) -> jax.Array:
  """The blocks within +-p max |x|: the longer end of a range gives way first (arXiv:2306.00978)."""
  bound = per_block(p * amax(blocks))
  return jnp.clip(blocks, -bound, bound)


def power_error(norm: float = 2.0, weights: jax.Array | float = 1.0) -> Error:
  """Sum of weights |x^ - x|^norm over each block.

  Args:
    norm: exponent.
    weights: broadcastable to the blocks; the diagonal of a Hessian is [A, r, 1, 1].
  """

  def error(d: jax.Array) -> jax.Array:
    cost = jnp.square(d) if norm == 2 else jnp.abs(d) ** norm
    return (cost * weights).sum((-3, -1))

  return error


def gram_error(gram: jax.Array) -> Error:
  """d^T G d of each block: the squared error of its partial output x d, for G = X^T X.

  Args:
    gram: float32 [A, r, r], the diagonal blocks of a Hessian (`diagonal_blocks`).
  """

  def error(d: jax.Array) -> jax.Array:
    d = jax.lax.optimization_barrier(d)  # else XLA:CPU decodes again inside the product: 2.5 times
    return jax.lax.platform_dependent(gram, d, cpu=_one_by_one, default=_at_once)

  return error


def _at_once(gram: jax.Array, d: jax.Array) -> jax.Array:
  pushed = jnp.einsum("ais,asbc->aibc", gram, d, precision=jax.lax.Precision.HIGHEST)
  return (pushed * d).sum((-3, -1))


def _one_by_one(gram: jax.Array, d: jax.Array) -> jax.Array:
  """Block after block: XLA:CPU takes 2 to 3 times as long for the batched product."""

  def one(operands: tuple[jax.Array, jax.Array]) -> jax.Array:
    g, mine = operands
    flat = mine.reshape(mine.shape[0], -1)
    pushed = jnp.matmul(g, flat, precision=jax.lax.Precision.HIGHEST)
    return (pushed * flat).sum(0).reshape(mine.shape[1:]).sum(-1)

  return jax.lax.map(one, (gram, d))


def diagonal_blocks(hessian: jax.Array, size: int) -> jax.Array:
  """The blocks of `size` channels on the diagonal of H [K, K], [K/size, size, size].

  A ragged tail is filled with zeros: what `to_blocks` repeats there costs nothing.

  Example:
    >>> diagonal_blocks(jnp.arange(9.0).reshape(3, 3), 2).tolist()
    [[[0.0, 1.0], [3.0, 4.0]], [[8.0, 0.0], [0.0, 0.0]]]
  """
  pad = -hessian.shape[0] % size
  h = jnp.pad(hessian, ((0, pad), (0, pad)))
  n = h.shape[0] // size
  at = jnp.arange(n)
  return h.reshape(n, size, n, size)[at, :, at]


def observe(
  blocks: jax.Array,
  fmt: Format,
  start: ScaleRule = absmax,
  *,
  ratios: Sequence[float] | jax.Array,
  narrow: Narrow = shrunk,
  error: Error | None = None,
) -> Scales:
  """The scales of `start` for the candidate range that costs least, block by block.

      min over p of error(decode(encode(blocks; start(narrow(blocks, p)))) - blocks)

  A candidate's scale is stored before it is judged. Where scales have scales of their own (NVFP4,
  double quantization), that level is the one of the first candidate for all: blocks that share it
  choose different p. Candidates are tried one after the other, so memory does not grow with them.

  Args:
    blocks: float32 [..., A, r, B, c].
    fmt: the format.
    start: the rule; it sees the narrowed blocks.
    ratios: the candidates p, [C]; the first wins ties.
    narrow: how p acts.
    error: cost of the differences; by default their squares.

  Returns:
    Scales to encode the blocks themselves with; what lies outside of the range saturates.

  Example:
    >>> from jaxquant.formats import Format, int_grid
    >>> x = jnp.array([1.0, 1.0, 2.0]).reshape(1, 3, 1, 1)
    >>> observe(x, Format(int_grid(2)), ratios=(1.0, 0.75, 0.5)).scale.tolist()
    [[1.5]]
  """
  error = error or power_error()
  ratios = jnp.asarray(ratios, jnp.float32)
  store = _store(start(narrow(blocks, ratios[0]), fmt).scale, blocks, fmt)

  def attempt(p: jax.Array) -> tuple[jax.Array, Scales]:
    s = start(narrow(blocks, p), fmt)
    if isinstance(s.scale, QTensor):  # its multiplier belongs to its own second level
      s = s._replace(multiplier=None)
    s = s._replace(scale=store(scale_values(s.scale)))
    return error(_decoded(blocks, s._replace(scale=store.values(s.scale)), fmt) - blocks), s

  def keep(best: tuple, p: jax.Array) -> tuple:
    new = attempt(p)
    return jax.tree.map(lambda a, b: jnp.where(new[0] < best[0], a, b), new, best), None

  found = jax.lax.scan(keep, attempt(ratios[0]), ratios[1:])[0][1]
  return found._replace(scale=store.whole(found.scale))


@dataclasses.dataclass(frozen=True)
class _Store:
  """Float scales -> what their storage keeps of them, and back."""

  grid: Grid | None = None
  level: QTensor | None = None  # codes of some scales; those of others replace them

  def __call__(self, scale: jax.Array) -> jax.Array:
    """What is stored, [..., A, B]."""
    if self.level is None:
      return scale if self.grid is None else round_to(scale, self.grid)
    fmt = dataclasses.replace(self.level.fmt, scale=None)  # its scales come as values
    level = Scales(scale_values(self.level.scale), self.level.zero_point, self.level.offset)
    return encode(scale, fmt, axis=self.level.axis, scales=level).data

  def whole(self, stored: jax.Array) -> jax.Array | QTensor:
    """The scale as a `Scales` has it."""
    return stored if self.level is None else dataclasses.replace(self.level, data=stored)

  def values(self, stored: jax.Array) -> jax.Array:
    """float32 scales."""
    return scale_values(self.whole(stored))


def _store(first: jax.Array | QTensor, blocks: jax.Array, fmt: Format) -> _Store:
  if isinstance(first, QTensor):
    return _Store(level=first)
  if isinstance(fmt.scale, Format):
    along_rows = blocks.shape[-3] == 1 and blocks.shape[-1] > 1  # blocks of activations
    return _Store(level=encode(first, fmt.scale, axis=-1 if along_rows else -2))
  return _Store(grid=fmt.scale)


def _decoded(blocks: jax.Array, s: Scales, fmt: Format) -> jax.Array:
  """What the blocks become under float32 scales."""
  offset = 0 if s.offset is None else per_block(s.offset)
  zero = 0 if s.zero_point is None else per_block(s.zero_point)
  multiplier = reciprocal(s.scale) if s.multiplier is None else s.multiplier
  t = (blocks - offset) * per_block(multiplier)
  t = t if s.zero_point is None else jnp.round(t) + zero
  return rounded((round_to(t, fmt.elem) - zero) * per_block(s.scale)) + offset


@parametrised
def mse(
  start: ScaleRule = absmax, *, candidates: int = 80, shrink: float = 0.8, norm: float = 2.4
) -> ScaleRule:
  """The best of the ranges p = 1 - shrink i / candidates, by sum |x^ - x|^norm.

  The observer of the GPTQ family (arXiv:2210.17323, code: 80 candidates; FP-Quant, the code of
  arXiv:2509.23202: 100).

  Args:
    start: the rule for p = 1; it sees the blocks multiplied by p.
    candidates: how many values of p.
    shrink: how far p goes down.
    norm: exponent of the error.
  """
  ratios = tuple(1 - shrink * i / candidates for i in range(candidates))

  def rule(blocks: jax.Array, fmt: Format) -> Scales:
    return observe(blocks, fmt, start, ratios=ratios, error=power_error(norm))

  return rule


@parametrised
def percentile(share: float, start: ScaleRule = absmax) -> ScaleRule:
  """Range up to a quantile of the magnitudes in each block; what lies above saturates.

  Args:
    share: of the elements that stay inside, 0 to 1, with linear interpolation.
    start: the rule that sees the clipped blocks.
  """

  def rule(blocks: jax.Array, fmt: Format) -> Scales:
    magnitude = jnp.moveaxis(jnp.abs(blocks), -3, -2)
    flat = magnitude.reshape(*magnitude.shape[:-2], -1)
    bound = per_block(jnp.quantile(flat, share, axis=-1))
    return start(jnp.clip(blocks, -bound, bound), fmt)

  return rule


@parametrised
def smoothed(sharpness: float, start: ScaleRule = absmax) -> ScaleRule:
  """Range up to a soft maximum of each block, sum_i p_i |x_i|, p = softmax(sharpness |x| / amax).

  It lies between the mean magnitude (sharpness 0) and amax (infinite), scales with x, and has a
  gradient with respect to every element, not the largest alone (arXiv:2509.17791 smooths absmax;
  this form and its parameter are ours). What lies above saturates.

  Args:
    sharpness: inverse temperature, of magnitudes relative to amax.
    start: the rule that sees the clipped blocks.
  """

  def rule(blocks: jax.Array, fmt: Format) -> Scales:
    magnitude = jnp.abs(blocks)
    p = jax.nn.softmax(sharpness * magnitude * per_block(reciprocal(amax(blocks))), (-3, -1))
    bound = per_block((p * magnitude).sum((-3, -1)))
    return start(jnp.clip(blocks, -bound, bound), fmt)

  return rule
