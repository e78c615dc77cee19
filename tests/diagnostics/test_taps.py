"""Taps: they measure what flows, in every way to stack layers, and cost nothing when off."""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import jaxquant as jq
from jaxquant import training
from jaxquant.diagnostics import GATES, OUTLIERS, SPECTRA, taps
from jaxquant.models import (
  GLA,
  GLAShape,
  Transformer,
  TransformerShape,
  transformer,
  unstack_layers,
)
from jaxquant.models.softmax_taps import softmax_measures
from jaxquant.ops.attention import attend
from jaxquant.statistics import attention_probabilities
from jaxquant.tapping import tap

SHAPE = TransformerShape(
  vocab=19, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4, d_ff=24, max_len=8
)
FLOAT = jq.Recipe(name="float")
RAW = ((".*[xyg]|(embed/)?w", lambda a: {"raw": a}),)


def squares(apply):
  """The loss of modules whose batch is x."""
  return lambda variables, x, _: (apply(variables, x) ** 2).sum()


def make(**changes):
  return Transformer(dataclasses.replace(SHAPE, **changes))


@pytest.fixture(scope="module")
def batch():
  return jax.random.randint(jax.random.key(1), (3, 9), 0, SHAPE.vocab)


@pytest.fixture(scope="module")
def variables(batch):
  return jax.jit(make().init)(jax.random.key(0), batch[:, :-1])


@pytest.fixture(scope="module")
def raw(variables, batch):
  """Under remat, where tensors are computed twice and gradients come late."""
  return jax.jit(taps(make(remat=True), FLOAT, RAW))(variables, batch, {})


# What is measured.


def test_initialization_leaves_no_taps(variables):
  assert set(variables) == {"params"}


def test_inputs_and_gradients_are_those_of_the_run(variables, batch, raw):
  """dw = x^T g at every site, which neither a wrong axis nor a wrong layer survives."""
  loss = training.from_logits(make().apply)
  gradients = jax.jit(jax.grad(loss))(variables, batch, {})["params"]
  sites = [point.removesuffix("/g") for point in raw if point.endswith("/g")]
  assert len(sites) == 8
  for site in sites:
    x, g = (raw[f"{site}/{operand}"]["raw"] for operand in "xg")
    dw = gradients
    for key in site.split("/"):
      dw = dw[key]
    found = jnp.einsum("lmk,lmn->lkn", x, g)
    # Sums over 24 tokens in another order.
    np.testing.assert_allclose(found.ravel(), dw["kernel"].ravel(), rtol=1e-4, atol=1e-6)


def test_outputs_are_inputs_times_weights(variables, raw):
  w = variables["params"]["layers"]["attn"]["q"]["kernel"].reshape(2, 16, 16)
  y = jnp.einsum("lmk,lkn->lmn", raw["layers/attn/q/x"]["raw"], w)
  np.testing.assert_allclose(raw["layers/attn/q/y"]["raw"], y, rtol=1e-5, atol=1e-6)


def test_embeddings_are_tapped_as_vocabulary_by_features(variables, raw):
  chex.assert_trees_all_equal(raw["embed/w"]["raw"][0], variables["params"]["embed"]["embedding"])


def test_norms_read_the_residual_stream(variables, batch, raw):
  embedded = variables["params"]["embed"]["embedding"][batch[:, :-1]].reshape(-1, 16)
  chex.assert_trees_all_equal(raw["layers/attn_norm/x"]["raw"][0], embedded)


def test_looped_layers_come_as_one_stack(variables, batch, raw):
  looped = {"params": unstack_layers(variables["params"])}
  found = jax.jit(taps(make(scan=False), FLOAT, RAW))(looped, batch, {})
  # Other fusions: sums in another order.
  chex.assert_trees_all_close(found, raw, rtol=1e-4, atol=1e-6)


def test_quantized_runs_are_measured_and_so_are_packed_weights():
  model, x = nn.Dense(8), jax.random.normal(jax.random.key(0), (4, 32))
  variables = model.init(jax.random.key(1), x)
  recipe = jq.Recipe(((".*", jq.weight_only(jq.formats.INT4_G32)),))
  packed = jq.quantize_params(model, variables, recipe, example=x)
  measure = lambda variables, recipe: taps(model, recipe, RAW, squares)(variables, x, {})
  as_float, fake = (jax.jit(measure, static_argnums=1)(variables, r) for r in (FLOAT, recipe))
  stored = jax.jit(measure, static_argnums=1)(packed, recipe)
  for point in "xyg":
    chex.assert_trees_all_equal(stored[point], fake[point])
  assert not (fake["g"]["raw"] == as_float["g"]["raw"]).any()
  chex.assert_trees_all_equal(stored["w"]["raw"][0], jq.to_dense(packed["params"]["kernel"]).T)


class Shared(nn.Module):
  """A dense layer with a bias that is used twice, and one with axes that move."""

  @nn.compact
  def __call__(self, x):
    mix = nn.Dense(4, name="mix", bias_init=nn.initializers.ones)
    x = mix(mix(x))
    return nn.Einsum((4, 3, 2), "btd,dhk->bhtk", use_bias=False, name="heads")(x)


def test_first_use_counts_and_axes_are_canonical():
  model, x = Shared(), jax.random.normal(jax.random.key(0), (2, 5, 4))
  variables = model.init(jax.random.key(1), x)
  found = jax.jit(taps(model, FLOAT, RAW, squares))(variables, x, {})
  chex.assert_trees_all_equal(found["mix/x"]["raw"], x.reshape(1, 10, 4))
  p = variables["params"]
  first = x.reshape(10, 4) @ p["mix"]["kernel"] + p["mix"]["bias"]
  np.testing.assert_allclose(found["mix/y"]["raw"][0], first, rtol=1e-5)

  def after(y):
    y = (y @ p["mix"]["kernel"] + p["mix"]["bias"]) @ p["heads"]["kernel"].reshape(4, 6)
    return (y**2).sum()

  np.testing.assert_allclose(found["mix/g"]["raw"][0], jax.grad(after)(first), rtol=1e-4)
  canonical = found["heads/x"]["raw"][0] @ p["heads"]["kernel"].reshape(4, 6)
  np.testing.assert_allclose(found["heads/y"]["raw"][0], canonical, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(found["heads/g"]["raw"][0], 2 * canonical, rtol=1e-4, atol=1e-6)


def test_alignment_of_a_swiglu_comes_from_the_graph(variables, raw):
  w = jax.tree.map(np.asarray, variables["params"]["layers"]["mlp"])
  gate, up = (w[name]["kernel"] / np.linalg.norm(w[name]["kernel"], axis=1, keepdims=True)
              for name in ("gate", "up"))  # fmt: skip
  expected = np.abs((gate * up).sum(1)).max(-1)
  np.testing.assert_allclose(raw["layers/mlp/swiglu"]["alignment_max"], expected, rtol=1e-5)


# The softmax.


@pytest.mark.parametrize("chunk", [None, 3], ids=["at once", "by chunks"])
def test_softmax_measures(chunk):
  q, k = (jax.random.normal(jax.random.key(i), (2, 8, h, 4)) for i, h in ((0, 4), (1, 2)))
  mask = jnp.tri(8, dtype=bool)
  found = jax.jit(lambda q, k: softmax_measures(q, k, mask, scale=0.5, chunk=chunk))(q, k)
  p = np.float64(attention_probabilities(q, k, mask, scale=0.5))
  entropy = scipy.stats.entropy(p, axis=-1).mean((0, 2))
  logits = 0.5 * np.einsum("bthd,bshd->hbts", q, np.repeat(k, 2, axis=2))[:, :, np.asarray(mask)]
  heads = scipy.stats.kurtosis(logits.reshape(4, -1), axis=-1)
  expected = {
    "entropy": entropy.mean(),
    "entropy_min": entropy.min(),
    "logit_max": logits.max(),
    "kurtosis": scipy.stats.kurtosis(logits, axis=None),
    "kurtosis_max": heads.max(),
  }
  chex.assert_trees_all_close(found, expected, rtol=1e-4)


def test_softmax_taps_of_a_model_are_those_of_its_queries_and_keys(variables, batch, monkeypatch):
  seen = []

  def spy(q, k, v, mask, *, scale):
    seen.append(softmax_measures(q, k, mask, scale=scale))
    return attend(q, k, v, mask, scale=scale)

  model = make(scan=False)
  params = {"params": unstack_layers(variables["params"])}
  found = jax.jit(taps(model, FLOAT, ()))(params, batch, {})["layers/attn/softmax"]
  monkeypatch.setattr(transformer, "attend", spy)

  def layers(params):
    seen.clear()
    model.apply(params, batch[:, :-1])
    return {name: jnp.stack([layer[name] for layer in seen]) for name in seen[0]}

  expected = jax.jit(layers)(params)
  chex.assert_trees_all_close(found, expected, rtol=1e-5)


# Cost and errors.


@pytest.mark.parametrize("recipe", [None, FLOAT], ids=["apply", "interceptor"])
def test_taps_that_nobody_reads_leave_no_operation(variables, batch, monkeypatch, recipe):
  def step():
    model = make(remat=True)
    apply = model.apply if recipe is None else jq.quantized(model, recipe)
    loss = training.from_logits(apply)
    return str(jax.make_jaxpr(jax.value_and_grad(loss))(variables, batch, {}))

  watched = step()
  monkeypatch.setattr(transformer, "tap", lambda *_: None)
  assert step() == watched


def test_the_softmax_is_tapped_when_asked_for(variables, batch):
  """The other side of the test above: the same model does have taps."""
  _, state = jax.eval_shape(lambda v: make().apply(v, batch[:, :-1], mutable=["taps"]), variables)
  assert set(state["taps"]["layers"]["attn"]) == {"softmax"}


class Dropped(nn.Module):
  """A scan that lists no taps."""

  @nn.compact
  def __call__(self, x):
    body = lambda dense, x, _: (dense(x), None)
    layers = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
    return layers(nn.Dense(4, name="lost"), x, None)[0]


class Vector(nn.Module):
  @nn.compact
  def __call__(self, x):
    tap(self, "wrong", lambda: {"norm": jnp.zeros(3)})
    return nn.Dense(4)(x)


ERRORS = {
  "no such point": (nn.Dense(4), (("head/x", OUTLIERS[0][1]),), r"matched no point.*\n  w\n  x"),
  "dropped by a scan": (Dropped(), RAW, r"nothing came out of \['lost/g', .*'taps': 0"),
  "a vector": (Vector(), (), r"wrong: taps hold scalars, got shapes {'norm': \[3\]}"),
}


@pytest.mark.parametrize(("model", "rules", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(model, rules, message):
  x = jnp.ones((2, 4))
  with pytest.raises(ValueError, match=message):
    taps(model, FLOAT, rules, squares)(model.init(jax.random.key(0), x), x, {})


def test_the_default_rules_meet_a_model(variables, batch):
  found = jax.eval_shape(taps(make(), FLOAT, SPECTRA), variables, batch, {})
  assert {p for p in found if "spectrum" in found[p]} == {
    "embed/w", "head/w", "layers/attn_norm/x", "final_norm/x"
  }  # fmt: skip
  found = jax.eval_shape(taps(make(), FLOAT, OUTLIERS), variables, batch, {})
  assert found["layers/mlp/down/g"]["hot"].shape == (2, 16)
  assert found["head/x"]["kurtosis"].shape == (1,)


def test_gates_of_linear_attention_are_a_point(batch):
  model = GLA(
    GLAShape(
      vocab=19, d_model=16, n_layers=2, n_heads=2, key_dim=4, value_dim=4, gate_rank=4, d_ff=24,
      max_len=8,
    )
  )  # fmt: skip
  variables = jax.eval_shape(model.init, jax.random.key(0), batch[:, :-1])
  found = jax.eval_shape(taps(model, FLOAT, GATES + OUTLIERS), variables, batch, {})
  gates = {p: set(v) for p, v in found.items() if p.endswith("/y")}
  assert gates == {"layers/attn/gk/up/y": {"gate_min", "gate_p50", "gate_max"}}
  assert found["layers/attn/o/g"]["flushed"].shape == (2,)
