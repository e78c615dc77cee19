"""Scale rules whose scales have scales of their own, chosen so that the inner level is cheap.

Each returns a QTensor scale for a format whose `scale` is a Format: integers under one scale per
column (QoQ, DGQ), powers of two under one per column (ZeroQuant-FP), E4M3 under a power of two per
tensor (FireQ) or one float32 per token. The rule of NVFP4 is in `jaxquant.scales`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.formats import Format
from jaxquant.rounding import exponent, power_of_two, round_to
from jaxquant.scales import ScaleRule, Scales, over, parametrised
from jaxquant.tensor import (
  QTensor,
  amax,
  from_blocks,
  maximum,
  minimum,
  per_block,
  reciprocal,
  to_blocks,
)


@parametrised
def progressive(protect: int = 119) -> ScaleRule:
  """Integers of integers: the int4 codes of a group decode to int8 values of their column.

      s = max |w| / protect over the column,  q = round(w / s)
      scale = s max(round((max q - min q) / levels), 1),  zero_point = round(-min q / (scale / s))

  What is rounded to nearest then decodes within [-127, 127] s for protect <= 119: a GEMM on int8
  values needs no saturation (arXiv:2405.04532, section 4.1, the protective range). Codes that error
  feedback has moved need `within_int8`. Codes are rounded from w once, not from q; groups include
  zero.

  Args:
    protect: what the largest magnitude of a column becomes.
  """

  def rule(blocks: jax.Array, fmt: Format) -> Scales:
    outer = over(amax(blocks).max(-2, keepdims=True), protect)
    q = jnp.round(blocks * per_block(reciprocal(outer)))
    lo, hi = jnp.minimum(minimum(q), 0), jnp.maximum(maximum(q), 0)
    inner = jnp.maximum(jnp.round(over(hi - lo, fmt.elem.hi - fmt.elem.lo)), 1)
    zero = jnp.round(-lo / inner) + fmt.elem.lo
    scale = QTensor(inner, outer, fmt=fmt.scale)
    return Scales(scale, zero_point=jnp.clip(zero, fmt.elem.lo, fmt.elem.hi))

  return rule


def within_int8(q: QTensor) -> QTensor:
  """Codes moved to where |(code - zero_point) k| <= 127, k being the integer scale of their block.

  Args:
    q: unpacked, of integers with a zero point under integer scales.
  """
  blocks = to_blocks(q.data, q.fmt, q.axis)
  lo, hi = int8_ends(q.zero_point, q.scale.data, q.fmt)
  return q.replace(data=from_blocks(jnp.clip(blocks, per_block(lo), per_block(hi)), q.data.shape))


def int8_ends(zero_point: jax.Array, inner: jax.Array, fmt: Format) -> tuple[jax.Array, jax.Array]:
  """The smallest and largest code of each block with |(code - zero_point) inner| <= 127, [A, B]."""
  reach = jnp.floor(127 / inner)
  lo, hi = zero_point - reach, zero_point + reach
  return jnp.maximum(lo, fmt.elem.lo), jnp.minimum(hi, fmt.elem.hi)


@parametrised
def halvings(*, clip: bool = False) -> ScaleRule:
  """Scale = S / 2^k: absmax scales s rounded up to the column's largest one, halved k times.

      S = max s over the column,  k = floor(log2(S / s)), at most what the storage holds

  Between blocks of a column an fp4 element is then shifted into fp8, not multiplied (M2 of
  arXiv:2307.09782; its group is a set of rows, here one).

  Args:
    clip: round k up instead: smaller scales, whose largest elements saturate.
  """

  def rule(blocks: jax.Array, fmt: Format) -> Scales:
    s = over(amax(blocks), fmt.elem.max)
    top = s.max(-2, keepdims=True)
    low = np.log2(fmt.scale.elem.min)
    ratio = jnp.where(top > 0, top, 1) / jnp.where(s > 0, s, jnp.where(top > 0, top, 1))
    k = jnp.clip(exponent(ratio), 0, int(-low))
    k = k - (top * power_of_two(-k) < s)  # the quotient may have been rounded up
    if clip:
      k = jnp.clip(k + (top * power_of_two(-k) > s), 0, int(-low))
    return Scales(QTensor(power_of_two(-k), top, fmt=fmt.scale))

  return rule


@parametrised
def per_row(rule: ScaleRule) -> ScaleRule:
  """A rule with a scale per tensor, for each row of x [M, K] as if it were the tensor.

  For formats whose scales have one scale along K, such as NVFP4_ROW: a token's codes then depend on
  that token alone (Transformer Engine's row-scaled activations).

  Args:
    rule: `scales.nvfp4`, `scales.four_over_six`, ...
  """

  def of_rows(blocks: jax.Array, fmt: Format) -> Scales:
    if blocks.shape[-3] != 1:
      raise ValueError(f"per_row is for activations, blocked along axis -1; {fmt} came along -2")
    found = jax.tree.map(lambda a: a.squeeze(-2), rule(jnp.expand_dims(blocks, -4), fmt))
    return found._replace(scale=found.scale.replace(axis=-1))

  return of_rows


def power_of_tensor(blocks: jax.Array, fmt: Format) -> Scales:
  """Scale = e4m3(p amax / max) / p: p is the power of two per tensor that saves small blocks.

      p in 2^0 ... 2^14 with p max amax <= 448;  least sum of max(2^-9 max - p amax, 0), smallest p

  2^-9 is the smallest E4M3 scale, which no block falls below (FireQ, arXiv:2505.20839).
  """
  a = amax(blocks)
  grid, least = fmt.scale.elem, fmt.scale.elem.values()
  least = float(least[least > 0].min())
  power = 2.0 ** jnp.arange(15.0).reshape(-1, *[1] * a.ndim)  # [15, ..., 1, 1]
  scaled = a * power
  slack = jnp.maximum(fmt.elem.max * least - scaled, 0).sum((-2, -1), keepdims=True)
  fits = scaled.max((-2, -1), keepdims=True) <= grid.max
  best = jnp.argmin(jnp.where(fits | (power == 1), slack, jnp.inf), 0)
  p = 2.0 ** best.astype(jnp.float32)
  stored = jnp.maximum(round_to(over(a * p, fmt.elem.max), grid), least)
  return Scales(QTensor(stored, 1 / p, fmt=fmt.scale))
