"""Scale rules: blocks of an array -> the scale of each block.

A rule is a pure function (blocks, fmt) -> Scales, where `blocks` is float32 [..., A, r, B, c] and
the result is [..., A, B]. A rule that has parameters is a function that returns a rule.
Formulas: OCP MX v1.0; arXiv:2509.25149 (NVFP4); the papers named at each rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.formats import (
  BF16,
  E2M1,
  E4M3,
  E8M0,
  PER_TENSOR_E4M3,
  PER_TENSOR_E8M0,
  UE5M3,
  FloatGrid,
  Format,
  Grid,
  reciprocal_grid,
)
from jaxquant.named_functions import parametrised
from jaxquant.rounding import Rounding, exponent, floor, nearest_even, power_of_two, round_to
from jaxquant.tensor import (
  F32_MAX,
  F32_TINY,
  QTensor,
  amax,
  maximum,
  minimum,
  per_block,
  reciprocal,
  rounded,
)


class Scales(NamedTuple):
  """What a rule returns; all but `scale` may stay None.

  Attributes:
    scale: float32 [..., A, B]; `encode` rounds it to its storage (unless a QTensor came).
    zero_point: on the element's grid, [..., A, B].
    offset: float32 [..., A, B].
    multiplier: x is multiplied by this; None: by the reciprocal of the stored scale. For published
      kernels that find the multiplier first (the last bit differs).
  """

  scale: jax.Array | QTensor
  zero_point: jax.Array | None = None
  offset: jax.Array | None = None
  multiplier: jax.Array | None = None


ScaleRule = Callable[[jax.Array, Format], Scales]


def over(x: jax.Array, constant: float) -> jax.Array:
  """X / constant for x >= 0, correctly rounded.

  A plain division by a constant becomes a multiplication by its reciprocal inside jit, one ulp off,
  and stays a division outside. A divisor that depends on x is left alone.
  """
  return x / jnp.where(x > 0, np.float32(constant), 1)


def mean(blocks: jax.Array) -> jax.Array:
  """Mean of each block, [..., A, B], by halving: the same bits in every program.

  A compiler orders a reduction as it likes, and one ulp of a scale is another set of codes. A power
  of two keeps the sum from overflowing.
  """
  n = blocks.shape[-3] * blocks.shape[-1]
  power = 2 ** math.ceil(math.log2(n))
  x = blocks * np.float32(1 / power)
  # The long axis first, so that a tile and its transpose are summed alike.
  total = _sum(_sum(x, -3), -1) if x.shape[-3] >= x.shape[-1] else _sum(_sum(x, -1), -2)
  return rounded(total * np.float32(power / n))


def _sum(x: jax.Array, axis: int) -> jax.Array:
  n = x.shape[axis]
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, 2 ** math.ceil(math.log2(n)) - n)
  x = jnp.pad(x, widths)
  while x.shape[axis] > 1:
    low, high = jnp.split(x, 2, axis)
    x = low + high
  return x.squeeze(axis)


def absmax(blocks: jax.Array, fmt: Format) -> Scales:
  """Scale = amax / max of the grid: nothing clips."""
  return Scales(over(amax(blocks), fmt.elem.max))


def unscaled(blocks: jax.Array, fmt: Format) -> Scales:
  """Scale = 1: elements with the range of float32 are rounded as they are (BF16 storage)."""
  del fmt
  return Scales(jnp.ones((*blocks.shape[:-3], blocks.shape[-2])))


def absmax_first(blocks: jax.Array, fmt: Format) -> Scales:
  """As `absmax`, but codes are computed from the scale before it is stored (bitsandbytes).

  Elements then see another scale when they are decoded; `absmax` has the smaller error.
  """
  scale = absmax(blocks, fmt).scale
  return Scales(scale, multiplier=reciprocal(scale))


@parametrised
def clipped(ratio: float) -> ScaleRule:
  """Scale = ratio * amax / max: a range shrunk (ratio < 1 clips) or widened.

  With stochastic rounding a ratio of 17/16 leaves room for the E4M3 rounding of the scale, so that
  no element clips and the result is unbiased (arXiv:2601.22813, Quartet II).
  """

  def rule(blocks: jax.Array, fmt: Format) -> Scales:
    return Scales(over(amax(blocks) * ratio, fmt.elem.max))

  return rule


def absmean(blocks: jax.Array, fmt: Format) -> Scales:
  """Scale = mean |x|: the least-squares scale of sign(x) (arXiv:1603.05279, eq. 6)."""
  return Scales(over(mean(jnp.abs(blocks)), fmt.elem.max))


def minmax(blocks: jax.Array, fmt: Format) -> Scales:
  """Asymmetric: scale = (hi - lo) / (levels - 1), zero_point = round(-lo / scale) + min.

  lo = min(x, 0), hi = max(x, 0): zero is always a level. A scale on a grid is rounded first.
  """
  lo, hi = jnp.minimum(minimum(blocks), 0), jnp.maximum(maximum(blocks), 0)
  scale = _stored(over(hi / 2 - lo / 2, (fmt.elem.hi - fmt.elem.lo) / 2), fmt)
  zero = jnp.round(-lo * reciprocal(scale)) + fmt.elem.lo
  return Scales(scale, zero_point=jnp.clip(zero, fmt.elem.lo, fmt.elem.hi))


def _stored(scale: jax.Array, fmt: Format) -> jax.Array:
  return round_to(scale, fmt.scale) if isinstance(fmt.scale, Grid) else scale


def from_min(blocks: jax.Array, fmt: Format) -> Scales:
  """Offset = min, scale = (max - min) / max of an unsigned grid: x = data * scale + min.

  The asymmetric groups of KIVI (arXiv:2402.02750) and the scales of LQ-LoRA (arXiv:2311.12023). A
  constant block has scale 0 and decodes to its offset exactly.
  """
  lo, hi = minimum(blocks), maximum(blocks)
  return Scales(over(hi / 2 - lo / 2, fmt.elem.max / 2), offset=lo)


def centered(blocks: jax.Array, fmt: Format) -> Scales:
  """Offset = mean, scale = max |x - mean| / max: the second level of NF4 double quantization."""
  offset = mean(blocks)
  return Scales(over(amax(blocks - per_block(offset)), fmt.elem.max), offset=offset)


def ocp_floor(blocks: jax.Array, fmt: Format) -> Scales:
  """Scale = 2^(floor(log2 amax) - emax): the OCP MX rule; elements above max saturate.

  For INT elements emax is that of the grid's largest value, so MXINT8 (max 127/64) has emax 0.
  """
  e = exponent(amax(blocks)) - fmt.elem.emax
  return Scales(power_of_two(jnp.clip(e, -126, 127)))


def ocp_ceil(blocks: jax.Array, fmt: Format) -> Scales:
  """Scale = 2^ceil(log2(amax / max)): never clips (Transformer Engine, arXiv:2506.08027).

  Exact, from the bits: one binade above `ocp_floor` if the mantissa of amax is above that of max.
  """
  return Scales(_ceil_scale(amax(blocks), fmt))


def _ceil_scale(a: jax.Array, fmt: Format) -> jax.Array:
  above = _mantissa_bits(a) > (np.float32(fmt.elem.max).view(np.int32) & 0x7FFFFF)
  return power_of_two(jnp.clip(exponent(a) - fmt.elem.emax + above, -126, 127))


def _mantissa_bits(x: jax.Array) -> jax.Array:
  return jax.lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFF


def ocp_next(blocks: jax.Array, fmt: Format) -> Scales:
  """Scale = 2^(ceil(log2 amax) - emax): torchao's CEIL, which wastes a bit above the last value."""
  a = amax(blocks)
  e = exponent(a) + (_mantissa_bits(a) > 0) - fmt.elem.emax
  return Scales(power_of_two(jnp.clip(e, -126, 127)))


def ocp_round(blocks: jax.Array, fmt: Format) -> Scales:
  """Scale = 2^round(log2(amax / max)), rounded in the exponent (arXiv:2510.25602, option)."""
  return Scales(round_to(over(amax(blocks), fmt.elem.max / math.sqrt(2)), E8M0, floor))


def ocp_even(blocks: jax.Array, fmt: Format) -> Scales:
  """Scale = 2^(floor(log2(amax + half an ulp of the element at amax)) - emax): torchao's EVEN."""
  a = amax(blocks)
  half = power_of_two(jnp.maximum(exponent(a) - _mantissa(fmt.elem) - 1, -126))
  e = exponent(a + jnp.where(a > 0, half, 0)) - fmt.elem.emax
  return Scales(power_of_two(jnp.clip(e, -126, 127)))


def _mantissa(grid: Grid) -> int:
  return grid.mantissa if isinstance(grid, FloatGrid) else grid.bits - 2


def quartet(blocks: jax.Array, fmt: Format) -> Scales:
  """Scale = 2^(floor(log2 amax) - emax) * 4/3: |x / scale| < max, nothing clips.

  Stochastic rounding is then exactly unbiased (arXiv:2505.14669). Scales with a scale of their own
  are stored as the powers of two over 4/3, which leaves the block-scaled GEMM as a constant, 16/9
  for two operands; float32 scales are their product. Raises ValueError for bare E8M0 scales.
  """
  if fmt.scale == E8M0:  # storing would drop the 4/3, in silence
    raise ValueError(f"quartet: {fmt} stores powers of two, which hold no 4/3; use MXFP4_TENSOR")
  power = ocp_floor(blocks, fmt).scale
  if isinstance(fmt.scale, Format):
    return Scales(QTensor(power, jnp.full_like(power[..., :1, :1], 4 / 3), fmt=fmt.scale))
  return Scales(over(power, 0.75))


def quest(blocks: jax.Array, fmt: Format) -> Scales:
  """Scale = 2^floor(log2(c std + 1e-8)), c = 2.92247856 / 6: MSE-optimal E2M1 range of a Gaussian.

  Values clip; the straight-through gradient is masked where |x / scale| >= max (arXiv:2502.05003,
  and the MXFP4 kernel of arXiv:2505.14669). The standard deviation is the population one.
  """
  std = jnp.sqrt(mean(jnp.square(blocks - per_block(mean(blocks)))))
  return Scales(round_to(std * np.float32(2.92247856 / fmt.elem.max) + 1e-8, E8M0, floor))


@parametrised
def rms(ratio: float) -> ScaleRule:
  """Scale = ratio * rms / max: QuEST's integer grids, ratio by bits (arXiv:2502.05003, table 1)."""

  def rule(blocks: jax.Array, fmt: Format) -> Scales:
    return Scales(over(ratio * jnp.sqrt(mean(jnp.square(blocks))), fmt.elem.max))

  return rule


def nvfp4(blocks: jax.Array, fmt: Format, *, bound: float = 448.0, top: float = 6.0) -> Scales:
  """Two levels: s_t = A / (448 * 6); s_b = e4m3(amax * (1 / s_t) / 6); effective s_b * s_t.

  A is the largest magnitude of the tensor. The order of operations is that of Transformer Engine's
  reference, bit for bit: encode scales are multiplied, not divided.

  Args:
    blocks: [..., A, r, B, c].
    fmt: NVFP4 or NVFP4_2D.
    bound: largest E4M3 block scale; four-over-six needs room and uses 256.
    top: what the block maximum is mapped to. 6 * 16/17 leaves room for the rounding of s_b, so that
      nothing clips and stochastic rounding is unbiased (arXiv:2601.22813).

  Returns:
    Scales whose scale is a QTensor (E4M3 codes over one float32) and whose multiplier is exact.
  """
  a = amax(blocks)
  largest = a.max((-2, -1), keepdims=True)
  encode = _encode_scale(largest, bound * top)
  return _nvfp4_scales(a * (encode * np.float32(1 / top)), encode, over(largest, bound * top), fmt)


def _encode_scale(a: jax.Array, top: float) -> jax.Array:
  """Top / a, at most float32 max; 1 for zero."""
  encode = jnp.minimum(np.float32(top) / a, F32_MAX)
  return jnp.where((a == 0) | (encode == 0), 1.0, encode)


def _nvfp4_scales(wanted: jax.Array, encode: jax.Array, tensor: jax.Array, fmt: Format) -> Scales:
  block = round_to(jnp.minimum(wanted, E4M3.max), E4M3, nearest_even)
  effective = block * (1 / encode)  # the reference multiplies by 1 / encode and stores A / 2688
  inverse = jnp.where(effective == 0, 0, 1 / jnp.where(effective == 0, 1, effective))
  return Scales(QTensor(block, tensor, fmt=fmt.scale), multiplier=jnp.minimum(inverse, F32_MAX))


@parametrised
def tensor_scaled(bound: float, rounding: Rounding = nearest_even) -> ScaleRule:
  """Two levels over any scale grid: s_t = A / (max bound), s_b = grid(amax / (max s_t)) <= bound.

  A is the largest magnitude of the tensor, whose block gets the scale `bound` exactly. Bound is the
  largest value of the grid where range is short (E4M3 448, UE5M3 114688), and 1 for E8M0, where
  the tensor scale only aligns the powers of two with A (arXiv:2509.17791, section 3).

  Args:
    bound: the largest block scale, a value of the grid.
    rounding: of the block scales; `ceil` never clips.
  """

  def rule(blocks: jax.Array, fmt: Format) -> Scales:
    a = amax(blocks)
    tensor = over(a.max((-2, -1), keepdims=True), bound * fmt.elem.max)
    wanted = over(a, fmt.elem.max) * reciprocal(tensor)
    block = round_to(jnp.minimum(wanted, bound), fmt.scale.elem, rounding)
    return Scales(QTensor(block, tensor, fmt=fmt.scale))

  return rule


def four_over_six(blocks: jax.Array, fmt: Format, *, norm: int = 2) -> Scales:
  """NVFP4 with block maxima mapped to 6 or to 4, whichever has the lower block error (tie: 6).

  Bound 256 instead of 448, because the second candidate is e4m3(1.5 s_b) (arXiv:2512.02010).

  Args:
    blocks: [..., A, r, B, c].
    fmt: NVFP4.
    norm: of the error: 2 (MSE), or 1 (MAE, what Transformer Engine does by default).
  """
  a = amax(blocks)
  largest = a.max((-2, -1), keepdims=True)
  encode, tensor = _encode_scale(largest, 256 * E2M1.max), over(largest, 256 * E2M1.max)
  wanted = a * (encode * np.float32(1 / 6))
  six = _nvfp4_scales(wanted, encode, tensor, fmt)
  four = _nvfp4_scales(wanted * np.float32(1.5), encode, tensor, fmt)

  def error(s: Scales) -> jax.Array:
    q = round_to(blocks * per_block(s.multiplier), fmt.elem)
    decoded = rounded(q * per_block(s.scale.data) * per_block(tensor))
    return (jnp.abs(decoded - blocks) ** norm).sum((-3, -1))

  better = error(four) < error(six)
  block = jnp.where(better, four.scale.data, six.scale.data)
  multiplier = jnp.where(better, four.multiplier, six.multiplier)
  return Scales(six.scale.replace(data=block), multiplier=multiplier)


def fp8_scale(blocks: jax.Array, fmt: Format) -> Scales:
  """Encode = max / amax (1 for zero, capped at float32 max); x * encode; scale = 1 / encode.

  Transformer Engine's block and current scaling for E4M3 and E5M2.
  """
  encode = _encode_scale(amax(blocks), fmt.elem.max)
  return Scales(1 / encode, multiplier=encode)


def fp8_scale_pow2(blocks: jax.Array, fmt: Format) -> Scales:
  """As `fp8_scale` with encode = 2^floor(log2(max / amax))."""
  encode = _encode_scale(amax(blocks), fmt.elem.max)
  encode = power_of_two(jnp.clip(exponent(encode), -126, 126))
  return Scales(1 / encode, multiplier=encode)


def deepseek(blocks: jax.Array, fmt: Format) -> Scales:
  """Scale = max(amax, 1e-4) / max; 2^ceil(log2 of it) for a format with E8M0 scales.

  The activation kernel of DeepSeek-V3 (arXiv:2412.19437; inference code, `act_quant`).
  """
  a = jnp.maximum(amax(blocks), 1e-4)
  return Scales(_ceil_scale(a, fmt) if fmt.scale == E8M0 else over(a, fmt.elem.max))


@parametrised
def encode_domain(grid: FloatGrid) -> ScaleRule:
  """Stores e = grid(max / amax) and multiplies by it: x^ = q / e.

  Rounding the *encode* scale is another grid than rounding amax / max: `reciprocal_grid(grid)`,
  which is the format's scale grid (arXiv:2505.19115 and its successors).
  """
  smallest = 2.0 ** (grid.emin - grid.mantissa)

  def rule(blocks: jax.Array, fmt: Format) -> Scales:
    wanted = _encode_scale(jnp.maximum(amax(blocks), F32_TINY), fmt.elem.max)
    encode = jnp.maximum(round_to(wanted, grid), smallest)
    return Scales(1 / encode, multiplier=encode)

  return rule


def default_rule(fmt: Format) -> ScaleRule:
  """The rule that the format's definition implies; recipes name others explicitly."""
  if fmt.zero_point:
    return minmax
  if fmt.offset:
    return centered if fmt.elem.min < 0 else from_min
  if fmt.elem == BF16:
    return unscaled
  if fmt.elem.bits == 1:
    return absmean
  if fmt.elem == E2M1 and fmt.scale == PER_TENSOR_E4M3:
    return nvfp4
  return _IMPLIED.get(fmt.scale, absmax)


_UE5M3 = reciprocal_grid(UE5M3)
_IMPLIED = {E8M0: ocp_floor, PER_TENSOR_E8M0: quartet, _UE5M3: encode_domain(UE5M3)}
