"""The design space of FP4 training: its options, their cost, and which of them pay on a small task.

What a finding rests on is in docs/results/fp4_space.md, with more steps and seeds.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import design_space as D
from jaxquant import estimators, scales
from jaxquant import formats as F
from jaxquant.encoding import encode
from jaxquant.formats import Format
from jaxquant.ops.qdot import FLOAT, Operand, Rotation, Rule, Source, qdot
from jaxquant.recipes.training import nvfp4, switchback
from jaxquant.rounding import stochastic
from jaxquant.tensor import dequantize, scale_values

SITE = "layers/mlp/up"
SCALES = ("e8m0", "e8m0+ts", "e4m3", "e4m3+ts", "ue5m3", "f32")
OPTIONS = {"plain": {}, "sr rht": {"rounding": "sr", "rotation": "rht"}}
LOSS_SCALES = (2.0**-8, 1.0, 2.0**8)
COMBINATIONS = [
  (scale, option, loss) for scale in SCALES for option in OPTIONS for loss in LOSS_SCALES
]


def rule_of(**labels):
  return D.choose(**labels).rule(SITE)


# The space.


def test_space_is_the_product_of_its_axes():
  found = D.space()
  assert len(found) == math.prod(map(len, D.AXES.values())) == 2880
  assert len({r.rules for r in found.values()}) == len(found)  # no two labels mean the same
  assert {r.rule("head") for r in found.values()} == {FLOAT}
  label = "ue5m3/16/soft/sr/rht w/dge"
  rule = found[label].rule(SITE)
  assert found[label].name == label
  assert rule == rule_of(
    scale="ue5m3", block="16", maximum="soft", rounding="sr", rotation="rht w", gradient="dge"
  )
  assert rule.w.gradient is estimators.dge()
  assert rule.x.gradient is rule.dgrad_w.gradient is None
  assert {o.fmt for o in rule.operands.values()} == {Format(F.E2M1, 16, scale=F.UE5M3)}
  turned = {n for n, o in rule.operands.items() if o.rotation is not None}
  noisy = {n for n, o in rule.operands.items() if o.rounding is stochastic}
  assert turned == {"wgrad_x", "wgrad_g"}
  assert noisy == {"dgrad_g", "dgrad_w", "wgrad_x", "wgrad_g"}


def test_the_first_point_is_naive_mxfp4():
  each = Operand(F.MXFP4, scales.ocp_floor)
  assert rule_of() == Rule(each, each, each, each, each, each)


@pytest.mark.parametrize(
  ("labels", "message"),
  [
    ({"scales": "e8m0"}, "no axes.*scales.*there are scale"),
    ({"scale": "e5m2"}, "scale is one of"),
  ],
)
def test_unknown_options(labels, message):
  with pytest.raises(ValueError, match=message):
    D.choose(**labels)


# The cost model.

MX = Operand(F.MXFP4)
COSTS = {
  "float": (Operand(), 0),
  "mxfp4": (MX, 1 + 2 / 32),
  "block 16": (Operand(Format(F.E2M1, 16)), 1 + 2 / 16),
  "tensor scale": (Operand(F.NVFP4), 1 + 2 / 16 + 1),
  "tile": (Operand(F.NVFP4_2D), 1 + 2 / 256 + 1),
  "stochastic": (dataclasses.replace(MX, rounding=stochastic), 1 + 2 / 32 + 2),
  "rotation": (dataclasses.replace(MX, rotation=Rotation(16)), 1 + 2 / 32 + 4),
  "dge": (dataclasses.replace(MX, gradient=estimators.dge()), 1 + 2 / 32 + 2),
  "soft": (rule_of(maximum="soft").x, 1 + 2 / 32 + 3),
}


@pytest.mark.parametrize("name", COSTS)
def test_cost_of_an_operand(name):
  operand, want = COSTS[name]
  assert D.operand_ops(operand) == want


def test_every_point_has_a_cost_and_overhead_falls_with_size():
  rules = [recipe.rule(SITE) for recipe in D.space().values()]
  costs = [D.overhead(rule, 64, 64, 64) for rule in rules]
  assert min(costs) == D.overhead(rule_of(), 64, 64, 64) == 6 * (1 + 2 / 32) / (6 * 64)
  assert len(set(costs)) > 100
  assert D.overhead(FLOAT, 64, 64, 64) == 0
  assert D.overhead(rules[-1], 128, 128, 128) == D.overhead(rules[-1], 64, 64, 64) / 2
  wide = D.overhead(Rule(x=MX), 8, 64, 1024)  # x is [8, 64] and belongs to one of three GEMMs
  assert wide == (1 + 2 / 32) * 8 * 64 / (6 * 8 * 64 * 1024)


def test_unknown_estimators_have_no_cost():
  operand = dataclasses.replace(MX, gradient=estimators.dge(7.0))
  with pytest.raises(ValueError, match=r"dge\(7\.0\).*FUNCTION_OPS"):
    D.operand_ops(operand)
  assert D.operand_ops(operand, {estimators.dge(7.0): 9}) == 1 + 2 / 32 + 9


# What is kept for the backward pass.

M, K, N = 64, 128, 32
X, W = 4 * M * K, 4 * K * N  # bytes in float32
PACKED = lambda fmt, rows, columns: round(
  F.bits_per_value(fmt, (rows, columns)) * rows * columns / 8
)
KEPT = {
  "float": (FLOAT, X),
  "original": (nvfp4(disable_sr=True).rule(SITE), X),
  "high precision": (nvfp4(backward_override=Source.ORIGINAL).rule(SITE), X),
  "forward, 32 bits": (Rule(Operand(F.INT8), Operand(F.INT8)), X + 4 * M + W + 4 * N),
  "dequantized": (
    nvfp4(backward_override=Source.FORWARD).rule(SITE),
    PACKED(F.NVFP4, K, M) + PACKED(F.NVFP4_2D, K, N),
  ),
  "int8": (switchback(save_int8=True).rule(SITE), M * K + 4 * M),
  "estimator of w": (rule_of(gradient="dge"), X + W + 4 * K // 32 * N),
}


@pytest.mark.parametrize("name", KEPT)
def test_bytes_kept_for_the_backward_pass(name):
  rule, want = KEPT[name]
  assert D.saved_by(rule, M, K, N) == want


def test_packing_changes_no_gradient():
  rule = nvfp4(backward_override=Source.FORWARD).rule(SITE)
  x, w, g = (
    jax.random.normal(jax.random.key(i), s) for i, s in enumerate(((M, K), (K, N), (M, N)))
  )

  @jax.jit
  def run(x, w, g):
    rules = rule, dataclasses.replace(rule, keep_packed=False)
    return [jax.vjp(lambda x, w, r=r: qdot(x, w, r), x, w)[1](g) for r in rules]

  jax.tree.map(np.testing.assert_array_equal, *run(x, w, g))
  unpacked = D.saved_by(dataclasses.replace(rule, keep_packed=False), M, K, N)
  assert KEPT["dequantized"][1] < X / 4 < X < unpacked


def test_saved_bytes_counts_an_array_once():
  x = jax.ShapeDtypeStruct((8, 4), jnp.float32)
  assert D.saved_bytes(lambda x: x * jnp.sin(x), x) == 3 * 128  # and the sine and the cosine
  assert D.saved_bytes(lambda x: x * x, x) == 128
  assert D.saved_bytes(lambda x, y: x * y, x, x) == 2 * 128
  assert D.saved_bytes(lambda x, y: x * y, x, x, held=(0, 1)) == 0


# What pays: 36 combinations (6 scale formats, with and without SR and RHT, 3 loss scales).


@functools.cache
def task():
  return D.regression(4, 200, batch=32)


@functools.cache
def losses(scale, option):
  """[3 loss scales, 4 seeds]."""
  found = D.train(rule_of(scale=scale, **OPTIONS[option]), task(), loss_scales=LOSS_SCALES)
  return np.asarray(found, np.float64)


@functools.cache
def float_loss():
  return np.asarray(D.train(FLOAT, task()), np.float64)[0]


def test_combinations():
  assert len(COMBINATIONS) >= 32
  for scale, option, loss in COMBINATIONS:
    found = losses(scale, option)[LOSS_SCALES.index(loss)]
    assert np.isfinite(found).all()
    assert (found > float_loss()).all()


def test_range():
  """Tensor scales and E8M0 see no loss scale, bit for bit. UE5M3 has 2^8 more room than E4M3."""
  for option in OPTIONS:
    for scale in ("e8m0", "e8m0+ts", "e4m3+ts", "f32"):
      found = losses(scale, option)
      np.testing.assert_array_equal(found[0], found[1])
      np.testing.assert_array_equal(found[2], found[1])
    trains = {s: (losses(s, option) < 2 * float_loss()).all(1).tolist() for s in ("e4m3", "ue5m3")}
    assert trains == {"e4m3": [False, False, True], "ue5m3": [False, True, True]}
    assert losses("e4m3", option)[0].min() > 0.9  # no gradient is left: nothing is learned


def test_tensor_scaling_rht_and_sr_do_not_lose_to_naive_mxfp4():
  assert losses("e4m3+ts", "sr rht")[1].mean() <= losses("e8m0", "plain")[1].mean()


def test_scale_format_is_the_lever():
  """Scales with a mantissa against E8M0, over all seeds; range alone (e8m0+ts) is not it."""
  mean = lambda *scales: np.mean([losses(scale, "plain")[1] for scale in scales])
  assert mean("e4m3+ts", "ue5m3", "f32") < 0.98 * mean("e8m0", "e8m0+ts")


def test_no_gain_from_dge():
  """The straight-through estimator is the better one, beyond noise: in every seed."""
  dge = D.train(rule_of(scale="e4m3+ts", gradient="dge"), task())[0]
  assert (np.asarray(dge) > losses("e4m3+ts", "plain")[1]).all()


@pytest.mark.parametrize("name", [n for n in D.OPTIMIZERS if n != "adam"])
def test_optimizers_train_and_see_no_loss_scale(name):
  """What they gain or lose is in docs/results/fp4_space.md; a loss scale changes no bit."""
  scales = (1.0, 2.0**8)
  small = D.regression(2, 100, batch=32)
  found = D.train(rule_of(scale="f32"), small, loss_scales=scales, optimizer=D.OPTIMIZERS[name])
  np.testing.assert_array_equal(found[0], found[1])
  assert (found[0] < 0.7).all()


# Estimators.


def test_slopes_of_estimators():
  """The spline, over an interval of the grid; DGE is its formula."""
  x = np.linspace(2, 3, 20001, dtype=np.float32)  # and midpoints of cells, not grid values
  u = (x[1:] + x[:-1])[None] / 2
  x = jnp.concatenate([jnp.full((1, 1), 6.0), u], 1)  # scale 1
  q = encode(x, Format(F.E2M1), axis=-1)
  slope = lambda estimator: np.asarray(estimator(x, q, jnp.ones_like(x)))[0, 1:]
  assert slope(estimators.spline()).mean() == pytest.approx(1, abs=1e-3)
  assert set(np.unique(slope(estimators.spline()))) == {0.5, 2.0}
  t = (u[0] - 2) * 2 - 1
  want = np.minimum(np.abs(t) ** (1 / 5 - 1) / 5, 3)  # averages to one where it is not cut off
  np.testing.assert_allclose(slope(estimators.dge()), want, rtol=2e-3)


def test_gradient_through_the_scale_is_a_finite_difference():
  """x^ = s Q(x / s), s = max |x| / 6, for a smooth Q: of sum(c x^) in every coordinate."""
  rng = np.random.default_rng(0)
  x, c = rng.standard_normal((2, 1, 16)).astype(np.float32)
  smooth = lambda u: u + jnp.sin(2 * u) / 4
  slope = lambda x, q, g: g * (1 + jnp.cos(2 * x / scale_values(q.scale)) / 2)
  exact = lambda x: (c * (s := jnp.abs(x).max() / 6) * smooth(x / s)).sum()
  fmt = Format(F.E2M1, 16)
  q = encode(x, fmt, axis=-1)
  q = q.replace(data=smooth(x / scale_values(q.scale)))
  got = estimators.through_scale(slope)(jnp.asarray(x), q, jnp.asarray(c))
  np.testing.assert_allclose(got, jax.grad(exact)(jnp.asarray(x)), rtol=1e-4, atol=1e-5)
  # The straight-through one: the second term is the error of quantization, at the largest alone.
  q = encode(x, fmt, axis=-1)
  ste = np.asarray(estimators.through_scale()(jnp.asarray(x), q, jnp.asarray(c)))
  at = np.abs(x).argmax()
  error = np.asarray(dequantize(q) - x)[0] / np.abs(x).max()
  want = c[0] + np.where(np.arange(16) == at, (c[0] * error).sum() * np.sign(x[0, at]), 0)
  np.testing.assert_allclose(ste[0], want, rtol=1e-5, atol=1e-6)
