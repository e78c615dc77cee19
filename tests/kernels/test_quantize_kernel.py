"""The quantizing kernels against `jaxquant.quantize`, bit for bit, in TPU interpret mode.

Memory that nothing wrote is NaN and races are detected. Whether the compilers take the kernels is
tested with libtpu, without a TPU.
"""

import functools
import importlib.util
import itertools
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import jaxquant as jq
from jaxquant import formats as F
from jaxquant import scales
from jaxquant.ops.hadamard import RHT_SIGNS, rotate
from pallas_kernels.quantize import cases, elements, quantize, rules, supports

INTERPRET = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
BF16, F32 = jnp.bfloat16, jnp.float32


def tensor(shape, dtype=BF16, seed=0):
  """Heavy-tailed values over many binades, of both signs, with zeros of both signs."""
  rng = np.random.default_rng(seed)
  x = rng.standard_normal(shape) * np.exp(2 * rng.standard_normal(shape))
  return jnp.asarray(np.where(rng.random(shape) < 0.02, np.copysign(0.0, x), x), dtype)


def reference(x, fmt, axis, rule=None, key=None):
  """(data, scale[, tensor scale]) of the specification, under jit: eager calls refuse NaN."""
  rule = getattr(scales, rule) if rule else None
  more = {} if key is None else {"rounding": jq.rounding.stochastic, "key": key}
  q = _jitted(jq.quantize, fmt=fmt, axis=axis, rule=rule, **more)(x)
  return (q.data, q.scale.data, q.scale.scale) if hasattr(q.scale, "fmt") else (q.data, q.scale)


def kernel(x, fmt, axis, **options):
  return _jitted(quantize, fmt=fmt, axis=axis, interpret=INTERPRET, **options)(x)


@functools.cache  # compiled once for all inputs of a shape: compilation is what these tests cost
def _by_options(function, options):
  return jax.jit(functools.partial(function, **dict(options)))


def _jitted(function, **options):
  if any(isinstance(value, jax.Array) for value in options.values()):
    return jax.jit(functools.partial(function, **options))
  return _by_options(function, tuple(options.items()))


def bits(x):
  x = np.asarray(x)
  return x.view({1: np.uint8, 4: np.uint32}[x.dtype.itemsize])


def assert_equal_bits(got, want):
  assert [(a.shape, a.dtype) for a in got] == [(a.shape, a.dtype) for a in want]
  for a, b in zip(got, want):
    np.testing.assert_array_equal(bits(a), bits(b))


CLAIMED = {
  "nvfp4": F.NVFP4, "nvint4": F.NVINT4, "mxfp8": F.MXFP8, "mxfp8_e5m2": F.MXFP8_E5M2,
  "mxfp4": F.MXFP4, "mxint8": F.MXINT8, "mxint4": F.MXINT4, "int8_g128": F.INT8_G128,
  "int4_g128": F.INT4_G128, "int4_g64": F.INT4_G64, "int4_g32": F.INT4_G32,
  "e4m3_g128": F.E4M3_G128, "e4m3_g128_e8m0": F.E4M3_G128_E8M0, "fp4_ue5m3": F.FP4_UE5M3,
  "fp4_ue5m3_tensor": F.FP4_UE5M3_TENSOR, "int8": F.INT8, "e4m3": F.E4M3_TOKEN,
  "e5m2": F.E5M2_TOKEN,
}  # fmt: skip


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
  ("name", "axis"), [(name, -1 - i % 2) for i, name in enumerate(CLAIMED)]
)  # a case takes 2 s to compile; the tests below have the chief formats on the other axis
def test_codes_and_scales_are_those_of_the_reference(name, axis):
  x = tensor((256, 256), BF16 if (len(name) + axis) % 2 else F32)
  assert_equal_bits(kernel(x, CLAIMED[name], axis), reference(x, CLAIMED[name], axis))


@pytest.mark.parametrize(("fmt", "axis"), [(F.MXFP8, -1), (F.MXFP4, -2)], ids=str)
def test_arithmetic_on_pairs_has_the_same_bits(fmt, axis):
  x = tensor((256, 256))
  assert_equal_bits(kernel(x, fmt, axis, generation="v6e"), reference(x, fmt, axis))


@pytest.mark.parametrize("power", [True, False], ids=["exact ties", "inexact"])
@pytest.mark.parametrize("axis", [-1, -2])
def test_nvfp4_thresholds_are_where_the_product_rounds_up(axis, power):
  """The ties of E2M1 times block scales, and the bfloat16 on either side of them.

  With a tensor scale of a power of two they are ties of the reference's product too.
  """
  rng = np.random.default_rng(0)
  ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
  scale = (8 + rng.integers(0, 8, (256, 16, 1))) / 8 * np.exp2(rng.integers(-6, 8, (256, 16, 1)))
  values = np.concatenate([rng.choice(ties, (256, 16, 15)), np.full((256, 16, 1), 6.0)], -1)
  exact = jnp.asarray((values * scale).reshape(256, 256), BF16)
  code = jax.lax.bitcast_convert_type(exact, jnp.int16)
  off = rng.integers(-1, 2, (256, 16, 16)) * (values < 6)
  x = jax.lax.bitcast_convert_type(code + jnp.asarray(off.reshape(256, 256), jnp.int16), BF16)
  x = (x if power else x * BF16(1.37)).at[0, 15].set(448 * 6 * (1 if power else 1.4))
  x = x * jnp.asarray(rng.choice([-1, 1], x.shape), BF16)
  x = x if axis == -1 else x.T
  assert_equal_bits(kernel(x, F.NVFP4, axis, generation="v6e"), reference(x, F.NVFP4, axis))


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
  ("fmt", "rule"), [(F.MXFP8, "ocp_ceil"), (F.MXFP4, "ocp_ceil"), (F.NVFP4, "absmax")], ids=str
)
def test_other_rules(fmt, rule):
  x = tensor((8, 256))
  assert_equal_bits(kernel(x, fmt, -1, rule=rule), reference(x, fmt, -1, rule))


EXTREMES = {
  "zeros": lambda x: x * 0,
  "zero blocks": lambda x: x.at[3].set(0).at[:, 128:256].set(-0.0),
  "huge": lambda x: x.at[::7].multiply(1e37),
  "tiny": lambda x: x * 1e-37,
  "small": lambda x: x * 1e-20,
  "subnormal": lambda x: x.at[:, :64].set(1e-40),
  "ties": lambda x: jnp.round(x * 4) / 4,
  "nan": lambda x: x.at[5, 17].set(jnp.nan).at[6, 200].set(jnp.inf).at[7, 3].set(-jnp.inf),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", EXTREMES)
@pytest.mark.parametrize(
  ("fmt", "axis"),
  [(F.NVFP4, -1), (F.MXFP8, -2), (F.INT8, -1), (F.E4M3_TOKEN, -2)],
  ids=str,
)
def test_extremes(fmt, axis, case):
  x = EXTREMES[case](tensor((64, 256)).astype(F32)).astype(BF16)
  assert_equal_bits(kernel(x, fmt, axis, generation="v6e"), reference(x, fmt, axis))


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("fmt", "axis"), [(F.NVFP4, -1), (F.MXFP8, -2), (F.INT8, -1)], ids=str)
def test_stochastic_rounding_uses_the_noise_of_the_reference(fmt, axis):
  x, key = tensor((48, 256), F32), jax.random.key(3)
  assert_equal_bits(kernel(x, fmt, axis, key=key), reference(x, fmt, axis, key=key))


def test_noise_is_that_of_the_reference():
  key = jax.random.key(11)
  index = jnp.arange(1000, dtype=jnp.uint32)
  words = elements.key_words(key)
  np.testing.assert_array_equal(elements.noise(index, *words), jq.rounding.uniform(key, (1000,)))


def magnitudes(grid, codes):
  """Values of the codes of a float grid without their sign."""
  e, m = codes >> grid.mantissa, codes % (1 << grid.mantissa)
  normal = np.ldexp(1 + m / 2**grid.mantissa, e - 1 + grid.emin)
  return np.where(e == 0, np.ldexp(m, grid.emin - grid.mantissa), normal)


ALL_BITS = np.arange(2**elements.DITHER, dtype=np.int32)


@pytest.mark.parametrize("grid", [F.E2M1, F.E4M3, F.E5M2], ids=lambda g: g.name)
def test_random_bits_round_float_grids_without_bias(grid):
  """Over all 2^16 values of the bits the mean is the value, to half of 2^-16 steps."""
  points = magnitudes(grid, np.arange(64 if grid.bits == 8 else 8))
  a = np.random.default_rng(0).uniform(size=60) ** 3 * min(grid.max, 64)
  a = np.concatenate([a, points[points <= grid.max]]).astype(np.float32)
  codes = elements.magnitude(jnp.asarray(a)[:, None], grid, jnp.asarray(ALL_BITS))
  values = magnitudes(grid, np.asarray(codes) & ((1 << grid.bits - 1) - 1))
  step = np.exp2(np.maximum(np.floor(np.log2(np.maximum(a, 1e-30))), grid.emin) - grid.mantissa)
  np.testing.assert_array_less(np.abs(values.mean(1) - a), step * (2.0**-17 + 2.0**-30))
  np.testing.assert_array_equal(values[60:], np.broadcast_to(a[60:, None], values[60:].shape))


@pytest.mark.parametrize("fmt", [F.INT8, F.INT4, F.MXINT8], ids=str)
def test_random_bits_round_integers_without_bias(fmt):
  """As for float grids; 14 of the bits count beside 8-bit codes: half of 2^-14 steps."""
  grid = fmt.elem
  t = np.random.default_rng(0).uniform(grid.min, grid.max, 60)
  t = np.concatenate([t, np.arange(-7, 8) * grid.step]).astype(np.float32)
  codes = elements.integer_code(jnp.asarray(t)[:, None], grid, jnp.asarray(ALL_BITS))
  half = 1 << grid.bits - 1
  values = ((np.asarray(codes) + half) % (2 * half) - half) * grid.step
  bound = grid.step * 2.0 ** (-17 if grid.bits == 4 else -15)
  assert np.abs(values.mean(1) - t).max() <= bound
  np.testing.assert_array_equal(values[60:], np.broadcast_to(t[60:, None], values[60:].shape))


@pytest.mark.parametrize(
  ("fmt", "axis", "bits"),
  [
    (F.MXFP8, -1, "hardware"),
    (F.MXFP8, -2, "hardware"),
    (F.INT8, -1, "hardware"),
    (F.MXFP8, -2, "hash"),
    (F.INT8, -1, "hash"),
  ],
  ids=str,
)
def test_stochastic_rounding_is_unbiased(fmt, axis, bits, monkeypatch):
  """256 equal blocks rounded with different noise: the mean is the value, to 6 deviations.

  Interpret mode has no generator (it gives zeros): a hash of the position stands for it.
  """
  calls = itertools.count(1)

  def random_bits(n):
    at = jax.lax.broadcasted_iota(jnp.uint32, (n, 128), 0) * 128
    at = at + jax.lax.broadcasted_iota(jnp.uint32, (n, 128), 1)
    word = elements.noise(at, jnp.uint32(next(calls)), jnp.uint32(7)) * 2.0**16
    other = elements.noise(at, jnp.uint32(next(calls)), jnp.uint32(7)) * 2.0**16
    return word.astype(jnp.int32), other.astype(jnp.int32)

  monkeypatch.setattr(elements, "random_bits", random_bits)
  row = np.asarray(tensor((256,)), np.float32)
  x = jnp.asarray(np.tile(row, (256, 1)), BF16)
  x = x if axis == -1 else x.T
  data, scale = kernel(x, fmt, axis, key=jax.random.key(5), bits=bits)
  data, scale = (np.asarray(a.astype(F32)) for a in (data, scale))
  if axis == -2:
    data, scale = data.T, scale.T
  t = row / np.repeat(scale[0], 256 // scale.shape[1])
  if fmt is F.INT8:
    step = np.ones(256)
  else:
    e = np.floor(np.log2(np.maximum(np.abs(t), 1e-30)))
    step = np.exp2(np.maximum(e, fmt.elem.emin) - fmt.elem.mantissa)
  inside = np.abs(t) <= fmt.elem.max
  off = ((data - t) / step)[:, inside]
  assert np.abs(off).max() <= 1
  assert (off != 0).mean() > 0.5
  assert abs(off.mean()) < 6 * 0.5 / np.sqrt(off.size)
  assert np.abs(off.mean(0)).max() < 6 * 0.5 / np.sqrt(len(off))


def test_bits_of_another_name_are_refused():
  with pytest.raises(ValueError, match="'hash' or 'hardware'"):
    quantize(jnp.ones((8, 256)), F.INT8, key=jax.random.key(0), bits="threefry")


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
  ("n", "axis", "signs"), [(16, -1, RHT_SIGNS), (128, -1, None), (256, -2, None)]
)
def test_hadamard(n, axis, signs):
  """Sums in float32 in another order: exact for n = 16, where nothing is lost.

  Otherwise a value next to a rounding boundary may go to the neighbour: at most one code in 1000.
  """
  x = jnp.asarray(np.random.default_rng(1).integers(-64, 65, (256, 512)), BF16)
  y = rotate(x, n, axis, signs)
  got, want = kernel(x, F.MXFP8, axis, hadamard=n, signs=signs), reference(y, F.MXFP8, axis)
  if n in (16, 256):  # powers of four: the gain is a power of two, integer sums are exact
    assert_equal_bits(got, want)
  else:
    np.testing.assert_array_equal(bits(got[1]), bits(want[1]))
    assert np.mean(bits(got[0]) != bits(want[0])) <= 1e-3


def test_a_given_tensor_maximum_is_the_one_found():
  x = tensor((16, 256))
  given = kernel(x, F.NVFP4, -1, tensor_amax=jnp.abs(x.astype(F32)).max())
  assert_equal_bits(given, kernel(x, F.NVFP4, -1))


@hypothesis.settings(max_examples=3)
@hypothesis.given(
  rows=st.integers(1, 300), columns=st.integers(1, 300), axis=st.sampled_from((-1, -2)),
  fmt=st.sampled_from((F.NVFP4, F.MXFP8, F.INT8, F.INT4_G32)), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(rows, columns, axis, fmt, seed):
  x = tensor((rows, columns), seed=seed)
  if fmt.elem.bits == 4 and x.shape[axis] % 2:
    x = jnp.concatenate([x, x], axis)
  assert_equal_bits(kernel(x, fmt, axis, generation="v6e"), reference(x, fmt, axis))


REFUSED = {
  "codebook": (F.NF4_G64, {}, "table"),
  "zero point": (F.UINT4_G128, {}, "zero point"),
  "6 bits": (F.MXFP6_E2M3, {}, "e2m3"),
  "tile": (F.E4M3_128X128, {}, "blocks of 128 along the other axis"),
  "per tensor": (F.INT8_TENSOR, {}, "along the other axis"),
  "4-bit tokens": (F.INT4, {}, "4-bit codes of whole rows"),
  "rule": (F.MXFP4, {"rule": "quest"}, "quest"),
  "rule of another format": (F.MXFP4, {"rule": "nvfp4"}, "nvfp4"),
  "rotation": (F.NVFP4, {"hadamard": 24}, "24"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_format_and_the_reason(case):
  fmt, options, reason = REFUSED[case]
  assert reason in supports(fmt, **options)
  with pytest.raises(ValueError, match=str(fmt).split("_")[0]):
    quantize(jnp.ones((8, 256)), fmt, **options)


def test_defaults_are_those_of_the_package():
  for name, fmt in CLAIMED.items():
    assert rules.default(fmt) == scales.default_rule(fmt).__name__, name


GENERATIONS = ("v5e", "v6e", "tpu7x")
ON_ALL = re.compile(r"quantize/(nvfp4|mxfp8|int8-token)/axis")


@pytest.mark.sampled(3)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_compiles(generation):
  """In one process: the chief cases, and each other registered case on one of the generations."""
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip('libtpu is not installed: pip install "jaxquant[tpu-aot]"')
  from pallas_kernels.static_cost import costs

  turn = GENERATIONS.index(generation)
  made = {
    name: make.func(generation, **make.keywords, m=256, k=1024)
    for i, (name, make) in enumerate(cases.CASES.items())
    if i % 3 == turn or ON_ALL.match(name)
  }
  results = dict(zip(made, costs(list(made.values()), generation)))
  assert {name: cost.error for name, cost in results.items() if cost.error} == {}
