"""Scale rules that have no published vector: against their formula in numpy, and their promise."""

import doctest
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import formats as F
from jaxquant import observers, scales
from jaxquant.encoding import encode
from jaxquant.formats import Format
from jaxquant.rounding import round_to
from jaxquant.tensor import QTensor, dequantize, scale_values, to_blocks

K, N = 128, 24
X = np.random.default_rng(0).standard_normal((K, N)).astype(np.float32)
X *= np.float32(2.0) ** np.arange(-12, N - 12)
INT4_G32 = F.INT4_G32


@functools.cache
def run(fmt, rule):
  return jax.jit(lambda x: (encode(x, fmt, rule=rule), dequantize(encode(x, fmt, rule=rule))))


def blocks(fmt, x=X):
  return np.asarray(to_blocks(jnp.asarray(x), fmt, -2))


def error(fmt, rule, x=X):
  y = np.asarray(run(fmt, rule)(x)[1])
  return np.square(blocks(fmt, y) - blocks(fmt, x)).sum((-3, -1))


RULES = {
  "absmean": (INT4_G32, scales.absmean),
  "clipped": (INT4_G32, scales.clipped(0.75)),
  "deepseek": (F.E4M3_G128, scales.deepseek),
  "deepseek_e8m0": (F.E4M3_G128_E8M0, scales.deepseek),
  "encode_e4m3": (
    Format(F.E2M1, 16, scale=F.reciprocal_grid(F.E4M3)),
    scales.encode_domain(F.E4M3),
  ),
  "four_over_six": (F.NVFP4, scales.four_over_six),
  "fp8_pow2": (F.E5M2_TOKEN, scales.fp8_scale_pow2),
  "minmax": (F.UINT4_G128, scales.minmax),
  "mse": (INT4_G32, observers.mse(scales.absmax, candidates=8)),
  "ocp_round": (F.MXFP4, scales.ocp_round),
  "quest": (F.MXFP4, scales.quest),
  "rms": (INT4_G32, scales.rms(2.5)),
  "shrunk": (F.NVFP4, functools.partial(scales.nvfp4, top=6 * 16 / 17)),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", RULES)
def test_eager_is_jit(name):
  fmt, rule = RULES[name]
  eager = encode(X, fmt, rule=rule)
  jitted = run(fmt, rule)(X)[0]
  for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
    np.testing.assert_array_equal(a, b)


def test_formulas():
  """In numpy, float32, as the docstrings write them."""
  b = blocks(INT4_G32)
  a = np.abs(b).max((-3, -1))
  found = lambda fmt, rule: np.asarray(scale_values(run(fmt, rule)(X)[0].scale))
  np.testing.assert_array_equal(found(INT4_G32, None), a / np.float32(7))
  clipped = RULES["clipped"][1]
  np.testing.assert_array_equal(found(INT4_G32, clipped), a * np.float32(0.75) / np.float32(7))
  np.testing.assert_allclose(
    found(INT4_G32, scales.absmean), np.abs(b).mean((-3, -1)) / 7, rtol=1e-6
  )
  np.testing.assert_allclose(
    found(INT4_G32, RULES["rms"][1]), 2.5 * np.sqrt(np.square(b).mean((-3, -1))) / 7, rtol=1e-6
  )
  exact = np.exp2(np.round(np.log2(a.astype(np.float64) / 6)))
  np.testing.assert_array_equal(found(F.MXFP4, scales.ocp_round), exact)
  ceil = np.exp2(np.ceil(np.log2(a.astype(np.float64) / 448)))
  np.testing.assert_array_equal(found(F.MXFP8, scales.ocp_ceil), ceil)


@pytest.mark.parametrize("fmt", [F.MXFP4, F.MXFP8, F.MXFP8_E5M2, F.MXINT8, F.MXINT4], ids=str)
def test_ceil_is_exact_at_its_edges(fmt):
  """Amax = max * 2^k and its neighbours: a reciprocal or a log2 is wrong for some of them."""
  edge = np.float32(fmt.elem.max) * np.exp2(np.arange(-40, 40)).astype(np.float32)
  a = np.concatenate(
    [edge, np.nextafter(edge, np.float32(0)), np.nextafter(edge, np.float32(1e38))]
  )
  want = np.exp2(np.ceil(np.log2(a.astype(np.longdouble) / fmt.elem.max)))
  x = np.zeros((32, len(a)), np.float32)
  x[7] = a
  q, y = run(fmt, scales.ocp_ceil)(x)
  np.testing.assert_array_equal(np.asarray(q.scale)[0], want.astype(np.float32))
  assert (np.abs(y[7]) <= np.float32(fmt.elem.max) * want).all()


def test_minmax_keeps_zero_and_both_ends():
  x = np.abs(X) + 1
  x[5] = 0
  for given in (X, x, -x):
    q, y = run(F.UINT4_G128, scales.minmax)(given)
    step = np.asarray(q.scale)
    assert (np.abs(np.asarray(y) - given) <= step * (0.5 + 1e-3) + 0.5 * step).all()
    assert not np.asarray(y)[given == 0].any()
    zero = np.asarray(q.zero_point)
    assert ((zero >= -8) & (zero <= 7) & (zero == np.round(zero))).all()
  half = Format(F.int_grid(4, full=True), 128, scale=F.FP16, zero_point=True)
  q = run(half, scales.minmax)(X / 64)[0]
  assert (np.asarray(q.scale) == np.asarray(q.scale).astype(np.float16)).all()


def test_from_min_of_a_constant_block_is_exact():
  x = np.full((32, 3), np.float32(0.1)) * np.array([1, -3, 0], np.float32)
  q, y = run(F.UINT2_G32_OFFSET, None)(x)
  np.testing.assert_array_equal(y, x)
  assert not np.asarray(q.scale).any()


def test_deepseek_floor():
  q, y = run(F.E4M3_G128, scales.deepseek)(np.zeros((128, 2), np.float32))
  np.testing.assert_array_equal(q.scale, np.full((1, 2), np.float32(1e-4) / np.float32(448)))
  assert not np.asarray(y).any()
  q = run(F.E4M3_G128_E8M0, scales.deepseek)(X)[0]
  a = np.maximum(np.abs(blocks(F.E4M3_G128)).max((-3, -1)), np.float32(1e-4))
  want = np.exp2(np.ceil(np.log2(a.astype(np.float64) / 448)))
  np.testing.assert_array_equal(q.scale, want)


def test_encode_domain_stores_the_reciprocal():
  q, y = run(F.FP4_UE5M3_ENCODE, None)(X)
  a = np.abs(blocks(F.FP4_UE5M3_ENCODE)).max((-3, -1))
  stored = np.asarray(round_to(np.float32(6) / a, F.UE5M3))
  np.testing.assert_array_equal(q.scale, 1 / stored)
  codes = np.asarray(round_to(X * np.repeat(stored, 16, 0), F.E2M1))
  np.testing.assert_array_equal(q.data, codes)
  decode = run(F.FP4_UE5M3_TENSOR.__class__(F.E2M1, 16, scale=F.UE5M3), None)(X)[1]
  assert (np.asarray(decode) != np.asarray(y)).any()  # another grid than rounding amax / 6


def test_four_over_six_on_a_gaussian():
  """MSE 0.0092 -> 0.0077 (arXiv:2512.02010), never worse than 6 alone in any block."""
  x = np.random.default_rng(1).standard_normal((512, 512)).astype(np.float32)
  six = functools.partial(scales.nvfp4, bound=256.0)
  found = {r: error(F.NVFP4, r, x) for r in (scales.nvfp4, six, scales.four_over_six)}
  assert found[scales.nvfp4].sum() / x.size == pytest.approx(0.0092, abs=2e-4)
  assert found[scales.four_over_six].sum() / x.size == pytest.approx(0.0077, abs=2e-4)
  assert (found[scales.four_over_six] <= found[six] * (1 + 1e-5)).all()


SEARCHED = {
  "int4": (INT4_G32, scales.absmax),
  "asymmetric": (F.UINT2_G64, scales.minmax),
  "nvfp4": (F.NVFP4, scales.absmax),  # the second level stays where it was
  "nvfp4_start": (F.NVFP4, scales.nvfp4),
  "double": (F.NF4_DQ, scales.absmax),
  "fp16 scales": (Format(F.int_grid(3), 32, scale=F.FP16), scales.absmax),
}


@pytest.mark.parametrize("name", SEARCHED)
def test_mse_is_never_worse_than_its_start(name):
  fmt, start = SEARCHED[name]
  rule = observers.mse(start, candidates=20, norm=2.0)
  one = observers.mse(start, candidates=1)
  x = X * np.float32(1e-3)
  before, after = error(fmt, one, x), error(fmt, rule, x)
  assert (after <= before * (1 + 1e-5)).all()
  assert after.sum() < 0.97 * before.sum()


def test_rules_with_parameters_are_one_object_each():
  """A recipe is a key of jit caches: the same parameters must not compile twice."""
  assert observers.mse(candidates=9) is observers.mse(candidates=9)
  assert observers.mse(candidates=9) is not observers.mse(candidates=8)
  assert scales.rms(2.0) is scales.rms(2.0)
  assert observers.mse(scales.minmax, norm=2.0).__name__ == "mse(minmax, norm=2.0)"


def test_percentile_is_numpy_s():
  fmt = F.INT4_G128
  want = np.quantile(np.abs(blocks(fmt)), 0.95, axis=(-3, -1)) / 7
  found = run(fmt, observers.percentile(0.95))(X)[0].scale
  np.testing.assert_allclose(found, want, rtol=1e-6)


def test_gram_error_is_the_output_error():
  """Of each group by itself, ragged tail included; brute force over the candidates."""
  rng = np.random.default_rng(3)
  x = rng.standard_normal((40, 20)).astype(np.float32)
  w = rng.standard_t(3, (20, 9)).astype(np.float32)
  fmt, ratios = Format(F.int_grid(3), 8), (1.0, 0.9, 0.8)
  gram = observers.diagonal_blocks(x.T @ x, 8)
  search = functools.partial(
    observers.observe, ratios=ratios, narrow=observers.clamped, error=observers.gram_error(gram)
  )
  found = np.asarray(search(blocks(fmt, w), fmt).scale)
  cost = []
  for p in ratios:
    y = np.asarray(dequantize(encode(w, fmt, rule=scales.clipped(p))))
    parts = [np.square(x[:, i : i + 8] @ (y - w)[i : i + 8]).sum(0) for i in (0, 8, 16)]
    cost.append(np.stack(parts))
  full = np.asarray(encode(w, fmt).scale)
  np.testing.assert_allclose(found, full * np.array(ratios)[np.argmin(cost, 0)], rtol=1e-5)
  assert len(np.unique(np.argmin(cost, 0))) > 1


def test_quartet_and_shrunk_rules_never_clip():
  q = run(Format(F.E2M1, 32), scales.quartet)(X)[0]
  assert (np.abs(X / np.repeat(np.asarray(q.scale), 32, 0)) < 6).all()
  nested = run(F.MXFP4_TENSOR, None)(X)[0]  # powers of two under 4/3: the same values
  np.testing.assert_array_equal(scale_values(nested.scale), q.scale)
  np.testing.assert_array_equal(nested.data, q.data)
  with pytest.raises(ValueError, match="mxfp4 stores powers of two, which hold no 4/3"):
    encode(X, F.MXFP4, rule=scales.quartet)
  q = run(*RULES["shrunk"])(X)[0]
  assert isinstance(q.scale, QTensor)
  step = np.repeat(np.asarray(scale_values(q.scale)), 16, 0)
  normal = np.repeat(np.asarray(q.scale.data), 16, 0) >= 2.0**-6
  assert (np.abs(X)[normal] <= 6 * step[normal]).all()
  q = run(F.NVFP4, scales.nvfp4)(X)[0]
  step = np.repeat(np.asarray(scale_values(q.scale)), 16, 0)
  assert (np.abs(X)[normal] > 6 * step[normal]).any()


def test_rules_are_differentiable():
  """Learned clipping: the gradient reaches x and the ratio through the scale."""

  def total(x, ratio):
    return encode(x, INT4_G32, rule=scales.clipped(ratio)).scale.sum()

  dx, dratio = jax.grad(total, (0, 1))(X, 0.9)
  assert np.count_nonzero(dx) == K // 32 * N
  assert float(dratio) > 0


@pytest.mark.parametrize(
  "name", ["formats", "grids", "rounding", "tensor", "scales", "encoding", "observers"]
)
def test_examples_in_docstrings_run(name):
  result = doctest.testmod(importlib.import_module(f"jaxquant.{name}"))
  assert result.failed == 0
