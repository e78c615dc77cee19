"""One path: float kernels through fake quantization and packed kernels give the same bits."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxquant as jq
from jaxquant import formats
from jaxquant.ops.qdot import Operand, Rule
from jaxquant.recipes import RECIPES
from jaxquant.solvers.rtn import rtn

K, HIDDEN, N = 256, 192, 40  # tiles of 128 do not divide 192
RAGGED = 320  # nor do blocks of 128
BOTH = {  # activations quantized too
  "int8": formats.INT8,
  "mxfp8": formats.MXFP8,
  "nvfp4": formats.NVFP4,
  "e4m3": formats.E4M3_TOKEN,
}


def both(fmt):
  return Rule(Operand(fmt), Operand(fmt))


RULES = {f"w {f}": jq.weight_only(f) for f in formats.named().values()}  # aliases once
RULES |= {f"x w {n}": both(f) for n, f in BOTH.items()}
STYLED = {n: RULES[n] for n in ("x w int8", "x w mxfp8", "x w nvfp4", "w int4_g32")}
STYLES = ("loop", "scan", "remat", "vmap")


def everywhere(rule):
  return jq.Recipe(rules=((".*", rule),))


class Block(nn.Module):
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, _=None):
    h = nn.gelu(nn.Dense(HIDDEN, dtype=self.dtype, name="up")(x))
    return x.astype(self.dtype) + nn.Dense(K, dtype=self.dtype, name="down")(h), None


class Layers(nn.Module):
  style: str = "loop"
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    x = x.astype(self.dtype)
    if self.style == "scan":
      axes = {"params": 0, "calib": 0}
      rngs = {"params": True, "sr": True}
      block = nn.scan(Block, variable_axes=axes, split_rngs=rngs, length=2)
      return block(self.dtype, name="layers")(x)[0]
    block = nn.remat(Block) if self.style == "remat" else Block
    for i in range(2):
      x, _ = block(self.dtype, name=f"layers_{i}")(x)
    return x


class Mlp(nn.Module):
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Dense(HIDDEN, dtype=self.dtype, name="up")(x))
    x = nn.Dense(N, dtype=self.dtype, name="down")(x)
    return nn.Dense(N, dtype=self.dtype, name="head")(x)


def rows(m, k=K):
  return jax.random.normal(jax.random.key(m), (m, k))


@functools.cache
def variables(model, k=K):
  return jax.jit(model.init)(jax.random.key(0), rows(1, k))


def pack(model, recipe):
  return jq.quantize_params(model, variables(model), recipe, example=rows(1), progress=False)


# Decode, a few rows in bfloat16 under float32 masters, a prompt whose K leaves a tail of a block.
CALLS = ((1, K, jnp.float32), (4, K, jnp.bfloat16), (64, RAGGED, jnp.float32))


@functools.cache
def denses():
  return {k: variables(nn.Dense(HIDDEN), k) for k in (K, RAGGED)}


def packed_denses(recipe):
  """What `quantize_params` gives for round to nearest, in one jitted function."""
  fmt = recipe.rules[0][1].w.fmt
  pack = lambda layer: {**layer, "kernel": jq.pack(jq.encode(layer["kernel"], fmt))}
  return {k: {"params": pack(v["params"])} for k, v in denses().items()}


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", RULES)
def test_every_format(name):
  """Every second one decodes in float32, the others a few rows in bfloat16; all see the prompt."""
  recipe = everywhere(RULES[name])
  calls = (CALLS[list(RULES).index(name) % 2], CALLS[2])

  @jax.jit
  def run(held):
    dense = lambda dtype: jq.quantized(nn.Dense(HIDDEN, dtype=dtype), recipe)
    return [dense(dtype)(held[k], rows(m, k)) for m, k, dtype in calls]

  fake, packed = run(denses()), run(jax.jit(lambda: packed_denses(recipe))())
  chex.assert_trees_all_equal(fake, packed)
  chex.assert_tree_all_finite(fake)
  assert [y.dtype for y in fake] == [dtype for *_, dtype in calls]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", STYLED)
@pytest.mark.parametrize("style", STYLES)
def test_every_style(name, style):
  """Float32 masters; every second format computes in bfloat16."""
  recipe = everywhere(STYLED[name])
  dtype = (jnp.float32, jnp.bfloat16)[list(STYLED).index(name) % 2]
  model = Layers("loop" if style == "vmap" else style, dtype)
  apply = jq.quantized(model, recipe)
  x = rows(4)
  if style == "vmap":
    run = jax.jit(lambda v: jax.vmap(lambda x: apply(v, x))(jnp.stack([x, x * 2])))
  else:
    run = jax.jit(lambda v: apply(v, x))
  chex.assert_trees_all_equal(run(variables(model)), run(pack(model, recipe)))


def alone(recipe):
  """Whether the rule is all there is: no solver, no change of the model first, nothing learned."""
  learns = any(rule.learned for _, rule in recipe.rules)  # tests/quantizers has those
  return recipe.solve is rtn and not recipe.prepare and not learns


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", [n for n, s in RECIPES.items() if alone(s.make())])
def test_every_nearest_system(name):
  """Own scale rules, tiles, rotations: what the rule does to a float weight is what packs."""
  recipe = jq.without_state(RECIPES[name].make())
  apply = jq.quantized(Mlp(), recipe)
  run = jax.jit(lambda v: apply(v, rows(4), rngs={"sr": jax.random.key(0)}))
  chex.assert_trees_all_equal(run(variables(Mlp())), run(pack(Mlp(), recipe)))


def inner(params):
  """The jaxprs in an equation's parameters."""
  is_jaxpr = lambda p: isinstance(p, (Jaxpr, ClosedJaxpr))
  found = [p for p in jax.tree.leaves(list(params.values()), is_leaf=is_jaxpr) if is_jaxpr(p)]
  return [p.jaxpr if isinstance(p, ClosedJaxpr) else p for p in found]


def rounding_of_weights(jaxpr):
  """Names of the rounding and range-finding primitives on values as large as a weight.

  The smallest weight has HIDDEN * K elements, activations at most 16 * RAGGED.
  """
  names, found = ("round", "floor", "ceil", "reduce_max", "reduce_min"), []
  for eqn in jaxpr.eqns:
    large = any(getattr(v.aval, "size", 0) >= HIDDEN * K for v in eqn.invars)
    found += [eqn.primitive.name] * (large and eqn.primitive.name in names)
    for body in inner(eqn.params):
      found += rounding_of_weights(body)
  return found


@pytest.mark.parametrize("name", RULES)
def test_packed_program_rounds_no_weight(name):
  recipe = everywhere(RULES[name])
  packed = jax.eval_shape(lambda: packed_denses(recipe))
  apply = jq.quantized(nn.Dense(HIDDEN), recipe)
  for m, k in ((1, K), (4, K), (16, RAGGED)):  # by rows, by rows or dense, dense
    program = lambda held, m=m, k=k: jax.make_jaxpr(apply)(held[k], rows(m, k)).jaxpr
    assert rounding_of_weights(program(denses()))
    assert not rounding_of_weights(program(packed))


@pytest.mark.parametrize("name", STYLED)
@pytest.mark.parametrize("style", ["scan", "remat"])
def test_gradients_are_finite_and_reach_every_parameter(name, style):
  model = Layers(style)
  apply = jq.quantized(model, everywhere(STYLED[name]))
  grads = jax.jit(jax.grad(lambda v: jnp.square(apply(v, rows(64))).mean()))(variables(model))
  chex.assert_tree_all_finite(grads)
  assert all(bool((g != 0).any()) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", STYLED)
def test_gradient_of_the_input_is_that_of_packed_kernels(name):
  """Straight-through: the backward pass multiplies by the quantized weight, packed or not."""
  recipe = everywhere(STYLED[name])
  apply = jq.quantized(Mlp(), recipe)
  grad = jax.jit(jax.grad(lambda x, v: jnp.square(apply(v, x)).mean()))
  chex.assert_trees_all_equal(grad(rows(64), variables(Mlp())), grad(rows(64), pack(Mlp(), recipe)))


@pytest.mark.parametrize("name", ["x w int8", "w nvfp4"])
def test_jit_equals_eager(name):
  model, recipe = nn.Dense(N), everywhere(RULES[name])
  apply = jq.quantized(model, recipe)
  eager = apply(variables(model), rows(4))
  chex.assert_trees_all_equal(eager, apply(pack(model, recipe), rows(4)))
  # Fusion contracts multiply-adds (the bias, the sums of blocks): last bits of y differ.
  y = jax.jit(apply)(variables(model), rows(4))
  np.testing.assert_allclose(y, eager, rtol=0, atol=1e-6 * jnp.abs(eager).max())


MESH = 4
SHARDED = ("x w int8", "x w mxfp8", "x w nvfp4", "w int8", "w int4_g32", "w nvfp4", "w e4m3_g128")


def place(kernel, spec):
  """Each array of a kernel [K, N] cut as `spec` says, where its axes divide."""
  mesh = Mesh(np.array(jax.devices()[:MESH]), "d")

  def one(a):
    cut = [n if n and size % MESH == 0 else None for n, size in zip(spec, a.shape)]
    return jax.device_put(a, NamedSharding(mesh, PartitionSpec(*cut)))

  return jax.tree.map(one, kernel)


@pytest.mark.parametrize("name", SHARDED)
def test_sharded(name):
  """Cut on N: the same bits. Cut on K: float32 sums in another order (all-reduce)."""
  rule = RULES[name]
  x, w = rows(16), jax.random.normal(jax.random.key(1), (K, 64))
  packed = jq.quantize(w, rule.w.fmt)
  dot = jax.jit(lambda x, w: jq.qdot(x, w, rule))
  want = dot(x, w)
  for kernel in (w, packed):
    y = dot(place(x, (None, None)), place(kernel, (None, "d")))
    assert y.sharding.spec == PartitionSpec(None, "d")
    chex.assert_trees_all_equal(np.asarray(y), np.asarray(want))
    y = dot(place(x, (None, "d")), place(kernel, ("d", None)))
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-4)  # sum |x w| is about 200: 4 ulps of it
