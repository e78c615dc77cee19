"""Integers against floats: the theory's figures, what is measured, what training asks of both."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import formats as F
from jaxquant import observers, scales
from jaxquant.diagnostics import qsnr
from jaxquant.encoding import encode
from jaxquant.formats import Format
from jaxquant.ops.hadamard import RHT_SIGNS, rotate
from jaxquant.ops.qdot import FLOAT, qdot
from jaxquant.recipes.training import int_vs_fp
from jaxquant.rounding import ceil, nearest_even, stochastic
from jaxquant.tensor import dequantize, scale_values

PAIRS = {
  "8": (F.MXINT8, F.MXFP8),
  "6": (F.MXINT6, F.MXFP6_E2M3),
  "4": (F.MXINT4, F.MXFP4),
  "nv": (F.NVINT4, F.NVFP4),
}
M, K = 1024, 256


def outlier_channels(every, factor):
  """One channel in `every` is `factor` times larger."""
  gain = np.where(np.arange(K) % every == 5, factor, 1)
  return np.random.default_rng(0).standard_normal((M, K)) * gain


DATA = {
  "normal": lambda: np.random.default_rng(0).standard_normal((M, K)),
  "t5": lambda: np.random.default_rng(1).standard_t(5, (M, K)),
  "laplace": lambda: np.random.default_rng(2).laplace(size=(M, K)),
  "outliers": lambda: outlier_channels(128, 20),
}


@functools.cache
def data(name, rotation=None):
  x = jnp.asarray(DATA[name](), jnp.float32)
  return x if rotation is None else rotate(x, rotation)


FORMATS = [fmt for pair in PAIRS.values() for fmt in pair]
every_format = jax.jit(lambda x: [qsnr.measured(x, fmt) for fmt in FORMATS])


@functools.cache
def measured(name, rotation=None):
  """QSNR of all eight formats."""
  return dict(zip(FORMATS, map(float, every_format(data(name, rotation))), strict=True))


@pytest.mark.parametrize(
  ("pair", "published"), [("8", 7.55), ("6", 1.96), ("4", 2.04), ("nv", 2.39)]
)
def test_crossovers(pair, published):
  """7.542 at 8 bits: the paper's constants in dB, 10.8 and 6.02, are rounded and give 7.546."""
  assert qsnr.crossover(*PAIRS[pair]) == pytest.approx(published, abs=0.008)


def test_decibels_of_theorem_1():
  """10.8 + 6.02 (b - 1) - 20 log10(r) - 20 log10(k), to the paper's rounding."""
  for bits in (4, 6, 8):
    want = 10.8 + 6.02 * (bits - 1) - 20 * np.log10(1.5) - 20 * np.log10(3.0)
    assert -10 * np.log10(qsnr.int_error(bits, 3.0, 1.5)) == pytest.approx(want, abs=0.015)


def test_no_block_of_32_prefers_mxfp8():
  """The largest crest factor of a block, sqrt(32), is below the crossover."""
  k = np.linspace(1, np.sqrt(32), 200)
  assert (qsnr.expected_qsnr(*PAIRS["8"][:1], k) > qsnr.expected_qsnr(F.MXFP8, k)).all()
  spike = jnp.zeros((1, 32)).at[0, 3].set(-2.0)
  assert float(qsnr.crest_factor(spike, 32)[0, 0]) == pytest.approx(np.sqrt(32), rel=1e-6)
  assert float(qsnr.crest_factor(jnp.zeros((1, 32)), 32)[0, 0]) == 1


# dB; a normal is in test_formats. Published figures of 1M samples of t5, then after a 16-rotation.
T5 = {None: {F.NVFP4: 20.7, F.NVINT4: 19.8}, 16: {F.NVFP4: 20.4, F.NVINT4: 21.6}}


@pytest.mark.parametrize("rotation", T5)
def test_qsnr_of_student_t(rotation):
  for fmt, want in T5[rotation].items():
    assert measured("t5", rotation)[fmt] == pytest.approx(want, abs=0.2)


@pytest.mark.parametrize("name", ["t5", "outliers"])
def test_rotation_turns_the_order_of_nvint4_and_nvfp4(name):
  before, after = measured(name), measured(name, 16)
  assert before[F.NVFP4] > before[F.NVINT4] + 0.5
  assert after[F.NVINT4] > after[F.NVFP4] + 0.5


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("rotation", [None, 16])
def test_mxint8_is_above_mxfp8(name, rotation):
  assert measured(name, rotation)[F.MXINT8] > measured(name, rotation)[F.MXFP8] + 3


@pytest.mark.parametrize("name", ["normal", "t5", "laplace"])
@pytest.mark.parametrize("rotation", [None, 16])
def test_theory_is_close_to_measurement(name, rotation):
  """Of independent elements: within .7 dB, but 4-bit integers, whose 7 steps count as 8: 1.1."""
  for fmt, found in measured(name, rotation).items():
    off = qsnr.predicted(data(name, rotation), fmt) - found
    assert -0.4 < off < (1.1 if fmt in (F.MXINT4, F.NVINT4) else 0.7), fmt


def test_theory_names_the_winner():
  """Of each pair that is measured more than half a dB apart."""
  clear = 0
  for name, rotation in itertools.product(DATA, (None, 16)):
    found, x = measured(name, rotation), data(name, rotation)
    for integer, floating in PAIRS.values():
      ahead = found[integer] - found[floating]
      expected = qsnr.predicted(x, integer) - qsnr.predicted(x, floating)
      clear += abs(ahead) > 0.5
      assert abs(ahead) < 0.5 or np.sign(ahead) == np.sign(expected), (name, rotation, integer)
  assert clear >= 24  # of 32


@pytest.mark.parametrize("fmt", [F.NF4_G64, F.UINT4_G128, F.INT8, F.UINT4_G32_OFFSET], ids=str)
def test_theory_says_what_it_does_not_cover(fmt):
  with pytest.raises(ValueError, match="measure"):
    qsnr.expected_error(fmt, 2.0)


def test_crossover_needs_one():
  with pytest.raises(ValueError, match=r"mxint8 must win at 1\.2 and mxfp8 at 5"):
    qsnr.crossover(F.MXINT8, F.MXFP8, hi=5.0)


def test_rht_lowers_crest_factors():
  """3.55 -> 1.55 with an outlier channel of 20 in each block; a rotation, so lengths stay."""
  x = jnp.asarray(outlier_channels(16, 20), jnp.float32)
  y = rotate(x, 16, -1, RHT_SIGNS)
  mean_crest = jax.jit(lambda x: qsnr.crest_factor(x, 16).mean())
  assert float(mean_crest(x)) == pytest.approx(3.55, abs=0.01)
  assert float(mean_crest(y)) == pytest.approx(1.55, abs=0.01)
  length = lambda a: np.linalg.norm(np.asarray(a, np.float64), axis=-1)
  np.testing.assert_allclose(length(y), length(x), rtol=1e-6)


# Symmetric clipping.

FULL8 = Format(F.UniformGrid("fixed8f", 8, -2.0, 127 / 64, 1 / 64), 32, scale=F.E8M0)


@pytest.mark.parametrize(("fmt", "symmetric"), [(F.MXINT8, True), (FULL8, False)], ids=str)
def test_symmetric_clipping_has_no_bias(fmt, symmetric):
  """With -128, the smallest of a block saturates less than the largest: sign symmetry is lost."""
  x = np.random.default_rng(0).standard_normal((512, 256)).astype(np.float32)

  @jax.jit
  def decoded(x):
    q = encode(x, fmt, rule=scales.ocp_floor)
    return q.data * 64, dequantize(q) - x

  codes, error = decoded(x)
  assert ((np.asarray(codes) == -128).any()) == (not symmetric)
  _, mirrored = decoded(-x)
  assert bool((error == -mirrored).all()) == symmetric
  bias = float((error + mirrored).sum()) / np.abs(error).sum()
  assert (bias == 0) if symmetric else (bias < -1e-4)


def test_symmetric_clipping_in_bfloat16():
  """The paper's case: amax / 127 and x / scale in bfloat16 reach -128 without any saturation."""
  x = jnp.asarray(np.random.default_rng(0).standard_normal((4096, 32)), jnp.bfloat16)
  t = jnp.round(x / (jnp.abs(x).max(-1, keepdims=True) / jnp.bfloat16(127)))
  t = np.asarray(t, np.float32)
  assert (np.abs(t) == 128).mean() > 1e-3
  full, symmetric = np.clip(t, -128, 127), np.clip(t, -127, 127)
  assert (symmetric != -128).all()
  assert full.min() == -128
  assert np.clip(-t, -127, 127).sum() == -symmetric.sum()
  assert np.clip(-t, -128, 127).sum() + full.sum() < -100  # once more negative than its mirror


@pytest.mark.parametrize("fmt", [F.MXINT8, F.MXFP8], ids=str)
def test_mean_error_is_noise(fmt):
  x = np.random.default_rng(7).standard_normal((512, 512)).astype(np.float32)
  error = np.asarray(jax.jit(lambda x: dequantize(encode(x, fmt, rule=scales.ocp_ceil)) - x)(x))
  assert abs(error.mean(dtype=np.float64)) < 4 * error.std() / np.sqrt(x.size)


# Stochastic rounding where nearest is stuck.


@pytest.mark.parametrize(
  ("rounding", "reached"), [(nearest_even, 0.0), (stochastic, 0.02)], ids=["nearest", "stochastic"]
)
def test_stochastic_rounding_rescues_small_gradients(rounding, reached):
  """One block of 16: a gradient of +-1 hides those of w - .02, by gradient descent at .02."""
  fmt = Format(F.E2M1, 16, scale=F.PER_TENSOR_E4M3)

  def step(w, i):
    g = (w - 0.02).at[0].set(jnp.where(i % 2, 1.0, -1.0))
    key = jax.random.fold_in(jax.random.key(0), i)
    q = dequantize(encode(g[None], fmt, axis=-1, rounding=rounding, key=key))[0]
    return w - 0.02 * q, w

  w, path = jax.jit(lambda w: jax.lax.scan(step, w, jnp.arange(4000)))(jnp.zeros(16))
  if rounding is nearest_even:
    np.testing.assert_array_equal(w[1:], np.zeros(15))
  else:  # the mean of the last half: the single steps are a random walk of .003
    assert float(path[2000:, 1:].mean()) == pytest.approx(reached, abs=1.5e-3)


# Scale rules of this study.


@functools.partial(jax.jit, static_argnums=(0, 1))
def errors(fmt, rule, x):
  """Mean absolute and mean squared error."""
  d = dequantize(encode(x, fmt, rule=rule)) - x
  return jnp.abs(d).mean(), jnp.square(d).mean()


def test_four_over_six_by_absolute_error():
  """Transformer Engine's default: each norm is best at itself, both beat one candidate."""
  x = np.random.default_rng(1).standard_normal((256, 512)).astype(np.float32)
  one, two = (functools.partial(scales.four_over_six, norm=n) for n in (1, 2))
  rules = (one, two, functools.partial(scales.nvfp4, bound=256.0))
  mae, mse = zip(*(map(float, errors(F.NVFP4, rule, x)) for rule in rules), strict=True)
  assert mae[0] < mae[1] < mae[2]
  assert mse[1] < mse[0] < mse[2]
  assert mse[0] == pytest.approx(0.0078, abs=1e-4)


TWO_LEVELS = {
  "e4m3": (F.PER_TENSOR_E4M3, 448.0, nearest_even),
  "ue5m3": (F.PER_TENSOR_UE5M3, 114688.0, nearest_even),
  "e8m0": (Format(F.E8M0, None, None), 1.0, ceil),
}


@pytest.mark.parametrize("name", TWO_LEVELS)
def test_tensor_scaled(name):
  """Its formula; the block of the largest element has the largest scale; zeros stay zeros."""
  store, bound, rounding = TWO_LEVELS[name]
  fmt = Format(F.E2M1, 16, scale=store)
  x = np.random.default_rng(0).standard_normal((64, 24)).astype(np.float32)
  x *= np.exp2(np.arange(24) - 12)
  x[:16, 3] = 0
  rule = scales.tensor_scaled(bound, rounding)

  @jax.jit
  def run(x):
    q = encode(x, fmt, rule=rule)
    return q, dequantize(q), scale_values(q.scale)

  q, y, effective = run(x)
  a = np.abs(x).reshape(4, 16, 24).max(1)
  tensor = a.max() / np.float32(6 * bound)
  np.testing.assert_array_max_ulp(np.asarray(q.scale.scale).item(), tensor, 1)
  block = np.asarray(q.scale.data)
  assert block.max() == bound == block[a == a.max()].item()
  wanted = np.minimum(a / np.float32(6) / tensor, bound)
  relative = block[wanted >= 2.0**-6] / wanted[wanted >= 2.0**-6]
  lo, hi = (1 - 1e-6, 2) if rounding is ceil else (1 - 2.0**-4, 1 + 2.0**-4)
  assert ((relative >= lo) & (relative <= hi)).all()
  assert not np.asarray(y)[:16, 3].any()
  if rounding is ceil:  # nothing clips
    assert (np.abs(x) <= 6 * (1 + 1e-6) * np.repeat(effective, 16, 0)).all()
  again = run(x * np.float32(2.0**20))[1]
  np.testing.assert_array_equal(again, y * 2.0**20)  # no range to leave


def test_range_that_needs_a_tensor_scale():
  """Scales of gradients, 2^-16: E4M3 alone flushes all of them, UE5M3 and E8M0 keep them."""
  x = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32) * np.float32(2.0**-16)
  power = np.square(x).mean()
  relative = lambda store, rule: errors(Format(F.E2M1, 32, scale=store), rule, x)[1] / power
  assert relative(F.E4M3, scales.absmax) == 1
  assert relative(F.PER_TENSOR_E4M3, scales.tensor_scaled(448.0)) < 0.012
  assert relative(F.E8M0, scales.ocp_ceil) < 0.015


def test_smoothed_maximum():
  """Sharpness 0 is the mean, 1e4 the maximum; in between its formula, and a gradient to each."""
  x = np.random.default_rng(0).standard_normal((128, 24)).astype(np.float32)
  blocks = np.abs(x).reshape(4, 32, 24).astype(np.float64)
  p = np.exp(16 * (blocks / blocks.max(1, keepdims=True) - 1))
  want = {0.0: blocks.mean(1), 16.0: (p * blocks).sum(1) / p.sum(1), 1e4: blocks.max(1)}

  @jax.jit
  def run(x):
    total = lambda x, s: (encode(x, F.INT4_G32, rule=observers.smoothed(s)).scale * 7).sum()
    scale = {s: encode(x, F.INT4_G32, rule=observers.smoothed(s)).scale for s in want}
    return scale, jax.grad(total)(x, 16.0)

  found, gradient = run(x)
  for sharpness, bound in want.items():
    np.testing.assert_allclose(found[sharpness] * 7, bound, rtol=2e-6)
  assert np.count_nonzero(gradient) == x.size
  assert not np.asarray(run(np.zeros_like(x))[0][16.0]).any()


# The recipe.


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_int_vs_fp(fmt):
  """Six operands or two, powers of two rounded up, and a rotation that cancels."""
  for training, operands in ((True, 6), (False, 2)):
    rule = int_vs_fp(fmt, training=training).rule("layers/mlp/up")
    used = [o for o in rule.operands.values() if o.fmt is not None]
    assert len(used) == operands
    assert {(o.fmt, o.scales) for o in used} == {
      (fmt, scales.ocp_ceil if "mx" in str(fmt) else None)
    }
  assert int_vs_fp(fmt).rule("head") == FLOAT


def test_rotation_helps_nvint4_in_a_product():
  """x with outlier channels: the error of y = x w falls below that of NVFP4."""
  x = data("outliers")[:64]
  w = jnp.asarray(np.random.default_rng(3).standard_normal((K, 64)), jnp.float32)
  exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)

  settings = [(f, r) for f in (F.NVINT4, F.NVFP4) for r in (None, 16)]
  rules = [int_vs_fp(f, training=False, rotation=r).rule("up") for f, r in settings]
  products = jax.jit(lambda: [qdot(x, w, rule) for rule in rules])()
  error = lambda y: np.linalg.norm(y - exact) / np.linalg.norm(exact)
  found = dict(zip(settings, map(error, products), strict=True))
  assert found[F.NVINT4, 16] < found[F.NVFP4, 16] < 0.2
  assert found[F.NVINT4, 16] < min(found[F.NVINT4, None], found[F.NVFP4, None])
