"""Training recipes: one table through the real training step, and what each of them promises.

What one site computes, eager, compiled, batched and scanned, is in test_training_sites.py. That
float and packed weights give the same bits under every recipe without state is in
tests/test_one_path.py; the patch of CHON is in tests/ops/test_patch.py, MS-EDEN in
tests/test_eden.py, recipes that learn their quantizers in tests/quantizers.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxquant as jq
from jaxquant import checkpoint, formats, scales, training
from jaxquant.encoding import encode
from jaxquant.models import Transformer, TransformerShape
from jaxquant.models.decoder import unstack_layers
from jaxquant.ops.qdot import FLOAT, Source, qdot
from jaxquant.ops.tracked import Delayed
from jaxquant.recipes.index import by_name
from jaxquant.recipes.training import chon, fp8, nvfp4, quartet, switchback
from jaxquant.recipes.training.systems import SYSTEMS
from jaxquant.rounding import fold, uniform

D, VOCAB, LAYERS = 32, 64, 2


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, _=None):
    return x + nn.relu(nn.Dense(D, name="up")(x)), None


class Model(nn.Module):
  """Embedding, two residual blocks in a scan or a loop, head."""

  scan: bool = True

  @nn.compact
  def __call__(self, tokens):
    x = nn.Embed(VOCAB, D, name="embed")(tokens)
    if self.scan:
      axes, rngs = {"params": 0, "calib": 0, "quant": 0}, {"params": True, "sr": True}
      x, _ = nn.scan(Block, axes, split_rngs=rngs, length=LAYERS)(name="layers")(x, None)
    else:
      for i in range(LAYERS):
        x, _ = Block(name=f"layers_{i}")(x)
    return nn.Dense(VOCAB, name="head")(x)


TX = optax.sgd(0.5)
TOKENS = jax.random.randint(jax.random.key(1), (8, 17), 0, VOCAB)
# One row for each kind of rule; the others differ from one of these in a number format or in the
# names of float sites. Formats have tests of their own.
ALIKE = {"chon_gla", "mxint6", "mxfp6", "mxint4", "mxfp4", "nvint4", "nvfp4_nearest"}
RECIPES = {
  name: system.make()
  for name, system in SYSTEMS.items()
  if name not in ALIKE and not any(rule.learned for _, rule in system.make().rules)
}
STATEFUL = [n for n, r in RECIPES.items() if any(rule.has_state for _, rule in r.rules)]


@functools.cache
def fresh(scan):
  """The state of a float run: parameters do not depend on the recipe."""
  return training.init_state(Model(scan), TX, TOKENS[:, :-1], 0)


@functools.cache
def started(name, scan=True):
  """(step, state before the first one); the step does not donate what it gets."""
  recipe, model, state = RECIPES[name], Model(scan), fresh(scan)
  quant = jq.init_quant(model, {"params": state.params}, recipe, TOKENS[:, :-1])
  step = training.make_step(jq.quantized(model, recipe), TX, 0, recipe=recipe)
  return lambda state: step(jax.tree.map(jnp.copy, state), TOKENS), state.replace(quant=quant)


@functools.cache
def trained(name, steps):
  """(state, losses) after some steps on one batch."""
  step, state = started(name)
  losses = []
  for _ in range(steps):
    state, metrics = step(state)
    losses.append(float(metrics["loss"]))
  return state, losses


def same(a, b):
  """Equal leaf by leaf, to the last bit."""
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", RECIPES)
def test_it_trains(name):
  """Every parameter moves, nothing is NaN, the loss of the batch falls; the bits are repeatable."""
  state, losses = trained(name, 4)
  assert np.isfinite(losses).all()
  assert losses[-1] < losses[0]
  for before, after in zip(jax.tree.leaves(started(name)[1].params), jax.tree.leaves(state.params)):
    assert jnp.isfinite(after).all()
    assert (before != after).any()
  again, _ = started(name)[0](started(name)[1])
  same(again, trained(name, 1)[0])


def change(before, after):
  return jax.tree.map(jnp.subtract, after, before)


def apart(a, b):
  """|a - b| / |b| of two updates; rounding turns one ulp into the next code here and there."""
  return float(optax.global_norm(change(b, a)) / optax.global_norm(b))


def looped(tree):
  return unstack_layers(tree) if tree else tree


@pytest.mark.parametrize("name", ["nvint4_hadamard", "switchback"])
def test_scan_is_loop(name):
  """Not so for random recipes: layers of a scan and of a loop draw from other keys.

  Delayed scales in both are in tests/test_state.py.
  """
  (_, start), (scanned, _) = started(name), trained(name, 1)
  step, state = started(name, scan=False)
  first = looped(start.params)
  state, _ = step(state.replace(params=first, quant=looped(start.quant)))
  assert apart(change(first, state.params), change(first, looped(scanned.params))) < 1e-3


def test_many_models_at_once():
  """A step under vmap is the step of each model: patch, noise and state."""
  name = "chon"
  step = started(name)[0]
  state = trained(name, 1)[0]
  other = state.replace(params=jax.tree.map(lambda a: a * 1.25, state.params))
  together, _ = jax.vmap(step)(jax.tree.map(lambda *a: jnp.stack(a), state, other))
  for i, one in enumerate((state, other)):
    alone, _ = step(one)
    found = jax.tree.map(lambda a, i=i: a[i], together)
    assert apart(change(one.params, found.params), change(one.params, alone.params)) < 1e-3
    for a, b in zip(jax.tree.leaves(found.quant), jax.tree.leaves(alone.quant), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("name", STATEFUL)
def test_a_restored_state_continues_with_the_same_bits(name, tmp_path):
  state, _ = trained(name, 2)
  tree = {"params": state.params, "quant": state.quant}
  checkpoint.save(tmp_path / "state", tree)
  restored = checkpoint.restore(tmp_path / "state", jax.eval_shape(lambda: tree))
  same(restored, tree)
  assert any(leaf.any() for leaf in jax.tree.leaves(restored["quant"]))
  same(started(name)[0](state.replace(**restored))[0], trained(name, 3)[0])


def test_rows_by_name_run_without_state():
  for name in STATEFUL:
    found = by_name(name)
    assert not any(rule.has_state for _, rule in found.rules)
    assert found.name == RECIPES[name].name
  assert by_name("nvfp4") == RECIPES["nvfp4"]


# NVFP4 and CHON.


def test_tiles_make_a_weight_and_its_transpose_the_same_numbers():
  w = jax.random.normal(jax.random.key(0), (64, 48))

  @jax.jit
  def values(w):
    rules = {flag: nvfp4(disable_2d=flag).rule("up") for flag in (False, True)}
    read = lambda o, axis: jq.dequantize(encode(w, o.fmt, axis=axis, rule=o.scales))
    return {flag: (read(r.w, -2), read(r.dgrad_w, -1)) for flag, r in rules.items()}

  found = values(w)
  np.testing.assert_array_equal(*found[False])
  assert (found[True][0] != found[True][1]).mean() > 0.3


@pytest.mark.parametrize(
  ("knob", "moved"),
  [
    ("disable_rht", {"wgrad_x", "wgrad_g"}),
    ("disable_sr", {"dgrad_g", "wgrad_g"}),
    ("disable_2d", {"w", "dgrad_w"}),
    ("shrink", {"dgrad_g", "wgrad_g"}),
    ("four_over_six", {"x", "w", "dgrad_w"}),
    ("row_scaled", {"x"}),
  ],
)
def test_knobs_of_nvfp4(knob, moved):
  """Each changes the operands that it names and no other; without SR no key is needed."""
  plain, rule = nvfp4().rule("up"), nvfp4(**{knob: True}).rule("up")
  assert {n for n, o in rule.operands.items() if o != plain.operands[n]} == moved
  assert rule.needs_key == (knob != "disable_sr")


def test_a_row_scaled_token_is_quantized_as_if_alone():
  """Codes, block scales and float32 scales, under either rule; tokens of very different sizes."""
  x = jax.random.normal(jax.random.key(0), (24, 64)) * jnp.exp2(jnp.arange(-12.0, 12.0))[:, None]
  of = lambda operand: jax.jit(lambda x: encode(x, operand.fmt, axis=-1, rule=operand.scales))
  for options in ({}, {"four_over_six": True}):
    row, plain = (nvfp4(row_scaled=r, **options).rule("up").x for r in (True, False))
    q, alone = of(row)(x), jax.vmap(of(plain))(x[:, None])
    for a, b in zip(jax.tree.leaves(q), jax.tree.leaves(alone), strict=True):
      np.testing.assert_array_equal(a, b[:, 0])
    flushed = [float((jq.dequantize(q) == 0).mean()) for q in (q, of(plain)(x))]
    assert 2 * flushed[0] < flushed[1]
  with pytest.raises(ValueError, match="per_row is for activations"):
    encode(x, row.fmt, axis=-2, rule=row.scales)


@pytest.mark.parametrize("source", Source)
def test_backward_override(source):
  """The forward bits of NVFP4; dx and dw are float32 products of the original or forward x, w."""
  rng = np.random.default_rng(0)
  x, w, g = (rng.standard_normal(s).astype(np.float32) for s in ((32, 64), (64, 48), (32, 48)))
  rule, plain = nvfp4(backward_override=source).rule("up"), nvfp4().rule("up")
  assert not rule.needs_key

  @jax.jit
  def run(x, w, g):
    y, pull = jax.vjp(lambda x, w: qdot(x, w, rule), x, w)
    want = qdot(x, w, plain, jax.random.key(0))
    q = (encode(x, rule.x.fmt, axis=-1), encode(w, rule.w.fmt))
    return y, want, *pull(g), *map(jq.dequantize, q)

  y, want, dx, dw, xq, wq = run(x, w, g)
  np.testing.assert_array_equal(y, want)
  x, w = (x, w) if source is Source.ORIGINAL else (xq, wq)
  for got, exact in ((dx, g @ np.float64(w).T), (dw, np.float64(x).T @ g)):
    np.testing.assert_allclose(got, exact, rtol=0, atol=2e-6 * np.abs(exact).max())


SMALL = TransformerShape(
  vocab=64, d_model=32, n_layers=3, n_heads=2, n_kv_heads=1, head_dim=16, d_ff=48, max_len=32
)


def float_sites(recipe, **changes):
  model = Transformer(SMALL.__class__(**{**vars(SMALL), **changes}))
  variables = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
  return {s.path for s in jq.sites(model, variables, TOKENS, recipe=recipe) if s.rule == FLOAT}


def test_protected_sites():
  """The last layer of a loop by its name; what acts on the result of q k^T by its role."""
  ends = {"embed", "head"}
  last = float_sites(nvfp4(float_sites="embed|head|layers_2/.*"), scan=False)
  names = {f"layers_2/attn/{n}" for n in "qkvo"} | {f"layers_2/mlp/{n}" for n in MLP}
  assert last == ends | names
  assert float_sites(chon()) == ends | {"layers/attn/v"}
  gla = chon(attention="gla")
  assert {p for p in GLA if gla.rule(f"layers/attn/{p}") == FLOAT} == {"o", "gk", "gk/down"}
  with pytest.raises(KeyError):
    chon(attention="mamba")


MLP = ("gate", "up", "down")
GLA = ("q", "k", "v", "o", "g", "gk", "gk/down")


# Quartet, against the algorithm written out in float64.

E = 32  # block of rotations and scales


def hadamard():
  index = np.arange(E)
  return (1 - 2.0 * (np.bitwise_count(index[:, None] & index) % 2)) / np.sqrt(E)


def turned(a, signs=1.0):
  """Rows of a, [..., E n], rotated block by block."""
  return ((a.reshape(-1, E) * signs) @ hadamard()).reshape(a.shape)


def e2m1(t, u=None):
  step = 2.0 ** (np.maximum(np.floor(np.log2(np.maximum(np.abs(t), 1e-9))), 0) - 1)
  n = np.abs(t) / step
  n = np.rint(n) if u is None else np.floor(n) + (u < n - np.floor(n))
  return np.copysign(np.minimum(n * step, 6), t)


def quest(a):
  """(values, mask) of rows."""
  blocks = a.reshape(-1, E)
  s = 2.0 ** np.floor(np.log2(2.92247856 / 6 * blocks.std(1, keepdims=True) + 1e-8))
  return (e2m1(blocks / s) * s).reshape(a.shape), (np.abs(blocks / s) < 6).reshape(a.shape)


def unbiased(a, u):
  """Stochastic rounding of rows on 3/4 of the range."""
  blocks = a.reshape(-1, E)
  s = 2.0 ** (np.floor(np.log2(np.abs(blocks).max(1, keepdims=True))) - 2) / 0.75
  assert np.abs(blocks / s).max() < 6
  return (e2m1(blocks / s, u.reshape(-1, E)) * s).reshape(a.shape)


def quartet_by_hand(x, w, g, key):
  """(y, dx, dw); x [M, K], w [K, N]. Rows of every operand lie along its contraction."""
  words = fold(key, 0)
  dgrad, wgrad = (fold(words, i) for i in (1, 2))
  signs = lambda k: np.where(uniform(fold(k, 0), (E,)) < 0.5, -1.0, 1.0)
  noise = lambda k, right, shape: np.float64(uniform(fold(k, 1 + right), shape))
  xq, mx = quest(turned(x))
  wq, mw = quest(turned(w.T))
  s = signs(dgrad)
  left = unbiased(turned(g, s), noise(dgrad, 0, g.shape))
  dx = left @ unbiased(turned(wq.T, s), noise(dgrad, 1, w.shape)).T
  s = signs(wgrad)
  left = unbiased(turned(xq.T, s), noise(wgrad, 0, x.shape).T)
  dw = left @ unbiased(turned(g.T, s), noise(wgrad, 1, g.shape).T).T
  return xq @ wq.T, turned(dx * mx), turned((dw * mw.T).T).T, 1 - mx.mean()


def test_quartet_is_the_published_algorithm():
  rng = np.random.default_rng(0)
  x, w, g = (rng.standard_normal(s).astype(np.float32) for s in ((64, 96), (96, 32), (64, 32)))
  key, rule = jax.random.key(7), quartet().rule("up")

  @jax.jit
  def run(x, w, g):
    y, pull = jax.vjp(lambda x, w: qdot(x, w, rule, key), x, w)
    return y, *pull(g)

  *want, clipped = quartet_by_hand(*(np.float64(a) for a in (x, w, g)), key)
  assert 0.005 < clipped < 0.1
  for got, expected in zip(run(x, w, g), want):
    # float32 sums of at most 96 terms; all codes are equal
    np.testing.assert_allclose(got, expected, rtol=0, atol=3e-6 * np.abs(expected).max())


# FP8 and int8.


def test_trace_of_delayed_scales(golden):
  """Scales and history of a published trace, bit for bit, through what qdot observes."""
  r = golden["delayed_scaling"]
  rule = fp8(Delayed(r["history_len"])).rule("up")
  tracker = rule.x.scales
  state = {n: t.init() for n, t in rule.tracked.items()}

  @jax.jit
  def step(state, x):
    eye = jnp.eye(4)
    y, pull = jax.vjp(lambda s: qdot(x, eye, rule, state=s), state)
    (seen,) = pull(jnp.ones_like(y))
    used = tracker.scales(state["x"], None, rule.x.fmt).multiplier
    after = {n: t.update(state[n], seen[n]["seen"], 0) for n, t in rule.tracked.items()}
    return y, used, after

  compared = 0
  for record in r["trace"]:
    largest = float(record["amax_seen"])
    _, used, state = step(state, jnp.zeros((4, 4)).at[1, 2].set(-largest))
    assert used.item() == record["scale_used"]
    assert tracker.scales(state["x"], None, rule.x.fmt).multiplier.item() == record["scale_next"]
    # The record's first slot is emptied for the next step; ours keeps what is about to drop out.
    newest_last = np.float32([float(a) for a in record["history_after"]])
    np.testing.assert_array_equal(state["x"]["history"][-2::-1], newest_last[1:])
    compared += 1
  assert compared == 7


def test_the_first_delayed_step_saturates_and_is_finite():
  rule = fp8().rule("up")
  state = {n: t.init() for n, t in rule.tracked.items()}
  x = jnp.full((2, 4), 1000.0)
  y, pull = jax.vjp(lambda x: qdot(x, jnp.eye(4), rule, state=state), x)
  np.testing.assert_array_equal(y, jnp.full((2, 4), 448.0))
  np.testing.assert_array_equal(pull(x * 100)[0], jnp.full((2, 4), 57344.0))


def test_gradients_in_e4m3_are_flushed_more_than_in_e5m2():
  """Magnitudes over ten binades and more, a scale per tensor."""
  z, spread = jax.random.normal(jax.random.key(0), (2, 128, 128))
  g = z * jnp.exp(3 * spread)

  @jax.jit
  def flushed(g):
    both = (fp8(scales.fp8_scale, gradient=f) for f in (formats.E5M2_TENSOR, formats.E4M3_TENSOR))
    operands = (recipe.rule("up").dgrad_g for recipe in both)
    return [(encode(g, o.fmt, axis=-1, rule=o.scales).data == 0).mean() for o in operands]

  e5m2, e4m3 = flushed(g)
  assert 0 < e5m2 < 0.2 * e4m3


@pytest.mark.parametrize("save_int8", [False, True])
def test_switchback_by_hand(save_int8):
  """Integer products of fprop and dgrad; dw is x^T g, of the quantized x if that was saved."""
  rng = np.random.default_rng(0)
  x, w, g = (rng.standard_normal(s).astype(np.float32) for s in ((16, 32), (32, 24), (16, 24)))
  rule = switchback(save_int8=save_int8).rule("up")

  @jax.jit
  def run(x, w, g):
    y, pull = jax.vjp(lambda x, w: qdot(x, w, rule), x, w)
    return y, *pull(g)

  def int8(a, axis):
    s = np.abs(a).max(axis, keepdims=True) / np.float64(127)
    return np.rint(a / s), s

  (xq, sx), (gq, sg), (wq, sw) = int8(x, 1), int8(g, 1), int8(w, None)
  seen = xq * sx if save_int8 else np.float64(x)
  want = (xq @ wq) * sx * sw, (gq @ wq.T) * sg * sw, seen.T @ np.float64(g)
  for got, expected in zip(run(x, w, g), want):
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
