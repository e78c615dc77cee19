"""The packed matmul for TPU: interpreted against the dequantized product, compiled for each TPU."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxquant as jq
from jaxquant import formats
from jaxquant.formats import named
from jaxquant.ops import dispatch, pallas
from jaxquant.ops.backend import target
from jaxquant.ops.hadamard import rotate
from jaxquant.ops.pallas import interpreted
from jaxquant.ops.qdot import Operand, Rule, quantize_operand, weight_only
from jaxquant.sharding import place
from pallas_kernels.qmatmul import Unsupported, qmatmul, why_not
from pallas_kernels.qmatmul.cases import TABLE, case
from pallas_kernels.qmatmul.plan import plan

# Races and reads of memory that nobody wrote (NaN) fail the test.
CHECKED = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")

# Sums of K products in float32, in another order than the reference's: this is for K = 1024.
SUMS = 2e-6
# Elements rounded to bf16 once after their scale (2^-9 each, random signs), see `qmatmul`.
ONCE = 4e-3
# Table values are bf16 before they meet their scale.
TWICE = 6e-3

FORMATS = {
  name: fmt
  for name, fmt in named().items()
  if why_not(fmt, 16, 512, 256, jnp.bfloat16, "v6e") is None and not fmt.zero_point
  and not fmt.offset
}  # fmt: skip
REFUSED = sorted(
  name for name, fmt in named().items() if why_not(fmt, 16, 512, 256) and not fmt.offset
)


def bound(fmt, x, m, k, n, generation):
  p = plan(fmt, m, k, n, x, generation)
  if p.scales != "weight" or p.wide == jnp.bfloat16:
    return SUMS
  if isinstance(fmt.elem, formats.TableGrid):
    return TWICE
  scale = fmt.scale.elem if isinstance(fmt.scale, formats.Format) else fmt.scale
  return ONCE if scale in (None, formats.BF16) else SUMS


@functools.cache
def operands(fmt, m, k, n, x="bf16", seed=0):
  """(activations as the kernel takes them, their scale, packed weight, float64 product)."""
  rng = np.random.default_rng(seed)
  acts = jnp.asarray(rng.normal(size=(m, k)), jnp.bfloat16)
  weight = jq.quantize(jnp.asarray(rng.normal(size=(k, n)) * 0.02, jnp.float32), fmt)
  values, x_scale = np.asarray(acts, np.float64), None
  if x != "bf16":
    q = jq.quantize(acts, formats.INT8 if x == "int8" else formats.E4M3_TOKEN, axis=-1)
    acts, x_scale, values = q.data, q.scale, np.asarray(jq.dequantize(q), np.float64)
  return acts, x_scale, weight, values @ np.asarray(jq.dequantize(weight), np.float64)


def run(fmt, m, k, n, generation="v6e", x="bf16", seed=0, **options):
  acts, x_scale, weight, want = operands(fmt, m, k, n, x, seed)
  scale, outer = weight.scale, None
  if isinstance(scale, jq.QTensor):
    scale, outer = scale.data, scale.scale
  got = qmatmul(
    acts, weight.data, scale, fmt, generation=generation, x_scale=x_scale, outer=outer,
    out_dtype=jnp.float32, interpret=CHECKED, **options,
  )  # fmt: skip
  return np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()


@pytest.mark.sampled(4)
@pytest.mark.parametrize("generation", ["v5e", "v6e"])
@pytest.mark.parametrize("name", FORMATS)
def test_formats(name, generation):
  fmt = FORMATS[name]
  assert run(fmt, 8, 512, 256, generation) < bound(fmt, jnp.bfloat16, 8, 512, 256, generation)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "e2m1_g128"])
def test_native_fp4(name):
  assert run(named()[name], 8, 512, 256, "tpu7x") < SUMS


# M = 1, rows that fill no tile, several steps in flight, a tail that is not a power of two of
# columns, K in several pieces, many rows (tiles).
SHAPES = {
  "one row": (1, 512, 256, {}),
  "odd rows": (13, 512, 128, {}),
  "steps": (16, 512, 1152, {"bn": 128, "sub": 128}),
  "parts": (16, 512, 1536, {"bn": 512, "sub": 128}),
  "pieces of K": (16, 3072, 256, {"bk": 1024}),
  "odd K": (8, 768, 256, {}),
  "tiles": (384, 512, 256, {"bm": 128, "bn": 128, "bk": 256}),
}


CUTS = ("parts", "pieces of K", "tiles")  # what scales and planes are cut by
SHAPED = [(name, shape) for name in ("int4", "int4_g128", "nvfp4") for shape in SHAPES]
SHAPED += [(name, shape) for name in ("int3_g128", "e4m3_128x128") for shape in CUTS]


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("name", "shape"), SHAPED)
def test_shapes(name, shape):
  m, k, n, blocks = SHAPES[shape]
  fmt = named()[name]
  if fmt.scale is None and fmt.block_n == 1 and m > 256:
    tolerance = bound(fmt, jnp.bfloat16, m, k, n, "v6e")
  else:
    tolerance = ONCE if m > 256 else SUMS
  assert run(fmt, m, k, n, blocks=blocks) < tolerance


NARROW = [("int4", "int8"), ("int8", "int8"), ("int4_g128", "int8"), ("e4m3_token", "e4m3")]


@pytest.mark.parametrize(("name", "x"), NARROW)
def test_narrow_activations(name, x):
  """Integer sums are exact in int32; only the scales are float32."""
  assert run(named()[name], 32, 512, 256, x=x) < SUMS


def test_integers_are_exact():
  """Int8 x int4 -> int32 is the integer product, bit for bit."""
  acts, _, weight, _ = operands(formats.INT4, 16, 512, 256, "int8")
  ones = jnp.ones((1, 256)), jnp.ones((16, 1))
  got = qmatmul(
    acts, weight.data, ones[0], formats.INT4, generation="v6e", x_scale=ones[1],
    out_dtype=jnp.float32, interpret=CHECKED,
  )  # fmt: skip
  want = np.asarray(acts, np.int64) @ np.asarray(jq.tensor.unpack(weight).data, np.int64)
  np.testing.assert_array_equal(np.asarray(got, np.int64), want)


def test_epilogue():
  """Bias and a low-rank branch beside the packed product."""
  m, k, n = 8, 512, 256
  acts, _, weight, want = operands(formats.INT4_G128, m, k, n)
  rng = np.random.default_rng(1)
  bias, xa, b = (rng.normal(size=s).astype(np.float32) for s in ((n,), (m, 4), (4, n)))
  got = qmatmul(
    acts, weight.data, weight.scale, formats.INT4_G128, generation="v6e", bias=jnp.asarray(bias),
    low_rank=(jnp.asarray(xa), jnp.asarray(b)), out_dtype=jnp.float32, interpret=CHECKED,
  )  # fmt: skip
  want = want + xa.astype(np.float64) @ b + bias
  assert np.abs(got - want).max() < SUMS * np.abs(want).max()


@pytest.mark.parametrize("block", [2, 16, 128, 512])
def test_rotated_input(block):
  """The rotation of x inside the kernel is the reference's, rounded to bf16 once."""
  acts, _, weight, _ = operands(formats.INT4, 8, 512, 256)
  got = qmatmul(
    acts, weight.data, weight.scale, formats.INT4, generation="v6e", hadamard=block,
    out_dtype=jnp.float32, interpret=CHECKED,
  )  # fmt: skip
  x = jnp.asarray(rotate(acts.astype(jnp.float32), block, -1), jnp.bfloat16)
  want = np.asarray(x, np.float64) @ np.asarray(jq.dequantize(weight), np.float64)
  # One rounding of x to bf16 may fall the other way where float32 sums differ in the last bit.
  assert np.abs(got - want).max() < 5e-4 * np.abs(want).max()


def test_rotation_refused():
  acts, _, weight, _ = operands(formats.INT4, 8, 512, 256)
  with pytest.raises(Unsupported, match="powers of two up to 1024"):
    qmatmul(acts, weight.data, weight.scale, formats.INT4, generation="v6e", hadamard=96)


@settings(max_examples=6, deadline=None)
@given(
  st.integers(1, 40), st.integers(1, 4), st.integers(1, 5), st.sampled_from(["int4", "nvfp4"]),
  st.integers(0, 99),
)  # fmt: skip
def test_any_shape(m, k, n, name, seed):
  assert run(named()[name], m, 256 * k, 128 * n, seed=seed) < SUMS


@pytest.mark.parametrize("elem", ["e4m3", "e2m1"])
def test_nan_is_seen(elem):
  """A lost block is NaN in the columns that it belongs to and nowhere else."""
  fmt = {"e4m3": formats.E4M3_TOKEN, "e2m1": formats.NVFP4}[elem]
  w = jnp.ones((256, 256)).at[5, 7].set(jnp.nan)
  q = jq.tensor.pack(jq.encode(w, fmt)) if elem == "e2m1" else None
  if q is None:
    q = jq.quantize(jnp.ones((256, 256)), fmt)
    q = q.replace(data=q.data.at[5, 7].set(jnp.nan))
  scale, outer = (q.scale.data, q.scale.scale) if elem == "e2m1" else (q.scale, None)
  got = qmatmul(
    jnp.ones((8, 256), jnp.bfloat16), q.data, scale, fmt, generation="v6e", outer=outer,
    interpret=CHECKED,
  )  # fmt: skip
  bad = np.isnan(np.asarray(got, np.float32)).all(0)
  assert bad.nonzero()[0].tolist() == [7]


def test_refusals_say_why():
  with pytest.raises(Unsupported, match=r"N=100 is not a multiple of 128"):
    plan(formats.INT4, 8, 256, 100, jnp.bfloat16, "v6e")
  with pytest.raises(Unsupported, match=r"K=200"):
    plan(formats.INT4, 8, 200, 128, jnp.bfloat16, "v6e")
  assert "generation" in why_not(formats.INT4, 8, 256, 128, jnp.bfloat16, "v9")
  assert "float32" in why_not(formats.INT4, 8, 256, 128, jnp.float32, "v6e")
  assert {"nf4_dq", "dyn8_g256", "fp4_ue5m3"} <= set(REFUSED)


# --- behind dispatch ------------------------------------------------------------------------------

RULES = {
  "w4a16": weight_only(formats.INT4_G128),
  "zero points": weight_only(formats.UINT4_G128),
  "offsets": weight_only(formats.UINT4_G32_OFFSET),
  "w8a8": Rule(x=Operand(formats.INT8), w=Operand(formats.INT8)),
  "nvfp4": Rule(x=Operand(formats.NVFP4), w=Operand(formats.NVFP4)),
}


@pytest.fixture
def on_v6e():
  # The TPU interpreter keeps its state behind ordered effects, which partitioned calls cannot have;
  # the generic one runs the same program.
  with target("tpu v6e"), interpreted(True):
    yield


def site(rule, m=16, k=512, n=512):
  rng = np.random.default_rng(2)
  x = jnp.asarray(rng.normal(size=(m, k)), jnp.bfloat16)
  w = jq.quantize(jnp.asarray(rng.normal(size=(k, n)) * 0.02, jnp.float32), rule.w.fmt)
  with target("cpu"):
    want = jax.jit(lambda x, w: jq.qdot(x.astype(jnp.float32), w, rule))(x, w)
  return x, w, np.asarray(want)


def close(got, want):
  """The kernel's result, rounded to bf16 at the end, against the float32 reference."""
  got = np.asarray(got, np.float32)
  assert got.shape == want.shape
  assert np.abs(got - want).max() < (ONCE + 2.0**-9) * np.abs(want).max()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", RULES)
def test_qdot(name, on_v6e):
  rule = RULES[name]
  x, w, want = site(rule)
  assert dispatch.choose(x, w).name == "pallas"
  dot = jax.jit(lambda x, w: jq.qdot(x, w, rule))
  close(dot(x, w), want)
  both = jnp.stack([x, 2 * x])
  close(jax.jit(jax.vmap(dot, (0, None)))(both, w)[0], want)
  stacked = jax.tree.map(lambda a: jnp.stack([a, a]), w)
  close(jax.jit(jax.vmap(dot))(both, stacked)[0], want)
  scan = jax.jit(lambda x, w: jax.lax.scan(lambda c, one: (c, dot(x, one)), 0, w)[1])
  close(scan(x, stacked)[1], want)
  dx = jax.jit(jax.grad(lambda x: dot(x, w).astype(jnp.float32).sum()))(x)
  assert dx.dtype == x.dtype
  want_dx = np.asarray(jq.dequantize(w)).sum(1)
  assert np.abs(np.asarray(dx, np.float32) - want_dx).max() < 0.05 * np.abs(want_dx).max()


SPECS = {"N": P(None, "a"), "K": P("a", None), "K and N": P("a", "b")}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize(
  ("name", "axes"), [(n, "K and N") for n in ("w4a16", "w8a8")] + [("nvfp4", a) for a in SPECS]
)
def test_sharded(name, axes, kind, on_v6e):
  rule, spec = RULES[name], SPECS[axes]
  x, w, want = site(rule, k=1024)
  mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(kind, kind), devices=jax.devices()[:4])
  with jax.set_mesh(mesh):
    got = jax.jit(lambda x, w: jq.qdot(x, w, rule))(
      jax.device_put(x, NamedSharding(mesh, P())), place(w, spec, mesh)
    )
  close(got, want)


@pytest.mark.parametrize("kind", [None, AxisType.Auto, AxisType.Explicit])
def test_rows_are_quantized_by_the_kernel(kind, on_v6e):
  """Int8 activations of a prompt: the kernel's bits are the reference's, sharded too."""
  x = jnp.asarray(np.random.default_rng(3).normal(size=(512, 256)), jnp.bfloat16)
  assert pallas.quantizes(x, formats.INT8)
  assert not pallas.quantizes(x[:16], formats.INT8)
  assert not pallas.quantizes(x, formats.NVFP4)
  want = jax.jit(lambda x: jq.quantize(x, formats.INT8, axis=-1))(x)
  call = jax.jit(lambda x: quantize_operand(x, Operand(formats.INT8), -1))
  if kind is None:
    got = call(x)
  else:
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(kind, kind), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
      got = call(jax.device_put(x, NamedSharding(mesh, P("a", None))))
  np.testing.assert_array_equal(np.asarray(got.data), np.asarray(want.data))
  np.testing.assert_array_equal(np.asarray(got.scale), np.asarray(want.scale))
  batched = jax.jit(jax.vmap(lambda x: quantize_operand(x, Operand(formats.INT8), -1)))
  if kind is None:
    np.testing.assert_array_equal(batched(jnp.stack([x, x])).data[1], want.data)


def test_what_is_not_claimed_runs_the_reference(on_v6e):
  w = jq.quantize(jnp.ones((256, 128)), formats.NF4_DQ)
  choice = dispatch.choose(jnp.ones((8, 256), jnp.bfloat16), w)
  assert choice.name == "dense"
  float32 = dispatch.choose(jnp.ones((8, 256)), jq.quantize(jnp.ones((256, 128)), formats.INT4))
  assert float32.name == "dense"


# --- compiled -------------------------------------------------------------------------------------


@pytest.mark.sampled(2)
@pytest.mark.parametrize("generation", ["v5e", "v5p", "v6e", "tpu7x"])
def test_compiles(generation):
  """Every format for every generation, few rows and (but for v5p) many, in one process."""
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip('libtpu is not installed: pip install "jaxquant[tpu-aot]"')
  from pallas_kernels.static_cost import costs

  made = {
    (name, m): case(generation, fmt=fmt, x=x, m=m, k=1024, n=512)
    for name, (fmt, x) in TABLE.items()
    for m in ((16,) if generation == "v5p" else (16, 512))  # the v5e's core, more of it
  }
  made |= {  # K in several pieces, of which scales take whole tiles
    (name, k): case(generation, fmt=TABLE[name][0], x="bf16", m=8, k=k, n=256)
    for name in ("int4-g128", "nvfp4", "mxfp8", "int8")
    for k in (14336, 3840)
  }
  results = dict(zip(made, costs(list(made.values()), generation)))
  assert {key: cost.error for key, cost in results.items() if cost.error} == {}
