"""One contraction over K, lhs [M, K] @ rhs [K, N], of operands that are arrays or QTensors.

The backward GEMMs contract other axes (x^T g, g w^T): each operand says where its K lies, -1 or -2,
and is quantized in the layout that it has.

There are few ways to do it, each exact in its own sense, and `dispatch.choose` picks one from
formats, shapes and backend alone: never from whether the rhs came packed. That is why fake quant
and packed weights give the same bits.

| path | when | arithmetic |
|---|---|---|
| integer | integer elements, scales constant along K | int32 sums, scaled once |
| unit | element x block scale has <= 8 significant bits | bf16 products are exact, f32 sums |
| rows | few rows of lhs on CPU | blocks of K are decoded one by one: no float copy of the weight |
| dense | else | dequantize, cast to the compute dtype, dot |
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxquant.formats import FloatGrid, Format, Grid, UniformGrid
from jaxquant.ops.backend import backend
from jaxquant.tensor import (
  QTensor,
  dequantize,
  from_blocks,
  per_block,
  scale_values,
  to_blocks,
  unpack,
)

Operand = jax.Array | QTensor


class Axes(NamedTuple):
  """Where the contraction lies: lhs is [M, K] for -1 and [K, M] for -2, rhs [K, N] for -2."""

  lhs: int = -1
  rhs: int = -2


def matmul(a: jax.Array, b: jax.Array, axes: Axes, out: jnp.dtype) -> jax.Array:
  """Contraction of two arrays with sums in `out`; float32 operands keep float32 products on TPU."""
  dims = (((axes.lhs + 2,), (axes.rhs + 2,)), ((), ()))
  highest = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return jax.lax.dot_general(a, b, dims, precision=highest, preferred_element_type=out)


def narrow_matmul(a: jax.Array, b: jax.Array, axes: Axes, out: jnp.dtype) -> jax.Array:
  """`matmul` of int8 or bf16 operands, which XLA:CPU multiplies fast only as [M, K] @ [K, N].

  Any other layout is widened first (int8 1024^3: 22 ms instead of 2.3), and a plain transpose in
  front of a dot is folded back into it. So the transposed operand gets its rows in another order,
  which no dot can absorb, and the result is put in order again. The barrier keeps the quantizer
  out of the transpose, whose fused form reads column by column (7 times slower).
  """
  if backend() != "cpu" or axes == Axes():
    return matmul(a, b, axes, out)
  if axes.lhs == -2 and a.shape[1] % _STRIPE == 0:
    y = matmul(_transposed_columns(a), b, Axes(-1, axes.rhs), out)
    return y.reshape(_STRIPE, -1, y.shape[1]).swapaxes(0, 1).reshape(y.shape)
  if axes.rhs == -1 and b.shape[0] % _STRIPE == 0:
    y = matmul(a, _transposed_rows(b), Axes(axes.lhs, -2), out)
    return y.reshape(y.shape[0], _STRIPE, -1).swapaxes(1, 2).reshape(y.shape)
  return matmul(a, b, axes, out)


_STRIPE = 8  # any size from 2 to 128 measures the same


def _transposed_columns(a: jax.Array) -> jax.Array:
  """[K, M] -> [M, K] with its M rows in the order 0, s, 2s, ... 1, s + 1, ... (s = _STRIPE)."""
  k, m = a.shape
  stripes = jax.lax.optimization_barrier(a).reshape(k, m // _STRIPE, _STRIPE)
  return stripes.transpose(2, 1, 0).reshape(m, k)


def _transposed_rows(b: jax.Array) -> jax.Array:
  """[N, K] -> [K, N] with its N columns in the order of `_transposed_columns`."""
  n, k = b.shape
  stripes = jax.lax.optimization_barrier(b).reshape(n // _STRIPE, _STRIPE, k)
  return stripes.transpose(2, 1, 0).reshape(k, n)


def dense(x: Operand, dtype: jnp.dtype) -> jax.Array:
  """The operand as an array in the compute dtype."""
  return (dequantize(x) if isinstance(x, QTensor) else x).astype(dtype)


def by_dense(lhs: Operand, rhs: Operand, axes: Axes, dtype: jnp.dtype) -> jax.Array:
  """Dequantize both, cast to the compute dtype, dot. float32 [M, N]."""
  return matmul(dense(lhs, dtype), dense(rhs, dtype), axes, jnp.float32)


def outer_scale(lhs: jax.Array | float, rhs: jax.Array | float, axes: Axes) -> jax.Array:
  """Product of two scales that are constant along K, broadcastable to [M, N]."""
  lhs = lhs.T if axes.lhs == -2 and not isinstance(lhs, float) else lhs
  return lhs * (rhs.T if axes.rhs == -1 and not isinstance(rhs, float) else rhs)


# --- integer -------------------------------------------------------------------------------------


def constant_scale(q: Operand) -> bool:
  """Whether q is value = data * scale with one float32 scale along the whole of K."""
  return (
    isinstance(q, QTensor)
    and q.fmt.block is None
    and not (q.fmt.zero_point or q.fmt.offset)
    and not isinstance(q.fmt.scale, Format)
  )


def is_integer(q: Operand) -> bool:
  """Whether `by_integer` can take q."""
  return constant_scale(q) and isinstance(q.fmt.elem, UniformGrid) and q.fmt.elem.step in (1.0, 2.0)


def by_integer(lhs: QTensor, rhs: QTensor, axes: Axes) -> jax.Array:
  """(int8 @ int8 -> int32) * scales. float32 [M, N]."""
  lhs, rhs = unpack(lhs), unpack(rhs)
  total = narrow_matmul(lhs.data.astype(jnp.int8), rhs.data.astype(jnp.int8), axes, jnp.int32)
  return total.astype(jnp.float32) * outer_scale(
    scale_values(lhs.scale), scale_values(rhs.scale), axes
  )


# --- unit: exact in bf16 -------------------------------------------------------------------------


def significant_bits(grid: Grid) -> int:
  """Bits of the significand that the values of a grid need; 24 for tables."""
  if isinstance(grid, FloatGrid):
    return grid.mantissa + 1
  if isinstance(grid, UniformGrid):
    return round(max(grid.hi, -grid.lo) / grid.step).bit_length()
  return 24


def is_unit(q: Operand) -> bool:
  """Whether element times low-precision block scale fits bf16, float32 scales being outside."""
  if not isinstance(q, QTensor):
    return False
  fmt = q.fmt
  if fmt.zero_point or fmt.offset:
    return False
  elem = significant_bits(fmt.elem)
  if constant_scale(q):
    return elem <= 8
  scale = fmt.scale.elem if isinstance(fmt.scale, Format) else fmt.scale
  if scale is None or (isinstance(fmt.scale, Format) and fmt.scale not in _along_k(scale)):
    return False
  bits = significant_bits(scale)
  return elem + bits - (bits == 1) <= 8


def _along_k(elem: Grid) -> tuple[Format, Format]:
  """Scales with one float32 for all of K: per tensor, or per row of x and column of w."""
  return Format(elem, None, None), Format(elem)


def unit_values(q: QTensor) -> tuple[jax.Array, jax.Array | float]:
  """(bf16 values, float32 scale that is constant along K), whose product is q, exactly."""
  q = unpack(q)
  if constant_scale(q):
    return q.data.astype(jnp.bfloat16), scale_values(q.scale)
  inner, outer = (q.scale.data, q.scale.scale) if isinstance(q.scale, QTensor) else (q.scale, 1.0)
  blocks = to_blocks(q.data, q.fmt, q.axis) * per_block(inner)
  return from_blocks(blocks, q.data.shape).astype(jnp.bfloat16), outer


def by_unit(lhs: QTensor, rhs: QTensor, axes: Axes) -> jax.Array:
  """bf16 @ bf16 with exact products and float32 sums, then the float32 scales. float32 [M, N]."""
  (a, sa), (b, sb) = unit_values(lhs), unit_values(rhs)
  return narrow_matmul(a, b, axes, jnp.float32) * outer_scale(sa, sb, axes)
