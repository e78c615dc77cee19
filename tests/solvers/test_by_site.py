"""Solvers by site: the same choice whichever way a model is gone through; AWQ's q and k."""

import functools

import jax
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import formats as F
from jaxquant.blocks import BlockSolve
from jaxquant.kernels import to_dense
from jaxquant.models import Transformer, TransformerShape
from jaxquant.ops.qdot import FLOAT, weight_only
from jaxquant.prepare import prepare
from jaxquant.recipe import Recipe
from jaxquant.recipes.weight_only.awq import awq
from jaxquant.sites import flat_params
from jaxquant.solvers import BySite, rtn
from jaxquant.solvers.clip_search import clip_search
from jaxquant.solvers.learned_rounding import Clipping
from jaxquant.statistics import AMAX

SHAPE = TransformerShape(
  vocab=32, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, d_ff=48, max_len=16
)
MODEL = Transformer(SHAPE)
TOKENS = jax.random.randint(jax.random.key(0), (2, 16), 0, 32)
FMT = F.Format(F.int_grid(4, full=True), 16, zero_point=True)


@functools.cache
def variables():
  return jax.jit(MODEL.init)(jax.random.key(1), TOKENS)


def halved(w, statistic, fmt):
  """Another solver than round to nearest, to the eye."""
  return rtn(0.5 * w, statistic, fmt)


SOLVE = BySite(((".*/(q|k)", rtn),), halved)
WAYS = {  # keywords of quantize_params, of the recipe; all at once is below
  "block by block": ({"statistics_bytes": 0}, {}),
  "behind quantized blocks": ({}, {"inputs": "quantized"}),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", WAYS)
def test_each_site_gets_its_solver(name):
  how, changes = WAYS[name]
  rules = (("embed|head", FLOAT), (".*", weight_only(FMT)))
  recipe = Recipe(rules, SOLVE, AMAX).replace(**changes)
  batches = [TOKENS] if recipe.calibrates else None
  packed = flat_params(
    jq.quantize_params(MODEL, variables(), recipe, batches, progress=False, **how)
  )
  before = flat_params(variables())
  for site in ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/down"):
    keys = ("layers", *site.split("/"), "kernel")
    factor = 1.0 if site in ("attn/q", "attn/k") else 0.5
    got = to_dense(packed[keys])
    want = to_dense(rtn(factor * before[keys].reshape(got.shape), None, FMT))
    np.testing.assert_array_equal(got, want, err_msg=site)


def test_awq_does_not_clip_q_and_k():
  """Whole ranges there, as in the published code; elsewhere the ranges that `clip_search` finds."""
  recipe = awq(FMT, steps=2)
  packed = flat_params(jq.quantize_params(MODEL, variables(), recipe, [TOKENS], progress=False))
  ready = flat_params(prepare(MODEL, variables(), recipe, [TOKENS]))
  whole = {}
  for site in ("attn/q", "attn/k", "attn/v", "mlp/down"):
    keys = ("layers", *site.split("/"), "kernel")
    got = to_dense(packed[keys])
    want = to_dense(rtn(ready[keys].reshape(got.shape), None, FMT))
    whole[site] = np.array_equal(got, want)
  assert whole == {"attn/q": True, "attn/k": True, "attn/v": False, "mlp/down": False}


def test_a_recipe_knows_its_solvers():
  recipe = awq()
  assert recipe.at("layers/attn/k").solve is rtn
  assert recipe.at("layers/attn/v") == recipe.replace(solve=clip_search)
  assert recipe.at("layers/attn/v").at("layers/attn/k").solve is clip_search
  assert "solver rtn for .*/(q|k), else clip_search" in str(recipe)
  assert awq() == awq()


@pytest.mark.parametrize(
  ("make", "match"),
  [
    (lambda: BySite((".*", rtn), rtn), "pairs, got '.*'"),
    (lambda: BySite((("(", rtn),), rtn), "not a regular expression"),
    (lambda: BySite(((".*", None),), rtn), "pairs"),
    (lambda: BySite((), BlockSolve(Clipping())), "learns several sites"),
    (lambda: SOLVE(None, None, FMT), r"take `Recipe.at\(path\)`"),
  ],
)
def test_errors_say_what_is_wrong(make, match):
  with pytest.raises(ValueError, match=match):
    make()
