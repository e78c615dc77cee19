"""Number formats as data: what one element can be (a grid), and what shares a scale (a Format).

A grid is a finite set of reals with a code for each. A `Format` is a grid for the elements, the
block of elements that share one scale, and how that scale itself is stored. Because a scale may be
stored in a Format of its own, two-level schemes need no extra concept: NVFP4 is E2M1 elements in
blocks of 16 whose scales are E4M3 *with one float32 scale per tensor*.

Letters used all over the package: M tokens, K contraction, N outputs. A weight is `w [K, N]`,
activations are `x [M, K]`; blocks run along K.
"""

from __future__ import annotations

import dataclasses
import math

from jaxquant.grids import (  # noqa: F401  grids are part of this module's table
  BF16,
  E2M1,
  E2M3,
  E3M2,
  E4M3,
  E5M2,
  E8M0,
  FIXED8,
  FP3,
  FP16,
  HALVINGS,
  NF4,
  NF4_TABLE,
  TERNARY,
  UE5M3,
  FloatGrid,
  Grid,
  TableGrid,
  UniformGrid,
  bipolar_grid,
  dynamic_grid,
  int_grid,
  normal_float_grid,
  reciprocal_grid,
  uint_grid,
)


@dataclasses.dataclass(frozen=True)
class Format:
  """Elements on a grid, blocks that share a scale, and how the scale is stored.

  value = (data - zero_point) * scale + offset.

  Attributes:
    elem: grid of the elements.
    block: elements along the contraction axis K with one scale; None: all of K.
    block_n: elements along the other axis with one scale; None: all of them. `block=None,
      block_n=None` is one scale per tensor, `block=16, block_n=16` a square tile.
    scale: how a scale is stored: None float32; a Grid: rounded onto it; a Format: quantized again
      in blocks of its own (`Format(E4M3, None, None)` is the two-level scale of NVFP4).
    zero_point: integer of the element's grid subtracted from the data (asymmetric).
    offset: float32 added after scaling, one per block.
  """

  elem: Grid
  block: int | None = None
  block_n: int | None = 1
  scale: Grid | Format | None = None
  zero_point: bool = False
  offset: bool = False

  def __post_init__(self) -> None:
    """Raises ValueError for a block below 1, a zero point off the integers, a NaN-less scale."""
    for name in ("block", "block_n"):
      size = getattr(self, name)
      if size is not None and (not isinstance(size, int) or size < 1):
        raise ValueError(f"Format.{name} must be a positive int or None, got {size!r}")
    if self.zero_point and not (isinstance(self.elem, UniformGrid) and self.elem.step == 1):
      raise ValueError(f"a zero point needs an integer grid, not {self.elem.name}")
    if isinstance(self.scale, Grid) and not self.scale.has_nan:
      raise ValueError(
        f"{self.scale.name} has no code for NaN, so a lost block could not say so; give the scale "
        "a Format with scales of its own"
      )

  @property
  def scale_bits(self) -> float:
    """Bits of one stored scale, its own scales included. A bare grid takes whole bytes."""
    if isinstance(self.scale, Format):
      return bits_per_value(self.scale)
    return -(-self.scale.bits // 8) * 8 if self.scale is not None else 32

  def __str__(self) -> str:
    """Name in the table if there is one, else what it is made of."""
    for name, fmt in named().items():
      if fmt == self:
        return name
    block = f"{self.block or 'K'}x{self.block_n or 'N'}"
    parts = [self.elem.name, block, "f32" if self.scale is None else str_scale(self.scale)]
    return "_".join(parts + ["zp"] * self.zero_point + ["offset"] * self.offset)

  __repr__ = __str__


def str_scale(scale: Grid | Format) -> str:
  """Short name of a scale's storage."""
  return f"({scale})" if isinstance(scale, Format) else scale.name


def padding(k: int, grid: Grid) -> int:
  """Elements that a container adds along K, so that its narrowest plane fills whole bytes."""
  return -k % (8 // min(grid.bits & -grid.bits, 8))  # the lowest set bit is the narrowest plane


def bits_per_value(fmt: Format, shape: tuple[int, int] | None = None) -> float:
  """Stored bits per element, scales, zero points and offsets included.

  bits + (scale bits + zero point bits + 32 [offset]) / (elements that share them).

  Args:
    fmt: the format.
    shape: (K, N); gives what the container of this very shape takes: blocks that span a whole axis,
      ragged tails, bytes that are not full. Without it such blocks cost nothing.

  Example:
    >>> bits_per_value(NVFP4), bits_per_value(NVFP4, (4096, 4096))
    (4.5, 4.500001907348633)
    >>> bits_per_value(INT4_G128)
    4.25
  """
  side = fmt.scale_bits + 32 * fmt.offset
  if shape is None:
    shared = (fmt.block or math.inf) * (fmt.block_n or math.inf)
    return fmt.elem.bits + (side + fmt.elem.bits * fmt.zero_point) / shared
  k, n = shape
  rows, columns = -(-k // min(fmt.block or k, k)), -(-n // min(fmt.block_n or n, n))
  if isinstance(fmt.scale, Format):
    side += bits_per_value(fmt.scale, (rows, columns)) - fmt.scale_bits
  zero_rows = (rows + padding(rows, fmt.elem)) * fmt.zero_point
  stored = (k + padding(k, fmt.elem)) * n + zero_rows * columns
  return (fmt.elem.bits * stored + side * rows * columns) / (k * n)


PER_TENSOR_E4M3 = Format(E4M3, None, None)
PER_TENSOR_UE5M3 = Format(UE5M3, None, None)
PER_TENSOR_E8M0 = Format(E8M0, None, None)

INT8 = Format(int_grid(8))  # one scale per output channel of w, or per token of x
INT6 = Format(int_grid(6))
INT4 = Format(int_grid(4))
UINT8 = Format(int_grid(8, full=True), zero_point=True)
INT8_TENSOR = Format(int_grid(8), None, None)
INT8_G128 = Format(int_grid(8), 128)
INT6_G128 = Format(int_grid(6), 128)
INT4_G128 = Format(int_grid(4), 128)
INT4_G64 = Format(int_grid(4), 64)
INT4_G32 = Format(int_grid(4), 32)
INT3_G128 = Format(int_grid(3), 128)
INT2_G64 = Format(int_grid(2), 64)
UINT4_G128 = Format(int_grid(4, full=True), 128, zero_point=True)
UINT3_G128 = Format(int_grid(3, full=True), 128, zero_point=True)
UINT2_G64 = Format(int_grid(2, full=True), 64, zero_point=True)
# int4 codes that decode to int8 values of their column (QoQ, DGQ): integer scales, one float32 each
UINT4_G128_INT8 = Format(int_grid(4, full=True), 128, scale=Format(uint_grid(8)), zero_point=True)
INT4_G128_E4M3 = Format(int_grid(4, full=True), 128, scale=PER_TENSOR_E4M3)
UINT4_G32_OFFSET = Format(uint_grid(4), 32, offset=True)  # data * scale + min of the block
UINT2_G32_OFFSET = Format(uint_grid(2), 32, offset=True)
TERNARY_CHANNEL = Format(TERNARY)
BINARY = Format(bipolar_grid(1))
BFLOAT16 = Format(BF16, None, None)  # its scale is 1: the range is that of float32
E4M3_TENSOR = Format(E4M3, None, None)
E5M2_TENSOR = Format(E5M2, None, None)
E4M3_TOKEN = Format(E4M3)
E5M2_TOKEN = Format(E5M2)
E4M3_G128 = Format(E4M3, 128)
E4M3_1X128 = E4M3_G128  # activations and gradients of DeepSeek-V3; its weights are the next row
E4M3_128X128 = Format(E4M3, 128, 128)
E4M3_G128_E8M0 = Format(E4M3, 128, scale=E8M0)
E3M2_CHANNEL = Format(E3M2)
E2M1_G128 = Format(E2M1, 128)
E2M1_G256 = Format(E2M1, 256)
E2M1_G256_E8M0 = Format(E2M1, 256, scale=E8M0)
E2M1_G256_HALVINGS = Format(E2M1, 256, scale=Format(HALVINGS))
FP3_G128 = Format(FP3, 128)
MXFP8 = Format(E4M3, 32, scale=E8M0)
MXFP8_E5M2 = Format(E5M2, 32, scale=E8M0)
MXFP6_E2M3 = Format(E2M3, 32, scale=E8M0)
MXFP6_E3M2 = Format(E3M2, 32, scale=E8M0)
MXFP4 = Format(E2M1, 32, scale=E8M0)
MXFP4_TENSOR = Format(E2M1, 32, scale=PER_TENSOR_E8M0)  # times one constant, 4/3: nothing clips
MXINT8 = Format(FIXED8, 32, scale=E8M0)
MXINT6 = Format(int_grid(6), 32, scale=E8M0)
MXINT4 = Format(int_grid(4), 32, scale=E8M0)
NVFP4 = Format(E2M1, 16, scale=PER_TENSOR_E4M3)
NVFP4_2D = Format(E2M1, 16, 16, scale=PER_TENSOR_E4M3)
NVFP4_ROW = Format(E2M1, 16, scale=Format(E4M3))  # one float32 per token of x, or column of w
NVINT4 = Format(int_grid(4), 16, scale=PER_TENSOR_E4M3)
FP4_UE5M3 = Format(E2M1, 32, scale=UE5M3)
FP4_UE5M3_TENSOR = Format(E2M1, 16, scale=PER_TENSOR_UE5M3)
FP4_UE5M3_ENCODE = Format(E2M1, 16, scale=reciprocal_grid(UE5M3))
NF4_G64 = Format(NF4, 64)
# 256 scales per second-level block, as a tile: what bitsandbytes' flat order gives at K = 4096.
NF4_DQ = Format(NF4, 64, scale=Format(dynamic_grid(), 64, 4, offset=True))
# LQ-LoRA, arXiv:2311.12023: integer scales above their minimum (theirs is one per tensor).
NF3_LQ = Format(normal_float_grid(3), 64, scale=Format(uint_grid(8), 64, 4, BF16, offset=True))
NF3_G64 = Format(normal_float_grid(3), 64)
NF2_G64 = Format(normal_float_grid(2), 64)
DYN8_G256 = Format(dynamic_grid(), 256)  # first moment of 8-bit optimizers, arXiv:2110.02861
UDYN8_G256 = Format(dynamic_grid(signed=False), 256)  # second moment


def named() -> dict[str, Format]:
  """All formats of this module by lower-case name, for flags, tables and printing."""
  found = {k.lower(): v for k, v in globals().items() if isinstance(v, Format)}
  return {k: v for k, v in found.items() if not k.startswith("per_tensor")}
