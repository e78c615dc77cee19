"""Containers are bijections: every code, every width, both axes, any shape, NaN included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant import formats as F
from jaxquant.formats import padding
from jaxquant.packing import (
  PLANES,
  from_codes,
  logical_shape,
  pack_scale,
  pack_values,
  to_codes,
  unpack_scale,
  unpack_values,
)

GRIDS = {}
for _fmt in F.named().values():
  while isinstance(_fmt, F.Format):
    GRIDS[_fmt.elem.name] = _fmt.elem
    _fmt = _fmt.scale
  if _fmt is not None:
    GRIDS[_fmt.name] = _fmt
for _bits in range(1, 9):
  for _grid in (F.int_grid(_bits), F.int_grid(_bits, full=True), F.bipolar_grid(_bits)):
    GRIDS[_grid.name] = _grid
  GRIDS[f"uint{_bits}"] = F.uint_grid(_bits)
GRIDS = {k: v for k, v in GRIDS.items() if v.bits <= 8}


def test_grids_cover_every_width():
  assert {g.bits for g in GRIDS.values()} == set(range(1, 9))
  assert {"e2m1", "e4m3", "e8m0", "ue5m3", "nf4", "dyn8", "1/ue5m3", "fixed8"} <= set(GRIDS)


def round_trip(x, grid, axis, pad):
  data, padded = pack_values(x, grid, axis)
  assert padded == pad
  return data, unpack_values(data, grid, axis, pad)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", GRIDS)
def test_every_code(name):
  """Codes -> values -> codes where there is a value; values -> container -> values, both axes."""
  grid = GRIDS[name]
  codes = np.arange(2**grid.bits, dtype=np.uint8)
  values = np.asarray(from_codes(jnp.asarray(codes), grid))
  table = np.asarray(grid.values(), np.float32)
  finite = np.isfinite(values) & np.isin(values, table) & (np.abs(values) >= 2.0**-126)
  finite |= values == 0
  assert finite.sum() >= np.isfinite(table).sum() - (grid == F.E8M0)  # 2^-127 is subnormal
  np.testing.assert_array_equal(to_codes(jnp.asarray(values[finite]), grid), codes[finite])
  if grid.has_nan:
    assert np.isnan(from_codes(to_codes(jnp.asarray([np.nan], jnp.float32), grid), grid)).all()
  if grid.has_nan and grid.dtype is None:
    assert np.isnan(values[len(values) - (~finite).sum() :]).all()
  x = np.resize(values[finite], (3, 37, 5))  # 37 rows fill no byte
  pad = padding(37, grid)
  for axis, laid in ((-2, x), (-1, x.swapaxes(-1, -2))):
    data, back = jax.jit(round_trip, static_argnums=(1, 2, 3))(laid, grid, axis, pad)
    assert logical_shape(data, grid, axis, pad) == laid.shape
    np.testing.assert_array_equal(np.asarray(back).view(np.uint32), laid.copy().view(np.uint32))


@pytest.mark.parametrize("name", ["e8m0", "e4m3", "ue5m3", "bf16", "1/ue5m3"])
def test_scale_containers(name):
  grid = {"bf16": F.BF16, **GRIDS}[name]
  values = np.asarray(grid.values(), np.float32)
  values = values[np.isfinite(values) & (np.abs(values) >= 2.0**-126)]
  values = np.append(values, np.float32(np.nan))
  packed = pack_scale(jnp.asarray(values), grid)
  assert packed.dtype.itemsize * 8 == -(-grid.bits // 8) * 8
  np.testing.assert_array_equal(unpack_scale(packed, grid), values)


def reference(codes, width):
  """[K, N] codes -> bytes, written with loops."""
  p = 8 // width
  out = np.zeros((len(codes) // p, codes.shape[1]), np.uint8)
  for k, row in enumerate(codes):
    out[k // p] |= (row << (k % p * width)).astype(np.uint8)
  return out


@pytest.mark.parametrize("bits", range(1, 8))
def test_layout(bits):
  """Rows that share a byte are neighbours, low bits first; odd widths are planes, the same way."""
  grid = F.uint_grid(bits)
  codes = np.random.default_rng(bits).integers(0, 2**bits, (16, 3)).astype(np.uint8)
  data, pad = pack_values(jnp.asarray(codes, jnp.float32), grid)
  assert pad == 0
  planes, low = data if isinstance(data, tuple) else (data,), 0
  assert len(planes) == len(PLANES[bits])
  for width, plane in zip(PLANES[bits], planes, strict=True):
    np.testing.assert_array_equal(plane, reference((codes >> low) & (2**width - 1), width))
    low += width


def test_integers_are_twos_complement():
  data, _ = pack_values(jnp.asarray([[-1.0], [7.0], [-8.0], [0.0]]), F.int_grid(4, full=True))
  np.testing.assert_array_equal(np.asarray(data)[:, 0], [0x7F, 0x08])


@settings(max_examples=10)
@given(
  bits=st.integers(1, 8),
  k=st.sampled_from((1, 5, 24)),
  n=st.sampled_from((1, 3)),
  lead=st.sampled_from(((), (2,))),
  axis=st.sampled_from((-2, -1)),
  seed=st.integers(0, 2**31 - 1),
)
def test_any_shape(bits, k, n, lead, axis, seed):
  grid = F.int_grid(bits, full=True) if bits > 1 else F.bipolar_grid(1)
  shape = (*lead, k, n) if axis == -2 else (*lead, n, k)
  values = np.random.default_rng(seed).choice(grid.values(), shape).astype(np.float32)
  data, pad = pack_values(jnp.asarray(values), grid, axis)
  np.testing.assert_array_equal(unpack_values(data, grid, axis, pad), values)
  stored = sum(a.size * a.dtype.itemsize * 8 for a in jax.tree.leaves(data))
  assert stored == values.size // k * (k + padding(k, grid)) * bits
  if k == 24:  # a slice on whole bytes is packed like the whole
    cut = jax.lax.slice_in_dim(jnp.asarray(values), 8, k, axis=axis)
    part, _ = pack_values(cut, grid, axis)
    for a, b in zip(jax.tree.leaves(part), jax.tree.leaves(data), strict=True):
      start = b.shape[axis] * 8 // k
      np.testing.assert_array_equal(a, jax.lax.slice_in_dim(b, start, b.shape[axis], axis=axis))
