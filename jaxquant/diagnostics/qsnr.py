"""Integers against floats, block by block: the theory of arXiv:2510.25602 beside a measurement.

The quality of a format is its QSNR = -10 log10(sum (x^ - x)^2 / sum x^2) in dB. What decides
between an integer and a float of the same width is the crest factor of a block, k = max |x| / rms:
an integer spreads its levels evenly up to the maximum, so its error grows with k^2; a float keeps
a relative precision, so its error is nearly constant until small values meet its subnormals.

    INT-b:  (r k)^2 / (12 * 4^(b-1))
    FP:     a P_normal + b (r k)^2 P_subnormal + P_zero      (see `float_error`)

r >= 1 is what the storage of the scale costs: 1.5 for powers of two rounded up, 1.05 for E4M3.
Elements are normal with unit rms. Theory is float64 numpy; measurements are those of `encode`.

A block of 32 has k <= sqrt(32) = 5.66 and MXINT8 wins below 7.54: no data at all lets MXFP8 win in
this theory. Where it is off: integers have 2^(b-1) - 1 steps up to the maximum, not 2^(b-1), which
is 1.16 dB less at 4 bits, .28 at 6, .07 at 8.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.special import ndtr

from jaxquant.encoding import encode
from jaxquant.formats import E8M0, FloatGrid, Format, UniformGrid
from jaxquant.ops.hadamard import rotate
from jaxquant.scales import ScaleRule, ocp_ceil
from jaxquant.tensor import dequantize

POWER_OF_TWO, E4M3_SCALE = 1.5, 1.05  # r: the paper's; the rms of 2^ceil(e) / 2^e is 1.47


def crest_factor(x: jax.Array, block: int) -> jax.Array:
  """Largest magnitude over rms of each block along the last axis, from 1 to sqrt(block).

  Args:
    x: [..., K], block divides K.
    block: elements that share a scale.

  Returns:
    float32 [..., K / block]; 1 for a block of zeros.

  Example:
    >>> crest_factor(jnp.array([[0.0, 0, 0, 3, 1, -1, 1, 1]]), 4).tolist()
    [[2.0, 1.0]]
  """
  blocks = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, block)
  largest = jnp.abs(blocks).max(-1)
  unit = blocks / jnp.where(largest == 0, 1, largest)[..., None]
  rms = jnp.sqrt(jnp.square(unit).mean(-1))
  return 1 / jnp.where(largest == 0, 1, rms)


def qsnr(x: jax.Array, quantized: jax.Array) -> jax.Array:
  """-10 log10(sum (x^ - x)^2 / sum x^2), in dB, of all elements together. float32 scalar.

  Example:
    >>> round(float(qsnr(jnp.array([3.0, 4.0]), jnp.array([3.5, 4.0]))), 4)
    20.0
  """
  return -10 * jnp.log10(jnp.square(quantized - x).sum() / jnp.square(x).sum())


def measured(
  x: jax.Array, fmt: Format, *, rule: ScaleRule | None = None, rotation: int | None = None
) -> jax.Array:
  """QSNR of x [M, K] in a format, blocks along K.

  Args:
    x: float.
    fmt: the format.
    rule: of the scales. Default: the paper's, which rounds powers of two up (`ocp_ceil`).
    rotation: block of a Hadamard rotation along K first. It is orthogonal, so the error is that of
      x itself.
  """
  rule = rule or (ocp_ceil if fmt.scale == E8M0 else None)
  x = x if rotation is None else rotate(x, rotation)
  return qsnr(x, dequantize(encode(x, fmt, axis=-1, rule=rule)))


def int_error(bits: int, crest: ArrayLike, overhead: float) -> np.ndarray:
  """(r k)^2 / (12 * 4^(b-1)): steps of r k / 2^(b-1), each with a uniform error (theorem 1).

  In dB: 10.79 + 6.02 (b - 1) - 20 log10(r) - 20 log10(k).

  Args:
    bits: b.
    crest: k.
    overhead: r.

  Returns:
    E (x^ - x)^2 of elements with unit rms.
  """
  return np.square(overhead * np.asarray(crest, np.float64)) / (12 * 4.0 ** (bits - 1))


def float_error(
  grid: FloatGrid, crest: ArrayLike, overhead: float, *, exact_maximum: bool = False
) -> np.ndarray:
  """Error a w_n + b (r k)^2 p_s + w_0: normal values, subnormal ones, and those that become zero.

      a = 1 / (24 * 4^M),  b = 2^(2 (1 - B - M)) / (12 max^2),  t_0 = (r k / max) 2^(-B - M),
      t_1 = (r k / max) 2^(1 - B),  w_n = 2 (t_1 phi(t_1) + 1 - Phi(t_1)),
      p_s = 2 (Phi(t_1) - Phi(t_0)),  w_0 = 2 Phi(t_0) - 1 - 2 t_0 phi(t_0)

  with M mantissa bits and bias B (theorem 2).

  Args:
    grid: of the elements.
    crest: k.
    overhead: r.
    exact_maximum: the largest of 16 elements, k^2 / 16 of the power, has no error: true if its
      scale is (almost) amax / max.

  Returns:
    E (x^ - x)^2 of elements with unit rms.
  """
  k, m, bias = np.asarray(crest, np.float64), grid.mantissa, grid.bias
  unit = overhead * k / grid.max  # the scale
  zero, normal = unit * 2.0 ** (-bias - m), unit * 2.0 ** (1 - bias)
  above = 2 * (normal * _density(normal) + 1 - ndtr(normal))
  if exact_maximum:
    above = np.maximum(0, above - k**2 / 16)
  lost = 2 * ndtr(zero) - 1 - 2 * zero * _density(zero)
  spacing = unit * 2.0 ** (1 - bias - m)
  subnormal = spacing**2 / 12 * 2 * (ndtr(normal) - ndtr(zero))
  return above / (24 * 4.0**m) + subnormal + lost


def _density(t: np.ndarray) -> np.ndarray:
  return np.exp(-np.square(t) / 2) / np.sqrt(2 * np.pi)


def expected_error(fmt: Format, crest: ArrayLike) -> np.ndarray:
  """Relative squared error of a block with crest factor k in a format, by the formulas above.

  Formats whose scale is not a power of two have an exact maximum: 1 / block less for integers.

  Args:
    fmt: integers or floats, with a block.
    crest: k, any shape.

  Raises:
    ValueError: for tables (NF4), asymmetric formats and blocks of a whole axis, which the theory
      does not cover.
  """
  if fmt.zero_point or fmt.offset or fmt.block is None:
    raise ValueError(f"the theory is of symmetric blocks along K, {fmt} is not; measure it instead")
  nearest = fmt.scale != E8M0
  overhead = E4M3_SCALE if nearest else POWER_OF_TWO
  if isinstance(fmt.elem, FloatGrid):
    return float_error(fmt.elem, crest, overhead, exact_maximum=nearest)
  if not isinstance(fmt.elem, UniformGrid):
    raise ValueError(f"the theory is of integers and floats, not of {fmt.elem.name}; measure it")
  return int_error(fmt.elem.bits, crest, overhead) * (1 - nearest / fmt.block)


def expected_qsnr(fmt: Format, crest: ArrayLike) -> np.ndarray:
  """The theory's QSNR in dB at a crest factor.

  Example:
    >>> from jaxquant import formats as F
    >>> [round(float(expected_qsnr(f, 2.5)), 1) for f in (F.MXINT8, F.MXFP8, F.NVINT4, F.NVFP4)]
    [41.5, 31.9, 20.8, 21.3]
  """
  return -10 * np.log10(expected_error(fmt, crest))


def predicted(x: jax.Array, fmt: Format) -> float:
  """QSNR of x [M, K] that the theory expects from the crest factors and powers of its blocks.

      -10 log10(sum_b P_b e(k_b) / sum_b P_b),  P_b the power of block b

  What `measured` finds differs as far as the elements inside a block are not normal.
  """
  crest = np.asarray(crest_factor(x, fmt.block), np.float64)
  power = np.square(np.asarray(x, np.float64).reshape(*crest.shape, fmt.block)).sum(-1)
  return float(-10 * np.log10((power * expected_error(fmt, crest)).sum() / power.sum()))


def crossover(integer: Format, floating: Format, lo: float = 1.2, hi: float = 20.0) -> float:
  """The crest factor below which the integer format has the higher QSNR, above which the float has.

  Args:
    integer: an integer format.
    floating: the float format of the same width.
    lo: crest factor at which the integer wins.
    hi: crest factor at which the float wins.

  Raises:
    ValueError: if the order at `lo` and `hi` is not that.

  Example:
    >>> from jaxquant import formats as F
    >>> round(crossover(F.NVINT4, F.NVFP4), 2)
    2.39
  """
  ahead = lambda k: float(expected_qsnr(integer, k) - expected_qsnr(floating, k))
  if not ahead(lo) > 0 > ahead(hi):
    raise ValueError(
      f"crossover: {integer} must win at {lo} and {floating} at {hi}; "
      f"{integer} is {ahead(lo):+.2f} and {ahead(hi):+.2f} dB ahead. Choose other ends"
    )
  return brentq(ahead, lo, hi)
