"""One site of every training recipe: the same numbers eager, compiled, batched and scanned."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import state as quant_state
from jaxquant.kernels import matmul
from jaxquant.ops.qdot import FLOAT, qdot
from jaxquant.recipes.training.systems import SYSTEMS

D, LAYERS, MODELS = 32, 2, 2
FAST = {"xla_backend_optimization_level": 0}  # compiling is most of the work


def rules():
  """{row: its rule}, rows with the same rule once; of the head where the blocks stay in float."""
  found = {}
  for name, system in SYSTEMS.items():
    recipe = system.make()
    rule = next(r for s in ("layers/mlp/up", "head") if (r := recipe.rule(s)) != FLOAT)
    found.setdefault(rule, name)
  return {name: rule for rule, name in found.items()}


RULES = rules()


def first_state(rule, x, w):
  entries = {n: t.init() for n, t in rule.tracked.items() if n != "patch"}
  entries |= {"patch": rule.patch.init(D)} if rule.patch else {}
  entries |= {"learned": rule.learned.init(w, x)} if rule.learned else {}
  return entries | {"clock": jnp.zeros((), jnp.int32)}


def site(rule, x, w, g, key, state):
  """y, dx, dw, and the gradient of the state: what was seen and what is learned."""
  inside, outside = quant_state.split(state)

  def forward(x, w, inside):
    state = quant_state.merge(outside, inside)
    dot = lambda x, w: qdot(x, w, rule, key, state)
    if rule.learned is None:
      return dot(x, w)
    inner = lambda x, w: matmul(w, x, dot)
    return rule.learned(state.get("learned", {}), x, w, inner, state["clock"], key)

  y, pull = jax.vjp(forward, x, w, inside)
  return {"y": y} | dict(zip(("dx", "dw", "state"), pull(g), strict=True))


@functools.cache
def inputs(rule):
  """(x, w, g, key, state) of every layer of every model."""
  rng = np.random.default_rng(0)
  draw = lambda: jnp.asarray(rng.standard_normal((LAYERS, MODELS, D, D)), jnp.float32)
  x, w, g = draw(), draw(), draw()
  init = jax.vmap(jax.vmap(functools.partial(first_state, rule)))
  return x, w, g, jax.random.split(jax.random.key(3), (LAYERS, MODELS)), init(x, w)


def at(tree, layer, model):
  return jax.tree.map(lambda a: a[layer, model], tree)


@functools.cache
def compiled(rule):
  """What each layer of each model gives alone, by one compiled function."""
  run = jax.jit(functools.partial(site, rule), compiler_options=FAST)
  one = lambda i, j: jax.device_get(run(*at(inputs(rule), i, j)))
  return [[one(i, j) for j in range(MODELS)] for i in range(LAYERS)]


def check(rule, got, want):
  """Bit for bit, but where the order of a float32 sum is the compiler's.

  Codes and scales are equal everywhere, and so are the dot products of 32 terms as compiled here.
  Rotations and patches add float32 values to each other, and the gradient of a learned parameter is
  a sum over all elements: up to 1e-6 of the largest was seen. One other code would be 1e-3.
  """
  rotated = any(operand.rotation for operand in rule.operands.values())
  loose = rotated or rule.patch is not None or rule.learned is not None
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    atol = 5e-6 * np.abs(b).max() if loose else 0
    np.testing.assert_allclose(a, b, rtol=0, atol=atol)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", RULES)
def test_eager_is_compiled_and_finite(name):
  """Forward, backward, what is seen and what is learned; no gradient is lost."""
  rule = RULES[name]
  want = compiled(rule)[0][0]
  check(rule, site(rule, *at(inputs(rule), 0, 0)), want)
  assert all(np.isfinite(a).all() for a in jax.tree.leaves(want))
  assert all(np.abs(want[part]).max() > 0 for part in ("y", "dx", "dw"))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", RULES)
def test_a_scan_over_layers_of_a_vmap_over_models_is_the_loop(name):
  rule = RULES[name]
  many = jax.vmap(functools.partial(site, rule))

  def scanned(*stacked):
    return jax.lax.scan(lambda _, layer: (None, many(*layer)), None, stacked)[1]

  found = jax.device_get(jax.jit(scanned, compiler_options=FAST)(*inputs(rule)))
  for i in range(LAYERS):
    for j in range(MODELS):
      check(rule, at(found, i, j), compiled(rule)[i][j])
