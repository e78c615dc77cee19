"""Each implementation of a contraction against plain numpy, and which one is taken."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import formats
from jaxquant.encoding import encode
from jaxquant.ops import contract, dispatch, rows
from jaxquant.ops.contract import Axes
from jaxquant.ops.qdot import Operand, Rule, qdot


def f64(x):
  return np.asarray(jq.dequantize(x) if isinstance(x, jq.QTensor) else x, np.float64)


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


PAIRS = {
  "integer": (formats.INT8, formats.INT8),
  "integer 4x8": (formats.INT8, formats.INT4),
  "integer per tensor": (formats.INT8_TENSOR, formats.INT8),
  "integer ternary": (formats.INT8, formats.TERNARY_CHANNEL),
  "integer binary": (formats.INT8, formats.BINARY),
  "unit mx": (formats.MXFP8, formats.MXFP8),
  "unit nv": (formats.NVFP4, formats.NVFP4),
  "unit nv tiles": (formats.NVFP4, formats.NVFP4_2D),
  "unit mixed": (formats.E4M3_TOKEN, formats.MXINT8),
  "unit coded scale": (formats.FP4_UE5M3, formats.FP4_UE5M3_TENSOR),
  "dense blocks": (formats.INT8_G128, formats.E4M3_128X128),
  "dense zero point": (formats.UINT8, formats.UINT4_G128),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("shape", [(16, 128, 24), (12, 70, 30)], ids=str)
def test_layouts(name, shape):
  """All three GEMMs of training; sizes that fill stripes and blocks, and that do not."""
  (m, k, n), (a, b) = shape, PAIRS[name]
  lhs, rhs = normal(0, m, k), normal(1, k, n)
  got, want = {}, {}

  @jax.jit
  def run(lhs, rhs):
    for axes in (Axes(-1, -2), Axes(-1, -1), Axes(-2, -2)):
      p = encode(lhs.T if axes.lhs == -2 else lhs, a, axis=axes.lhs)
      q = encode(rhs.T if axes.rhs == -1 else rhs, b, axis=axes.rhs)
      assert name.startswith(dispatch.choose(p, q, axes).name)
      got[axes] = dispatch.contract(p, q, jnp.float32, axes=axes)
      want[axes] = jq.dequantize(p), jq.dequantize(q)
    return got, want

  for axes, y in run(lhs, rhs)[0].items():
    p, q = (f64(v) for v in run(lhs, rhs)[1][axes])
    p, q = p.T if axes.lhs == -2 else p, q.T if axes.rhs == -1 else q
    assert (np.abs(y - p @ q) <= 3e-7 * k * (np.abs(p) @ np.abs(q)).max()).all()


@pytest.mark.parametrize("m", [1, 4, 8, 9])
def test_integer_sums_are_exact(m):
  """Against int64, and the same by rows."""
  x, w = normal(0, m, 1024), normal(1, 1024, 24)
  p, q = encode(x, formats.INT8, axis=-1), encode(w, formats.INT8)
  total = np.asarray(p.data, np.int64) @ np.asarray(q.data, np.int64)
  scale = np.asarray(p.scale) * np.asarray(q.scale)
  want = total.astype(np.float32) * scale
  np.testing.assert_array_equal(contract.by_integer(p, q, Axes()), want)
  for held in (q, jq.pack(q)):
    np.testing.assert_array_equal(rows.by_rows(p, held), want)


def test_integer_sums_at_their_limit():
  """512 products of 127 x 127 per chunk stay below 2^24; all 2048 do not."""
  x, w = jnp.ones((1, 2048)).at[0, 7].set(1 / 127), jnp.ones((2048, 8))
  p, q = encode(x, formats.INT8, axis=-1), encode(w, formats.INT8)
  total = 127 * (127 * 2047 + 1)
  assert total > 2**24
  want = np.float32(total) * (np.asarray(p.scale) * np.asarray(q.scale))
  for y in (contract.by_integer(p, q, Axes()), rows.by_rows(p, q)):
    np.testing.assert_array_equal(y, np.broadcast_to(want, (1, 8)))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", formats.named())
def test_few_rows(name):
  """By chunks of K: what a dense product gives, up to the order of float32 sums; tiles do not
  divide N, and packed and unpacked give the same bits."""
  fmt = formats.named()[name]
  x, w = normal(0, 1, 512), normal(1, 512, 200)

  @jax.jit
  def run(x, w):
    q = encode(w, fmt)
    return rows.by_rows(x, q), rows.by_rows(x, jq.pack(q)), jq.dequantize(q)

  unpacked, packed, dense = run(x, w)
  assert rows.fits(x, encode(w, fmt))
  chex.assert_trees_all_equal(unpacked, packed)
  want = f64(x) @ f64(dense)
  np.testing.assert_allclose(
    packed, want, rtol=0, atol=2e-6 * np.abs(f64(x)).sum() * np.abs(dense).max()
  )


def shaped(fmt, shape, axis):
  if fmt is None:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
  return jax.eval_shape(lambda: encode(jnp.ones(shape), fmt, axis=axis))


UNITS = [n for n, f in formats.named().items() if contract.is_unit(shaped(f, (70, 40), -2))]


@pytest.mark.parametrize("name", UNITS)
def test_unit_values_are_exact(name):
  """bf16 value times float32 scale is the tensor, to the last bit, where the path is taken."""

  @jax.jit
  def run(w):
    q = encode(w, formats.named()[name])
    value, scale = contract.unit_values(q)
    return value, value.astype(jnp.float32) * scale, jq.dequantize(q)

  value, got, want = run(normal(0, 70, 40))
  assert value.dtype == jnp.bfloat16
  chex.assert_trees_all_equal(got, want)


@pytest.mark.parametrize(
  ("where", "m", "lhs", "rhs", "want"),
  [
    ("cpu", 64, "int8", "int8", "integer"),
    ("cpu", 1, "int8", "int8", "rows"),
    ("cpu", 8, None, "int4_g128", "rows"),
    ("cpu", 9, None, "int4_g128", "dense"),
    ("cpu", 8, None, "nvfp4", "dense"),
    ("cpu", 1, None, "nvfp4", "rows"),
    ("cpu", 64, "mxfp8", "mxfp8", "unit"),
    ("cpu", 64, "e4m3_token", "e4m3_token", "unit"),
    ("cpu", 64, "nf4_g64", "nf4_g64", "dense"),
    ("cpu", 64, None, None, "dense"),
    ("tpu", 1, "int8", "int8", "integer"),
    ("tpu", 64, "e4m3_token", "e5m2_tensor", "fp8"),
    ("tpu", 64, "mxfp8", "mxfp8", "unit"),
    ("gpu", 64, "e4m3_token", "e4m3_token", "fp8"),
    ("gpu", 64, "mxfp8", "mxfp8", "scaled_dot"),
    ("gpu", 64, "nvfp4", "nvfp4", "scaled_dot"),
    ("gpu", 64, "nvfp4", "nvfp4_2d", "unit"),
    ("gpu", 1, None, "int4_g128", "dense"),
  ],
)
def test_choice(where, m, lhs, rhs, want):
  """Formats, shapes and machine alone decide; packed and not, the same."""
  named = formats.named()
  a = shaped(named.get(lhs), (m, 256), -1)
  b = shaped(named.get(rhs), (256, 128), -2)
  with dispatch.target(where):
    assert dispatch.choose(a, b).name == want
    assert re.match(rf"{want}: \w", dispatch.explain(a, b))
    if rhs:
      assert dispatch.choose(a, jax.eval_shape(jq.pack, b)).name == want


# Machines that are not here.


@pytest.mark.parametrize(
  ("where", "platform", "fmt", "found"),
  [
    ("tpu", "tpu", formats.E4M3_TOKEN, r"dot_general .*f8E4M3FN"),
    ("tpu", "tpu", formats.INT8, r"dot_general .*xi8>.*xi32>"),
    ("tpu", "tpu", formats.MXFP8, r"dot_general .*xbf16>.*xf32>"),
    ("gpu", "cuda", formats.E4M3_TOKEN, r"dot_general .*f8E4M3FN"),
    ("gpu", "cuda", formats.MXFP8, r"xla.scaled_dot.*f8E4M3FN.*f8E8M0FNU"),
    ("gpu", "cuda", formats.NVFP4, r"xla.scaled_dot.*f4E2M1FN.*f8E4M3FN"),
  ],
)
def test_lowers_for_other_machines(where, platform, fmt, found):
  rule = Rule(*[Operand(fmt)] * 6)
  f = jax.jit(lambda x, w: jax.grad(lambda x, w: qdot(x, w, rule).sum(), (0, 1))(x, w))
  with dispatch.target(where):
    text = (
      f.trace(normal(0, 32, 64), normal(1, 64, 96)).lower(lowering_platforms=(platform,)).as_text()
    )
  assert len(re.findall(found, text)) >= 2  # dx and dw; y is not needed


def test_jit_caches_know_the_target():
  """The same jitted function under another target is traced again, and only then."""
  traces = []

  @jax.jit
  def f(x, w):
    traces.append(dispatch.backend())
    return qdot(x, w, Rule(Operand(formats.E4M3_TOKEN), Operand(formats.E4M3_TOKEN)))

  for where in ("tpu", "cpu", "tpu", "gpu", "cpu"):
    with dispatch.target(where):
      f.trace(normal(0, 32, 64), normal(1, 64, 96))
  f.trace(normal(0, 32, 64), normal(1, 64, 96))
  assert traces == ["tpu", "cpu", "gpu", "cpu"]  # the last: no target is another key than "cpu"
