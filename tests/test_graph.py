"""Folding keeps the function: one table of folds, over scan, loop and tied heads, grouped heads."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import fold, graph
from jaxquant.formats import INT8
from jaxquant.models.transformer import Transformer, TransformerShape, untie
from jaxquant.sites import flat_params
from jaxquant.transforms import hadamard, permute, rht, scale

SHAPE = TransformerShape(
  vocab=64, d_model=48, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=80, max_len=16
)
STYLES = {
  "scan": SHAPE,
  "loop": dataclasses.replace(SHAPE, scan=False),
  "tied": dataclasses.replace(SHAPE, tied=True),
}
TOKENS = jax.random.randint(jax.random.key(0), (2, 16), 0, SHAPE.vocab)
KEY = jax.random.key(7)


@functools.cache
def decoder(style):
  """Gains are not 1 (but for a tied head's), so that a fold that forgets them is seen."""
  model = Transformer(STYLES[style])
  variables = jax.jit(model.init)(jax.random.key(1), TOKENS)
  fixed = "final_norm" if style == "tied" else "none"
  params = jax.tree_util.tree_map_with_path(
    lambda path, a: positive(a.shape) if "norm" in str(path) and fixed not in str(path) else a,
    variables["params"],
  )
  return model, {"params": params}, graph.graph_of(model)


def positive(shape):
  return jnp.exp(0.5 * jax.random.normal(KEY, shape))


def scales(variables, g):
  for edge in (e for e in g.edges if not g.tied(e)):
    source = edge.writer if isinstance(edge, graph.Link) else None
    flat = flat_params(variables)
    shape = flat[edge.keys].shape if source is None else graph.matrix(flat, source).shape
    shape = shape if source is None else (*shape[:-2], shape[-1])
    variables = fold.fold_scale(variables, g, edge, positive(shape))
  return variables


def heads(t):
  def run(variables, g):
    for link in (link for link in g.links if link.head_dim):
      variables = fold.fold_heads(variables, link, t)
    return variables

  return run


def a_matrix_per_layer(variables, g):
  for link in (link for link in g.links if link.head_dim):
    if graph.matrix(flat_params(variables), link.writer).ndim == 2:
      return variables  # a loop has a transform for each layer anyway
    t = scale(jnp.ones(16)).replace(s=positive((2, 16)))
    variables = fold.fold_heads(variables, link, t, stacked=True)
  return variables


def pairs(variables, g):
  for pair in g.pairs:
    stack = graph.matrix(flat_params(variables), pair.key).shape[:-2]
    variables = fold.fold_pair(variables, pair, positive((*stack, 2, 8)))
  return variables


def permuted(variables, g):
  for link in (link for link in g.links if link.head_dim is None):
    variables = fold.fold_permutation(variables, link, permute(jax.random.permutation(KEY, 80)))
  return variables


def rotated(t):
  return lambda v, g: fold.residual_rotate(fold.fuse_norm_gains(v, g), g, t)


FOLDS = {
  "scales": scales,
  "gains": fold.fuse_norm_gains,
  "rotate": rotated(rht(KEY, 48)),
  "rotate_blocks": rotated(hadamard(16)),
  "heads": heads(hadamard(16)),
  "heads_scale": heads(scale(positive((16,)))),
  "heads_stacked": a_matrix_per_layer,
  "pairs": pairs,
  "permute": permuted,
  "outliers": lambda v, g: fold.inject_outliers(v, g, KEY, 4, 16.0),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", FOLDS)
def test_the_function_stays(name, style):
  """To 1e-5 of the largest logit: the specification allows 1e-3."""
  model, variables, g = decoder(style)
  folded = FOLDS[name](variables, g)
  apply = jax.jit(model.apply)
  want, got = apply(variables, TOKENS), apply(folded, TOKENS)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * jnp.abs(want).max())
  if (name, style) != ("heads_stacked", "loop"):
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), variables, folded)
    assert any(jax.tree.leaves(moved))
  same = lambda a, b: a.shape == b.shape and a.dtype == b.dtype
  assert all(jax.tree.leaves(jax.tree.map(same, variables, folded)))


def test_folds_run_under_jit():
  """As learned rotations need them; fused sums differ in the last bits."""
  _, variables, g = decoder("scan")
  eager = FOLDS["rotate"](variables, g)
  jitted = jax.jit(lambda v: FOLDS["rotate"](v, g))(variables)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
  jax.tree.map(close, jitted, eager)


def test_outliers_are_as_large_as_asked():
  _, variables, g = decoder("scan")
  injected = fold.inject_outliers(variables, g, KEY, 3, 32.0)
  gain = lambda v: v["params"]["layers"]["mlp_norm"]["scale"]
  ratio = np.asarray(gain(injected) / gain(variables))
  assert sorted(np.unique(ratio)) == [1, 32]
  np.testing.assert_array_equal((ratio == 32).sum(-1), [3, 3])
  assert (ratio[0] != ratio[1]).any()  # other channels in each layer


def test_untie():
  model, variables, _ = decoder("tied")
  untied, more = untie(model, variables)
  np.testing.assert_array_equal(untied.apply(more, TOKENS), model.apply(variables, TOKENS))
  g = graph.graph_of(untied)
  scaled = fold.inject_outliers(more, g, KEY, 2, 8.0)["params"]["final_norm"]["scale"]
  assert float(jnp.max(scaled)) == 8


class Mlp(nn.Module):
  """With biases and a LayerNorm."""

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(8, name="embed")(x)
    h = nn.LayerNorm(name="norm")(x)
    return x + nn.Dense(8, name="down")(nn.Dense(12, name="up")(h))


NORM = graph.Norm("norm", (graph.Weight("up"),), centred=True)
LINK = graph.Link(graph.Weight("up"), graph.Weight("down"))
WITH_BIAS = graph.Graph((graph.Weight("embed"), graph.Weight("down")), (NORM,), (LINK,))


@functools.cache
def mlp():
  variables = Mlp().init(jax.random.key(0), jnp.ones((1, 8)))
  return jax.tree.map(lambda a: a + 0.3 * jax.random.normal(KEY, a.shape), variables)


@pytest.mark.parametrize(("edge", "n"), [(NORM, 8), (LINK, 12)])
def test_biases_are_scaled_along(edge, n):
  x = jax.random.normal(KEY, (5, 8))
  folded = fold.fold_scale(mlp(), WITH_BIAS, edge, positive((n,)))
  want = Mlp().apply(mlp(), x)
  np.testing.assert_allclose(Mlp().apply(folded, x), want, rtol=0, atol=1e-5)


def packed():
  model, variables, g = decoder("scan")
  everywhere = jq.Recipe(((".*", jq.weight_only(INT8)),))
  return jq.quantize_params(model, variables, everywhere, example=TOKENS, progress=False), g


def wrong_graph():
  narrow = dataclasses.replace(LINK, repeat=2, head_dim=4)
  graph.check(dataclasses.replace(WITH_BIAS, links=(narrow,)), mlp())


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: graph.graph_of(Mlp()), r"Mlp has no graph[\s\S]*graph_of.register"),
    (lambda: fold.residual_rotate(*decoder("scan")[1:], hadamard(16)), "not 1; call fuse_norm"),
    (lambda: rotated(scale(positive((48,))))(*decoder("scan")[1:]), "Scale is not orthogonal"),
    (lambda: rotated(hadamard(8))(mlp(), WITH_BIAS), "norm: a LayerNorm subtracts the mean"),
    (lambda: fold.fold_heads(mlp(), LINK, hadamard(4)), "up -> down: no heads"),
    (
      lambda: fold.fold_permutation(decoder("scan")[1], decoder("scan")[2].links[0], None),
      "layers/attn/v: permute within a head",
    ),
    (
      lambda: fold.fold_scale(*decoder("tied")[1:], decoder("tied")[2].norms[-1], jnp.ones(48)),
      r"embed: tied to another use[\s\S]*[Uu]ntie",
    ),
    (lambda: fold.fuse_norm_gains(*packed()), "layers/attn/q: packed already"),
    (wrong_graph, r"down: K=12, but the graph says 24 \(of up\)"),
    (lambda: graph.check(WITH_BIAS, decoder("scan")[1]), "embed: the graph names a parameter"),
  ],
)
def test_errors_name_the_site_and_the_remedy(call, message):
  with pytest.raises(ValueError, match=message):
    call()
