"""Weight-activation systems: what each paper promises, on matrices and a two-layer model."""

import base64
import functools
import json
import pathlib

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import formats as F
from jaxquant import gates, nested
from jaxquant.encoding import encode
from jaxquant.intercept import collect
from jaxquant.kernels import map_kernels, matmul, size_bits, to_dense
from jaxquant.models.transformer import Transformer, TransformerShape
from jaxquant.ops.qdot import FLOAT, Operand, Rule, qdot
from jaxquant.packing import to_codes
from jaxquant.prepare import prepare
from jaxquant.recipes import weight_act
from jaxquant.recipes.weight_act.comet import fmpq, mixed_blocks
from jaxquant.recipes.weight_act.llm_int8 import outlier_channels
from jaxquant.recipes.weight_act.qoq import fixed_scales
from jaxquant.recipes.weight_act.zeroquant_fp import compensated
from jaxquant.recipes.weight_only.bitmod import FP3_SPECIALS, FP4_SPECIALS, bitmod
from jaxquant.recipes.weight_only.zeroquant_fp6 import zeroquant_fp6
from jaxquant.rounding import round_to
from jaxquant.scales import minmax
from jaxquant.solvers import proxy_loss
from jaxquant.solvers.dual_grained import dual_grained
from jaxquant.solvers.table_search import special_grids, special_value
from jaxquant.statistics import AMAX, hessian
from jaxquant.steps.channels import EvenWeights, Percentile
from jaxquant.tensor import QTensor, dequantize, is_qtensor, scale_values, to_blocks, unpack

K, N, M = 256, 24, 96
RNG = np.random.default_rng(0)
W = RNG.standard_t(3, (K, N)).astype(np.float32) / 16
X = RNG.standard_normal((M, K)).astype(np.float32)
X[:, [5, 77, 130]] *= 24  # outlier channels
H = hessian(jnp.asarray(X))
GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "bitmod.json"

RECIPES = {
  "llm_int8": functools.partial(weight_act.llm_int8, 3.0),
  "qoq": functools.partial(weight_act.qoq, rotate=False),
  "dgq": functools.partial(weight_act.dgq, smooth=False),
  "zeroquant_fp": weight_act.zeroquant_fp,
  "flexq": weight_act.flexq,
  "fireq": functools.partial(weight_act.fireq, even=False),
  "comet": weight_act.comet,
  "bitmod": bitmod,
  "zeroquant_fp6": zeroquant_fp6,
}


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, _=None):
    h = nn.relu(nn.Dense(192, name="up")(x))
    return x + nn.Dense(K, name="down")(h), None


class Model(nn.Module):
  """Two scanned layers and a head that stays in float."""

  @nn.compact
  def __call__(self, x):
    layers = nn.scan(
      Block, variable_axes={"params": 0, "calib": 0}, split_rngs={"params": True}, length=2
    )
    return nn.Dense(8, name="head")(layers(name="layers")(x)[0])


@functools.cache
def variables():
  return jax.jit(Model().init)(jax.random.key(0), X)


@functools.cache
def packed(name):
  recipe = RECIPES[name](float_sites="head")
  return recipe, jq.quantize_params(Model(), variables(), recipe, [X], progress=False)


def values(tree):
  """Every container replaced by float32 grid values."""
  one = lambda leaf: unpack(leaf) if is_qtensor(leaf) else leaf
  return map_kernels(lambda k: jax.tree.map(one, k, is_leaf=is_qtensor), tree)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", RECIPES)
def test_values_and_containers_give_the_same_bits(name):
  recipe, stored = packed(name)
  apply = jq.quantized(Model(), recipe)
  run = jax.jit(lambda v: [apply(v, X[:1]), jax.vmap(lambda x: apply(v, x))(X[None, :32])])
  (one, y), fake = run(stored), run(jax.jit(values)(stored))
  chex.assert_trees_all_equal([one, y], fake)
  want = Model().apply(variables(), X[:32])
  error = jnp.square(y[0] - want).mean() / jnp.square(want).mean()
  assert error < (0.1 if "bitmod" in name else 0.02), error  # 3 bits, and 4 to 8


BITS = {  # of the up projection [256, 192]: elements, and what a block or a column shares
  "llm_int8": 8 + 32 / 256 + 32,  # both weights are there
  "qoq": 4 + (8 + 4) / 128 + 32 / 256,
  "dgq": 4 + (8 + 4) / 128 + 32 / 256,
  "zeroquant_fp": 4 + 4 / 256 + 32 / 256 + 32 * 8 * (256 + 192) / (256 * 192),
  "flexq": 6 + 32 / 128,
  "fireq": 4 + 8 / 128,
  "comet": 4 + 32 / 128 + (32 + 8) / 192,  # the order and the mask
  "bitmod": 3 + (2 + 32) / 128,
  "zeroquant_fp6": 6 + 32 / 256,
}


@pytest.mark.parametrize("name", RECIPES)
def test_bits(name):
  stored = packed(name)[1]["params"]["layers"]["up"]["kernel"]
  # What a whole layer shares: a threshold, tables, a scale per tensor; bytes that are not full.
  assert size_bits(stored) / (2 * 256 * 192) == pytest.approx(BITS[name], rel=0, abs=0.05)


def test_llm_int8_at_both_ends():
  """Threshold infinity is plain int8, 0 the float product; between them lie the outliers."""
  rule = Rule(Operand(F.INT8), Operand(F.INT8))
  dot = lambda x, w: qdot(x, w, rule if isinstance(w, QTensor) else Rule())
  run = jax.jit(lambda kernel: matmul(kernel, jnp.asarray(X), dot))
  at = lambda t: run(outlier_channels(t)(jnp.asarray(W), None, F.INT8))
  plain, exact = run(encode(jnp.asarray(W), F.INT8)), run(jnp.asarray(W))
  chex.assert_trees_all_equal(at(float("inf")), plain)
  chex.assert_trees_all_equal(at(0.0), exact)
  error = lambda y: float(jnp.square(y - exact).sum())
  assert error(at(12.0)) < 0.1 * error(plain)


HEAVY = np.random.default_rng(1).standard_t(2, (1024, 64)).astype(np.float32)


def int8_values(q):
  blocks = np.asarray(to_blocks(q.data, q.fmt, -2))
  return (blocks - q.zero_point[:, None, :, None]) * q.scale.data[:, None, :, None]


@pytest.mark.parametrize(("protect", "safe"), [(119, True), (127, False)])
def test_protective_range(protect, safe):
  q = encode(HEAVY, F.UINT4_G128_INT8, rule=nested.progressive(protect))
  assert (np.abs(int8_values(q)).max() <= 127) == safe


def test_qoq_with_error_feedback_fits_int8():
  """The ends of a group are codes that only moved weights take: 8 steps of 16 are 128."""
  fmt, rule = F.UINT4_G128_INT8, nested.progressive(119)
  moved = encode(HEAVY[:256] * 2, fmt, scales=rule(blocks_of(HEAVY[:256]), fmt))
  assert np.abs(int8_values(moved)).max() > 127
  kept = nested.within_int8(moved)
  assert np.abs(int8_values(kept)).max() <= 127
  q = fixed_scales(jnp.asarray(W), H, fmt, rule=rule)
  assert np.abs(int8_values(q)).max() <= 127
  loss = lambda q: float(proxy_loss(jnp.asarray(W), q, H))
  assert loss(q) < 0.5 * loss(encode(W, fmt, rule=rule))


def blocks_of(w, fmt=F.UINT4_G128_INT8):
  return to_blocks(jnp.asarray(w), fmt, -2)


def test_dual_grained_fits_int8_and_keeps_up_with_float_scales():
  fmt = F.UINT4_G128_INT8
  q = dual_grained(W, H, fmt)
  assert np.abs(int8_values(q)).max() <= 127
  loss = lambda q: float(proxy_loss(jnp.asarray(W), q, H))
  channel = F.Format(F.int_grid(4, full=True), zero_point=True)
  assert loss(q) <= 1.2 * loss(encode(W, F.UINT4_G128, rule=minmax))
  assert loss(q) < loss(encode(W, channel, rule=minmax))
  with pytest.raises(ValueError, match="uint4_g128_int8"):
    dual_grained(W, H, F.INT4_G128)


@pytest.mark.parametrize("clip", [False, True])
def test_halvings(clip):
  fmt = F.E2M1_G256_HALVINGS
  w = HEAVY * np.exp2(np.random.default_rng(2).uniform(-12, 0, (1024, 1))).astype(np.float32)
  q = encode(w, fmt, rule=nested.halvings(clip=clip))
  wanted = np.asarray(encode(w, F.E2M1_G256).scale)
  ratio = np.asarray(scale_values(q.scale)) / wanted
  np.testing.assert_array_equal(np.asarray(q.scale.scale)[0], wanted.max(0))
  assert ((ratio <= 1) & (ratio > 0.5) if clip else (ratio >= 1) & (ratio < 2)).all()


def test_power_of_tensor_saves_small_weights():
  """Blocks below the smallest E4M3 scale vanish without it."""
  fmt = F.INT4_G128_E4M3
  small = HEAVY * np.float32(2.0**-14)
  q = encode(small, fmt, rule=nested.power_of_tensor)
  p = 1 / q.scale.scale.item()
  assert p == 2 ** round(np.log2(p))
  assert p * np.abs(small).max() <= 448
  error = lambda y: np.square(np.asarray(y) - small).sum()
  naive = np.maximum(round_to(encode(small, F.INT4_G128).scale, F.E4M3), 2.0**-9)
  naive = np.repeat(naive, 128, 0)
  assert error(dequantize(q)) < 1.1 * error(dequantize(encode(small, F.INT4_G128)))
  assert error(dequantize(q)) < 0.3 * error(np.round(small / naive).clip(-8, 7) * naive)


def test_low_rank_compensation_is_monotone():
  loss = []
  for rank in (0, 2, 8, N):
    kernel = compensated(rank)(jnp.asarray(W), H, F.E2M1_G256_HALVINGS, rule=nested.halvings())
    loss.append(float(jnp.linalg.norm(to_dense(kernel) - W)))
  assert loss == sorted(loss, reverse=True)
  assert loss[-1] < 1e-4 * loss[0]


def test_flexq_raises_the_sensitive_sites_only():
  table = jq.sites(Model(), variables(), X, recipe=weight_act.flexq(float_sites="head"))
  found = {site.path: site.rule.x.fmt for site in table.quantized()}
  assert found == {"layers/up": F.INT6_G128, "layers/down": F.INT8_G128}


def test_comet_permutes_and_needs_fewer_wide_blocks():
  amax = jnp.abs(X).max(0)
  assert [float(mixed_blocks(amax, 32, 8.0, sort)[1].mean()) for sort in (False, True)] == [
    3 / 8,
    1 / 8,
  ]
  kernel = fmpq(8.0, F.Format(F.int_grid(8), 32))(jnp.asarray(W), amax, F.INT4_G32)
  off = jnp.linalg.norm(to_dense(kernel) - W) / jnp.linalg.norm(W)
  assert off < 0.2  # int4 of a heavy tail; any other order of the rows gives 1.4
  rule = Rule(Operand(F.INT4_G32), Operand(F.INT4_G32))
  run = jax.jit(lambda k: matmul(k, jnp.asarray(X), lambda x, w: qdot(x, w, rule)))
  error = lambda k: float(jnp.square(run(k) - X @ to_dense(k)).sum())  # of x alone
  assert error(kernel) < 0.1 * error(encode(W, F.INT4_G32))


MEMBERS = {"3": (F.FP3_G128, FP3_SPECIALS), "4": (F.E2M1_G128, FP4_SPECIALS)}


@pytest.mark.parametrize("bits", MEMBERS)
def test_bitmod_is_the_best_of_its_grids(bits):
  fmt, specials = MEMBERS[bits]
  error = lambda y: np.square(np.asarray(to_blocks(y - W, fmt, -2))).sum((-3, -1))
  mix = error(to_dense(special_value(specials)(jnp.asarray(W), None, fmt)))
  ones = [error(dequantize(encode(W, F.Format(g, 128)))) for g in special_grids(fmt, specials)]
  np.testing.assert_allclose(mix, np.min(ones, 0), rtol=1e-5)
  assert all((mix < one).any() for one in ones)


@pytest.mark.parametrize("bits", MEMBERS)
def test_bitmod_golden(bits):
  """Against an independent implementation (tests/golden/make_bitmod.py)."""
  golden = json.loads(GOLDEN.read_text())
  shape, size = golden["shape"], golden["group"]
  array = lambda text, dtype: np.frombuffer(base64.b64decode(text), dtype).reshape(shape)
  w, want = array(golden["w"], np.float16).astype(np.float32), golden[bits]
  fmt, specials = MEMBERS[bits]
  found = special_value(specials)(jnp.asarray(w), None, F.Format(fmt.elem, size))
  same = np.asarray(found.choice.data) == np.array(want["choice"])
  at = np.repeat(np.asarray(found.choice.data, int), size, 0)
  units = np.asarray(found.tables)[at, np.asarray(found.index.data, int)]
  assert same.mean() >= 0.999
  assert (units * 2 == array(want["halves"], np.int8)).mean() >= 0.999


def test_special_values_need_a_free_code():
  with pytest.raises(ValueError, match="free code"):
    special_grids(F.NF4_G64, (2.0,))


def test_fp6_by_bits():
  """All codes: s eee mm put under fp16's exponent and multiplied by 2^(15 - 3) are the values."""
  codes = np.arange(64, dtype=np.uint16)
  half = ((codes >> 5) << 15) | ((codes & 31) << 8)
  shifted = half.view(np.float16).astype(np.float32) * 2.0 ** (15 - 3)
  np.testing.assert_array_equal(shifted, F.E3M2.values().astype(np.float32))
  order = np.random.default_rng(0).permutation(64)
  x = jnp.asarray(shifted[order].reshape(8, 8))
  np.testing.assert_array_equal(np.asarray(to_codes(x, F.E3M2)).reshape(-1), order)


SHAPE = TransformerShape(
  vocab=32, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, d_ff=64, max_len=16
)
TOKENS = jax.random.randint(jax.random.key(0), (4, 17), 0, 32)


@functools.cache
def decoder():
  model = Transformer(SHAPE)
  return model, jax.jit(model.init)(jax.random.key(0), TOKENS[:, :-1])


@pytest.mark.parametrize(
  "step", [Percentile(0.1), EvenWeights(".*(gate|up)")], ids=["percentile", "even"]
)
def test_channel_scales_keep_the_function(step):
  """And do what they say: x of a norm's readers is level, or their weights are."""
  model, held = decoder()
  held = gates.outliers(16)(model, held)
  recipe = jq.Recipe((("embed|head", FLOAT), (".*", jq.weight_only(F.INT8))), prepare=(step,))
  after = prepare(model, held, recipe, [TOKENS[:, :-1]])
  run = jax.jit(lambda v: model.apply(v, TOKENS[:, :-1]))
  np.testing.assert_allclose(run(after), run(held), atol=1e-3 * np.abs(run(held)).max())
  layer = after["params"]["layers"]
  if isinstance(step, EvenWeights):
    both = jnp.concatenate([layer["mlp"][n]["kernel"] for n in ("gate", "up")], -1)
    level = jnp.abs(both).mean(-1)
  else:
    path = "layers/mlp/gate"
    level = jax.jit(collect(model, jq.Recipe(), AMAX, frozenset([path])))(after, TOKENS[:, :-1])
    level = jnp.sort(level[path], -1)[:, -4:]  # the tenth that was scaled, and what it came to
  np.testing.assert_allclose(level, jnp.broadcast_to(level[..., :1], level.shape), rtol=1e-4)


def test_a_gate_measures_and_judges():
  model, held = decoder()
  low = {n: gates.pair(None, f) for n, f in {"int8": F.INT8, "int2": F.INT2_G64}.items()}
  gate = gates.Gate("", low, lambda kl: kl["int8"] < kl["int2"], gates.outliers(4))
  kl = gates.measure(gate, model, held, [TOKENS[:, :-1]], [np.asarray(TOKENS)])
  assert gate.holds(kl)
  assert not gate.holds({"int8": 1.0, "int2": 0.5})
  assert 0 < kl["int8"] < 0.01 * kl["int2"]
