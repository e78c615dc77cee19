"""One suite for every named format: a new row of the table is tested by being there.

Equality is bitwise unless a reason is written.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import formats as F
from jaxquant import scales
from jaxquant.encoding import encode, quantize
from jaxquant.formats import Format, bits_per_value
from jaxquant.tensor import (
  block_sizes,
  dequantize,
  nonfinite_blocks,
  pack,
  to_blocks,
  unpack,
)

FORMATS = {}
for _name, _fmt in F.named().items():
  if _fmt not in FORMATS.values():  # E4M3_1X128 is another name of E4M3_G128
    FORMATS[_name] = _fmt

LAYERS, K, N = 2, 267, 21  # a multiple of no block, and of no byte for any sub-byte width


def bits(tree):
  """Leaves as integers, so that -0 differs from 0 and NaN equals NaN."""

  def view(a):
    a = np.asarray(a)
    a = np.where(np.isnan(a), np.float32(np.nan), a) if a.dtype == np.float32 else a
    return a.view(f"u{a.dtype.itemsize}") if a.dtype.itemsize > 1 else a.view(np.uint8)

  return [view(a) for a in jax.tree.leaves(tree)]


def assert_same(a, b, what=""):
  for x, y in zip(bits(a), bits(b), strict=True):
    np.testing.assert_array_equal(x, y, err_msg=what)


@functools.cache
def runner(name):
  """Everything that is done to x [LAYERS, K, N], compiled once per format."""
  fmt = FORMATS[name]
  one = lambda x: encode(x, fmt)

  def run(x):
    q = one(x)
    packed = pack(q)
    other = encode(x.swapaxes(-1, -2), fmt, axis=-1)
    layers = lambda _, a: (_, (one(a[0]), dequantize(a[1])))
    return {
      "q": q,
      "packed": packed,
      "values": dequantize(q),
      "unpacked": dequantize(packed),
      "back": unpack(packed),
      "bad": nonfinite_blocks(packed),
      "vmap": jax.vmap(one)(x),
      "scan": jax.lax.scan(layers, 0, (x, packed))[1],
      "other": other,
      "other_back": unpack(pack(other)),
    }

  return jax.jit(run)


SIZES = np.float32(2.0) ** np.arange(-10, N - 10)  # columns of very different size


@functools.cache
def normal():
  return np.random.default_rng(0).standard_normal((LAYERS, K, N)).astype(np.float32) * SIZES


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", FORMATS)
def test_every_way_to_run_it_has_the_same_bits(name):
  fmt = FORMATS[name]
  out = runner(name)(normal())
  assert_same(out["vmap"], out["q"], "vmap == leading axis")
  assert_same(out["scan"][0], out["q"], "layer by layer == leading axis")
  assert_same(out["scan"][1], out["unpacked"], "QTensors are carried through scan")
  assert_same(out["values"], out["unpacked"], "packed == values")
  assert_same(out["back"], out["q"], "unpack is the inverse of pack")
  transposed = jax.tree.map(lambda a: a.swapaxes(-1, -2), jax.tree.leaves(out["other"]))
  assert_same(transposed, jax.tree.leaves(out["q"]), "axis -1 == transposed axis -2")
  assert_same(out["other_back"], out["other"], "packing along the last axis")
  layer = jax.tree.map(lambda a: a[1], out["packed"])
  assert (layer.fmt, layer.shape, layer.packed) == (fmt, (K, N), True)
  assert out["q"].shape == out["packed"].shape == (LAYERS, K, N)
  assert out["bad"] == 0


@pytest.mark.parametrize("name", FORMATS)
def test_size(name):
  """Formula == container, padding of odd shapes included; the QTensor says the same."""
  packed = runner(name)(normal())["packed"]
  one = jax.tree.map(lambda a: a[0], packed)
  stored = sum(a.size * a.dtype.itemsize * 8 for a in jax.tree.leaves(one))
  assert not any("int4" in str(a.dtype) or "int2" in str(a.dtype) for a in jax.tree.leaves(one))
  assert stored == pytest.approx(bits_per_value(FORMATS[name], (K, N)) * K * N, abs=1e-6)
  assert one.bits_per_value == bits_per_value(FORMATS[name], (K, N))
  assert one.nbytes * 8 == stored
  assert packed.nbytes == LAYERS * one.nbytes


def eager_formats():
  """One format per kind of element and rule: eager code compiles every operation alone."""
  kinds = {}
  for name, fmt in FORMATS.items():
    kinds.setdefault((type(fmt.elem), scales.default_rule(fmt)), name)
  return [*kinds.values(), "nvint4", "nf4_dq"]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", eager_formats())
def test_eager_is_jit(name):
  x, fmt = normal()[0], FORMATS[name]
  q = encode(x, fmt)
  jitted = runner(name)(normal())
  layer = jax.tree.map(lambda a: a[0], (jitted["q"], jitted["values"]))
  assert_same((q, dequantize(q)), layer)


def test_low_precision_input_is_widened_first():
  x = normal()[0]
  for fmt in (F.NVFP4, F.INT8, F.UINT4_G32_OFFSET):
    run = jax.jit(lambda x, fmt=fmt: encode(x, fmt))
    for dtype in (jnp.float16, jnp.bfloat16):
      given = jnp.asarray(x, dtype)
      q = run(given)
      assert q.data.dtype == jnp.float32
      assert_same(q, run(given.astype(jnp.float32)))


def spread(mask, fmt):
  """Where a NaN must be seen after packing: the smallest thing that has a code for it."""
  if fmt.elem.has_nan:
    return mask
  r, c = block_sizes(fmt, mask.shape, -2)
  rows = np.logical_or.reduceat(mask, np.arange(0, mask.shape[-2], r), -2)
  blocks = np.logical_or.reduceat(rows, np.arange(0, mask.shape[-1], c), -1)
  if isinstance(fmt.scale, Format):
    blocks = spread(blocks, fmt.scale)
  return np.repeat(np.repeat(blocks, r, -2), c, -1)[..., : mask.shape[-2], : mask.shape[-1]]


@pytest.mark.parametrize("name", FORMATS)
def test_nan_and_infinity_stay_where_they_are(name):
  x = normal().copy()
  bad = np.zeros(x.shape, bool)
  for at, value in {(0, 3, 5): np.nan, (0, 250, 0): np.inf, (1, 100, 20): -np.inf}.items():
    x[at], bad[at] = value, True
  out = runner(name)(x)
  clean = runner(name)(np.where(bad, 0, x))
  np.testing.assert_array_equal(np.isnan(out["q"].data), bad)
  np.testing.assert_array_equal(np.isnan(out["values"]), bad)
  same = ~np.isnan(out["values"])
  assert_same(np.asarray(out["values"])[same], np.asarray(clean["values"])[same], "values")
  seen = spread(bad, FORMATS[name])
  np.testing.assert_array_equal(np.isnan(out["unpacked"]), seen)
  assert_same(np.asarray(out["unpacked"])[~seen], np.asarray(clean["values"])[~seen], "packed")
  blocks = to_blocks(jnp.asarray(seen), FORMATS[name], -2).any((-3, -1)).sum()
  assert int(out["bad"]) == int(blocks)


def extreme(kind):
  sign = np.where(np.random.default_rng(1).random((LAYERS, K, N)) < 0.5, -1, 1)
  return (sign * {"zero": 0, "subnormal": 1e-40, "largest": 3.4028235e38}[kind]).astype(np.float32)


@pytest.mark.parametrize("name", FORMATS)
def test_extremes(name):
  for kind in ("zero", "subnormal"):
    out = runner(name)(extreme(kind))
    assert not np.asarray(out["values"]).any(), kind
    assert not np.asarray(out["unpacked"]).any(), kind
  x = extreme("largest")
  values = np.asarray(runner(name)(x)["unpacked"])
  assert np.isfinite(values).all()
  if FORMATS[name].elem.min < 0 and "ue5m3" not in name.removesuffix("_tensor"):
    ratio = values / np.clip(x, -(2.0**126), 2.0**126)  # what such numbers count as
    assert (np.abs(ratio - 1) < 0.35).all(), (ratio.min(), ratio.max())
  some = normal().copy()
  some[0, :, :16] = 0  # whole blocks of every format but per-tensor ones
  out = np.asarray(runner(name)(some)["unpacked"])
  assert not out[0, :, :16].any()
  assert out[1].any()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["nvfp4_2d", "mxint6", "uint3_g128", "nf4_dq"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (33, 17)])
def test_small_and_odd_shapes(name, shape):
  """Blocks longer than K, one row, one column: a tail is a block of what is there."""
  fmt = FORMATS[name]
  x = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
  q = quantize(x, fmt)
  assert q.shape == shape
  stored = sum(a.size * a.dtype.itemsize * 8 for a in jax.tree.leaves(q))
  assert stored == pytest.approx(bits_per_value(fmt, shape) * x.size, abs=1e-6)
  error = np.abs(np.asarray(dequantize(q)) - x)
  assert (error <= 0.5 * np.abs(x).max()).all()


def test_tail_scale_is_that_of_the_tail():
  fmt = Format(F.int_grid(8), 16)
  x = np.random.default_rng(3).standard_normal((40, 4)).astype(np.float32)
  whole, tail = encode(x, fmt), encode(x[32:], fmt)
  assert_same(whole.data[32:], tail.data)
  assert_same(whole.scale[2:], tail.scale)


def test_square_tiles_quantize_a_matrix_and_its_transpose_alike():
  x = normal()[0]
  for fmt in (F.NVFP4_2D, F.E4M3_128X128, F.INT8_TENSOR):
    run = jax.jit(lambda x, fmt=fmt: (dequantize(encode(x, fmt)), dequantize(encode(x.T, fmt)).T))
    assert_same(*run(x))
  one, other = jax.jit(lambda x: (dequantize(encode(x, F.NVFP4)), encode(x.T, F.NVFP4)))(x)
  assert (np.asarray(one) != np.asarray(dequantize(other)).T).any()


EXACT = ("mxfp8", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "mxint8", "mxint6", "mxint4")
AGAIN = ("nvfp4", "nvfp4_2d", "nvint4", "int8", "int4_g128", "e4m3_token", "nf4_g64", "binary")


@pytest.mark.parametrize("name", EXACT + AGAIN)
def test_idempotent(name):
  """Quantizing what was decoded: the same codes; the same bits where scales are powers of two."""
  first = runner(name)(normal() / (1 if name in EXACT else SIZES))  # or e4m3 scales lose bits
  second = runner(name)(first["values"])
  assert_same(second["q"].data, first["q"].data)
  if name in EXACT:
    assert_same(second["values"], first["values"])
  else:  # amax = max * scale was rounded, and is divided by max again
    np.testing.assert_array_max_ulp(np.asarray(second["values"]), np.asarray(first["values"]), 4)


# SNR in dB on normal samples, ceil rule for MX (INT v.s. FP, arXiv:2510.25602).
QSNR = {
  "mxint8": 41.6,
  "mxfp8": 31.5,
  "mxint6": 29.4,
  "mxfp6_e2m3": 31.0,
  "mxint4": 16.9,
  "mxfp4": 18.8,
  "nvfp4": 20.4,
  "nvint4": 21.3,
}


@pytest.mark.parametrize("name", QSNR)
def test_signal_to_noise_on_a_gaussian(name):
  fmt = FORMATS[name]
  rule = scales.ocp_ceil if fmt.scale == F.E8M0 else None
  x = np.random.default_rng(4).standard_normal((512, 512)).astype(np.float32)
  error = jax.jit(lambda x: dequantize(encode(x, fmt, rule=rule)) - x)(x)
  snr = 10 * np.log10(np.square(x).sum() / np.square(error).sum())
  assert snr == pytest.approx(QSNR[name], abs=0.15)


def test_nonfinite_input_is_an_error_outside_jit():
  x = normal()[0].copy()
  x[3, 4], x[5, 6] = np.nan, np.inf
  with pytest.raises(ValueError, match=rf"2 of {K * N} elements.*\[{K}, {N}\].*nvfp4"):
    quantize(x, F.NVFP4)
  q = jax.jit(lambda x: quantize(x, F.NVFP4))(x)
  assert int(nonfinite_blocks(q)) == 2
  with pytest.raises(ValueError, match="at least one element"):
    quantize(jnp.zeros((0, 3)), F.NVFP4)
  with pytest.raises(ValueError, match=r"\[K, 1\]"):
    quantize(jnp.zeros(3), F.NVFP4)


def test_formats_are_checked_when_built():
  for wrong in (
    lambda: Format(F.E2M1, 0),
    lambda: Format(F.E2M1, 16, zero_point=True),
    lambda: Format(F.FIXED8, 16, zero_point=True),
    lambda: Format(F.int_grid(4), 16, scale=F.int_grid(8)),
    lambda: F.FloatGrid("odd", 2, 1, 1, 7.0),
    lambda: F.UniformGrid("wide", 2, -3, 3),
    lambda: F.TableGrid("unsorted", (1.0, 0.0)),
    lambda: F.int_grid(9),
  ):
    with pytest.raises(ValueError):
      wrong()


def test_names():
  assert str(F.NVFP4) == "nvfp4"
  assert str(Format(F.E2M1, 48, scale=F.E8M0)) == "e2m1_48x1_e8m0"
  assert F.E4M3_1X128 == F.E4M3_G128
  assert len(FORMATS) >= 45


def test_published_sizes():
  sizes = {"mxfp4": 4.25, "nvfp4": 4.5, "mxfp8": 8.25, "int4_g128": 4.25, "nf4_g64": 4.5}
  sizes |= {"uint4_g128": 4.28125, "e4m3_128x128": 8 + 32 / 128**2, "fp4_ue5m3": 4.25}
  for name, want in sizes.items():
    assert bits_per_value(FORMATS[name], (4096, 4096)) == pytest.approx(want, abs=1e-5), name
  # arXiv:2305.14314: 0.127 bits; here each 256 scales keep a mean of their own, 0.002 more
  assert bits_per_value(F.NF4_DQ, (4096, 4096)) == pytest.approx(4.127, abs=0.0021)
