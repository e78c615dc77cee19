"""QTensor, and the only place where "value = data * scale" is written.

    value = (data - zero_point) * scale + offset

`data` is either the grid values themselves as float32 (what `encode` returns and fake quantization
uses) or the format's container (`packing.pack`): same tensor, two layouts, one `dequantize`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxquant import packing
from jaxquant.formats import Format, bits_per_value, padding

F32_MAX = float(np.finfo(np.float32).max)
F32_TINY = float(np.finfo(np.float32).tiny)  # smallest normal; below it XLA flushes to zero
LARGEST = 2.0**126  # the largest scale whose reciprocal is a normal float32


@struct.dataclass
class QTensor:
  """A quantized [..., K, N] tensor. Leading axes are free: scan, vmap and indexing just work.

  Attributes:
    data: grid values float32 [..., K, N], or the container (see `jaxquant.packing`).
    scale: [..., K/block, N/block_n] float32, or on the scale's grid, or a QTensor when the scale
      has scales of its own (`fmt.scale` is a Format).
    zero_point: like `scale`, on the element's grid; None for symmetric formats.
    offset: like `scale`, float32; None unless `fmt.offset`.
    fmt: the format. Static, hashable, no shapes: it survives scan, vmap and sharding.
    axis: the contraction axis that blocks run along: -2 for weights, -1 for activations.
    pad: rows the container added to fill its bytes.
  """

  data: jax.Array | tuple[jax.Array, ...]
  scale: jax.Array | QTensor
  zero_point: jax.Array | tuple[jax.Array, ...] | None = None
  offset: jax.Array | None = None
  fmt: Format = struct.field(pytree_node=False, kw_only=True)
  axis: int = struct.field(pytree_node=False, default=-2, kw_only=True)
  pad: int = struct.field(pytree_node=False, default=0, kw_only=True)

  @property
  def packed(self) -> bool:
    """Whether `data` is the container rather than float32 grid values."""
    return isinstance(self.data, tuple) or self.data.dtype != jnp.float32

  @property
  def shape(self) -> tuple[int, ...]:
    """Logical shape [..., K, N]."""
    return packing.logical_shape(self.data, self.fmt.elem, self.axis, self.pad)

  @property
  def ndim(self) -> int:
    """Number of axes, leading ones included."""
    return len(self.shape)

  @property
  def bits_per_value(self) -> float:
    """Stored bits per element of this very shape, scales included."""
    k, n = self.shape[-2:] if self.axis == -2 else self.shape[:-3:-1]
    return bits_per_value(self.fmt, (k, n))

  @property
  def nbytes(self) -> int:
    """Bytes that the tensor takes once packed."""
    return round(self.bits_per_value * math.prod(self.shape) / 8)

  def __repr__(self) -> str:
    """Shape, format, bits and layout on one line."""
    try:
      shape, layout = list(self.shape), "packed" if self.packed else "values"
    except (AttributeError, TypeError):  # a QTensor of shardings or specs has no shape
      return f"QTensor({self.fmt}, data={self.data!r}, scale={self.scale!r})"
    return f"QTensor({self.fmt} {shape}, {self.bits_per_value:.4g} bits per value, {layout})"


def is_qtensor(x: object) -> bool:
  """For `is_leaf=`: tree maps must not see inside (a bf16 cast would hit the codes)."""
  return isinstance(x, QTensor)


def block_sizes(fmt: Format, shape: tuple[int, ...], axis: int) -> tuple[int, int]:
  """Block extents along the last two axes of `shape`, clipped to them."""
  along_k, along_n = (-2, -1) if axis == -2 else (-1, -2)
  size = {along_k: fmt.block, along_n: fmt.block_n}
  return tuple(min(size[a] or shape[a], shape[a]) for a in (-2, -1))


def to_blocks(x: jax.Array, fmt: Format, axis: int) -> jax.Array:
  """View [..., R, C] as blocks [..., R/r, r, C/c, c]; a ragged tail repeats its last element.

  Repeating (not zeros) keeps amax, minimum and maximum of the tail block what they are.
  """
  r, c = block_sizes(fmt, x.shape, axis)
  rows, cols = -x.shape[-2] % r, -x.shape[-1] % c
  if rows or cols:
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, rows), (0, cols)], mode="edge")
  return x.reshape(*x.shape[:-2], x.shape[-2] // r, r, x.shape[-1] // c, c)


def from_blocks(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Inverse of `to_blocks`: drops the tail again."""
  a, r, b, c = blocks.shape[-4:]
  flat = blocks.reshape(*blocks.shape[:-4], a * r, b * c)
  return flat[..., : shape[-2], : shape[-1]] if flat.shape != shape else flat


def per_block(x: jax.Array) -> jax.Array:
  """[..., A, B] -> [..., A, 1, B, 1], to broadcast against `to_blocks`."""
  return x[..., :, None, :, None]


@jax.custom_jvp
def amax(blocks: jax.Array) -> jax.Array:
  """Largest magnitude of each block, float32 [..., A, r, B, c] -> [..., A, B].

  Blocks must be finite: a float maximum on XLA:CPU (jax 0.12.0.1) can drop a NaN.
  """
  on_cpu = functools.partial(
    _split_max, key=lambda bits: bits & 0x7FFFFFFF, value=lambda bits: bits
  )
  return jax.lax.platform_dependent(blocks, cpu=on_cpu, default=_amax)


def _amax(blocks: jax.Array) -> jax.Array:
  return jnp.abs(blocks).max((-3, -1))


@jax.custom_jvp
def maximum(blocks: jax.Array) -> jax.Array:
  """Largest value of each block, as `amax`."""
  return jax.lax.platform_dependent(
    blocks, cpu=functools.partial(_split_max, key=_ordered, value=_ordered), default=_maximum
  )


def _maximum(blocks: jax.Array) -> jax.Array:
  return blocks.max((-3, -1))


def minimum(blocks: jax.Array) -> jax.Array:
  """Smallest value of each block."""
  return -maximum(-blocks)


amax.defjvp(lambda primals, tangents: jax.jvp(_amax, primals, tangents))
maximum.defjvp(lambda primals, tangents: jax.jvp(_maximum, primals, tangents))

_Bits = Callable[[jax.Array], jax.Array]


def _ordered(bits: jax.Array) -> jax.Array:
  """Float32 bits -> integers in the order of the floats, and back."""
  return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _split_max(blocks: jax.Array, key: _Bits, value: _Bits) -> jax.Array:
  """Maximum per block in an order that XLA:CPU vectorizes and fuses: up to 10 times faster.

  `key` turns float32 bits into integers ordered like what is compared, `value` turns them back. An
  integer maximum over at most 16 elements, with 8 lanes or more beside them, is a vectorized loop
  that absorbs what produces its input; a float maximum is a library call, good for long axes, that
  wants its input in memory.
  """
  *lead, a, r, b, c = blocks.shape
  keys = key(jax.lax.bitcast_convert_type(blocks, jnp.int32))
  floats = lambda keys: jax.lax.bitcast_convert_type(value(keys), jnp.float32)
  if r == 1 and 1 < c <= 16:
    return floats(keys.reshape(*lead, a, b, c).max(-1))
  if r == 1 and c % 8 == 0:  # split the lanes of a block
    split = math.gcd(c // 8, 16)
    return floats(keys.reshape(*lead, a, b, split, c // split).max(-2)).max(-1)
  split = math.gcd(r, 16)
  rows = floats(keys.reshape(*lead, a, r // split, split, b * c).max(-2)).max(-2)
  return rows.reshape(*lead, a, b, c).max(-1)


def scale_values(scale: jax.Array | QTensor) -> jax.Array:
  """What the elements are multiplied with, float32 [..., A, B]."""
  return dequantize(scale) if isinstance(scale, QTensor) else scale.astype(jnp.float32)


def rounded(product: jax.Array) -> jax.Array:
  """A product that is about to be added to something, kept at float32.

  Compilers contract a * b + c into one rounding or not, depending on what else is in the loop. They
  cannot see through a clip to the finite range, which costs nothing.
  """
  return jnp.clip(product, -F32_MAX, F32_MAX)


def _factors(scale: jax.Array | QTensor) -> list[jax.Array]:
  """The scale as factors, in the order in which elements are multiplied by them.

  A scale's own scale comes last if all of K shares it, per tensor or per row of x: e2m1 * e4m3 is
  exact, so NVFP4 rounds once, as in a GEMM that applies the tensor scale to its result.
  """
  if not isinstance(scale, QTensor) or scale.fmt.block or scale.fmt.block_n not in (None, 1):
    return [scale_values(scale)]
  if scale.zero_point is not None or scale.offset is not None:
    return [scale_values(scale)]
  return [unpack(scale).data, *_factors(scale.scale)]


def reciprocal(scale: jax.Array) -> jax.Array:
  """1 / scale; 1 for zero, and for a subnormal whose reciprocal is infinite."""
  return 1 / jnp.where(jnp.abs(scale) < F32_TINY, 1, jnp.clip(scale, -LARGEST, LARGEST))


def dequantize(q: QTensor) -> jax.Array:
  """The tensor that q stands for: (data - zero_point) * scale + offset.

  Args:
    q: packed or not.

  Returns:
    float32 [..., K, N].

  Example:
    >>> import jax.numpy as jnp, jaxquant as jq
    >>> jq.dequantize(jq.quantize(jnp.array([[1.0], [-7.0]]), jq.formats.INT4)).tolist()
    [[1.0], [-7.0]]
  """
  q = unpack(q)
  values = to_blocks(q.data, q.fmt, q.axis)
  if q.zero_point is not None:
    values = values - per_block(q.zero_point)
  for factor in _factors(q.scale):
    values = values * per_block(factor)
  if q.offset is not None:
    values = rounded(values) + per_block(q.offset)
  return from_blocks(values, q.data.shape)


def pack(q: QTensor) -> QTensor:
  """Q in its storage container; exact, the inverse of `unpack`.

  A NaN goes into the smallest thing that has a code for it: the element (fp8), else the scale of
  its block, else that scale's own scale. The loss stays visible and never spreads further.
  """
  if q.packed:
    return q
  elem, fmt, axis = q.fmt.elem, q.fmt, q.axis
  data, scale = q.data, q.scale
  if not elem.has_nan:
    bad = jnp.isnan(to_blocks(data, fmt, axis)).any((-3, -1))
    data = jnp.where(jnp.isnan(data), 0, data)
    if isinstance(scale, QTensor):
      scale = scale.replace(data=jnp.where(bad, jnp.nan, scale.data))
    else:
      scale = jnp.where(bad, jnp.nan, scale)
  data, pad = packing.pack_values(data, elem, axis)
  zero_point = None
  if q.zero_point is not None:
    zero_point, _ = packing.pack_values(q.zero_point, elem, axis)
  scale = pack(scale) if isinstance(scale, QTensor) else packing.pack_scale(scale, fmt.scale)
  return q.replace(data=data, scale=scale, zero_point=zero_point, pad=pad)


def unpack(q: QTensor) -> QTensor:
  """Q with float32 grid values as data and scales."""
  if not q.packed:
    return q
  scale = q.scale
  if isinstance(scale, QTensor):
    scale = unpack(scale)
  else:
    scale = packing.unpack_scale(scale, q.fmt.scale)
  zero_point = q.zero_point
  if zero_point is not None:
    pad = padding(scale_values(scale).shape[q.axis], q.fmt.elem)
    zero_point = packing.unpack_values(zero_point, q.fmt.elem, q.axis, pad)
  data = packing.unpack_values(q.data, q.fmt.elem, q.axis, q.pad)
  return q.replace(data=data, scale=scale, zero_point=zero_point, pad=0)


def nonfinite_blocks(q: QTensor) -> jax.Array:
  """How many blocks hold a NaN: the flag that jitted code leaves behind. int32 scalar."""
  return jnp.isnan(to_blocks(dequantize(q), q.fmt, q.axis)).any((-3, -1)).sum()


def map_float(f: Callable[[jax.Array], jax.Array], tree: object) -> object:
  """tree.map over the float arrays of a tree that are not part of a QTensor."""

  def apply(x: object) -> object:
    floating = hasattr(x, "dtype") and jnp.issubdtype(np.dtype(x.dtype), jnp.floating)
    return f(x) if floating else x

  return jax.tree.map(apply, tree, is_leaf=is_qtensor)
