"""What JAX and Linen do in silence, and what must come of it. The other traps: test_traps.py."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxquant as jq
from jaxquant import formats, kernels
from jaxquant.ops.qdot import Operand, Rule
from jaxquant.rounding import stochastic
from jaxquant.statistics import COUNT
from jaxquant.tensor import map_float

K = 32
X = jax.random.normal(jax.random.key(1), (4, K))


def everywhere(rule):
  return jq.Recipe(rules=((".*", rule),))


INT4 = everywhere(jq.weight_only(formats.INT4_G32))
CLIPS = Rule(Operand(formats.MXFP4), Operand(formats.MXFP4))  # its floor scales saturate
NOISY = everywhere(Rule(x=Operand(formats.INT4, rounding=stochastic)))


def made(model, x=X):
  return model.init(jax.random.key(0), x)


class Tied(nn.Module):
  @nn.compact
  def __call__(self, tokens):
    embed = nn.Embed(48, K, name="embed")
    return embed.attend(nn.Dense(K, name="mix")(embed(tokens)))


@pytest.mark.parametrize("rule", [CLIPS, INT4.rules[0][1]], ids=str)
def test_training_sees_the_values_of_inference(rule):
  """Straight-through by custom_vjp: `x + stop_gradient(q - x)` is not q where values clip."""
  model, tokens = Tied(), jnp.arange(12)[None]
  variables = made(model, tokens)
  apply = jq.quantized(model, everywhere(rule))
  loss = lambda v: (apply(v, tokens).sum(), apply(v, tokens))
  (_, y), _ = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables)
  chex.assert_trees_all_equal(y, jax.jit(apply)(variables, tokens))


class Body(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    return x + nn.Dense(K, name="d")(x), None


class Scanned(nn.Module):
  rngs: bool = True

  @nn.compact
  def __call__(self, x):
    split = {"params": True, "sr": True} if self.rngs else {"params": True}
    layers = nn.scan(Body, variable_axes={"params": 0}, split_rngs=split, length=3)
    return layers(name="layers")(x, None)[0]


def test_a_scan_that_drops_the_key_is_an_error():
  """make_rng would raise InvalidRngError, or worse, all layers would share their noise."""
  apply = jax.jit(jq.quantized(Scanned(), NOISY))
  rngs = {"sr": jax.random.key(0)}
  y = apply(made(Scanned()), X, rngs=rngs)
  chex.assert_trees_all_equal(y, apply(made(Scanned()), X, rngs=rngs))
  with pytest.raises(ValueError, match=r"layers/d: the rule is random.*list 'sr' in split_rngs"):
    jq.quantized(Scanned(rngs=False), NOISY)(made(Scanned()), X, rngs=rngs)


class Outputs(nn.Module):
  """Three layers that see the same x."""

  @nn.compact
  def __call__(self, x):
    body = lambda layer, x, _: (x, layer(x))
    split = {"params": True, "sr": True}
    layers = nn.scan(body, variable_axes={"params": 0}, split_rngs=split, length=3)
    return layers(nn.Dense(K, name="d"), x, None)[1]


def test_layers_of_a_scan_draw_their_own_noise():
  alike = jax.tree.map(lambda a: jnp.stack([a[0]] * 3), made(Outputs()))
  y = jq.quantized(Outputs(), NOISY)(alike, X, rngs={"sr": jax.random.key(0)})
  assert len({np.asarray(a).tobytes() for a in y}) == 3


class Distill(nn.Module):
  """A student whose loss calls a teacher with a recipe of its own."""

  recipe: jq.Recipe

  @nn.compact
  def __call__(self, x):
    student = nn.Dense(8, name="student")
    teacher = jq.quantized(nn.Dense(8), self.recipe)
    return student(x), teacher({"params": jax.lax.stop_gradient(student.variables["params"])}, x)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
  "inner", [INT4, jq.Recipe(), everywhere(CLIPS)], ids=["int4", "float", "mx"]
)
def test_recipes_nest(inner):
  """A model inside a quantized one runs as its own recipe says, in float too."""
  model = Distill(inner)
  variables = made(model)
  student, teacher = jq.quantized(model, INT4)(variables, X)
  alone = {"params": variables["params"]["student"]}
  chex.assert_trees_all_equal(teacher, jq.quantized(nn.Dense(8), inner)(alone, X))
  chex.assert_trees_all_equal(student, jq.quantized(nn.Dense(8), INT4)(alone, X))


class Cached(nn.Module):
  """An nn.jit cache that outlives the call."""

  @nn.compact
  def __call__(self, x):
    return JIT_DENSE(8, name="d")(x)


JIT_DENSE = nn.jit(nn.Dense)


def test_visits_are_not_lost_in_a_cache():
  """Tables and statistics after the model ran under the very same recipe."""
  model, recipe = Cached(), jq.Recipe()
  variables = made(model)
  jq.quantized(model, recipe)(variables, X)
  for _ in range(2):
    assert [s.path for s in jq.sites(model, variables, X, recipe=recipe)] == ["d"]
    assert int(jq.collect(model, recipe, COUNT)(variables, X)["d"]) == 4


def test_an_error_leaves_no_interceptor():
  model, variables = nn.Dense(8), made(nn.Dense(8))
  with pytest.raises(ValueError, match="no key"):
    jq.quantized(model, NOISY)(variables, X)
  chex.assert_trees_all_equal(model.apply(variables, X), nn.Dense(8).apply(variables, X))
  assert jq.intercept._in_force.value == (0, None, None)


def test_initialization_is_that_of_the_model():
  with jq.intercepted(INT4):
    chex.assert_trees_all_equal(made(Tied(), jnp.arange(4)), made(Tied(), jnp.arange(4)))
  plain = made(Tied(), jnp.arange(4))
  with jq.intercepted(INT4):
    chex.assert_trees_all_equal(made(Tied(), jnp.arange(4)), plain)


def test_remat_and_grad_trace_a_site_once_each():
  seen = []

  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.remat(Body)(name="layer")(x, None)[0]

  model = Model()
  variables = made(model)

  def loss(variables):
    with jq.intercepted(INT4, lambda module, one: seen.append(one.path)):
      return model.apply(variables, X).sum()

  jax.jit(jax.grad(loss)).lower(variables)
  assert seen == ["layer/d"]


# Trees.


def packed_dense(recipe=INT4):
  model = nn.Dense(8)
  return model, jq.quantize_params(model, made(model), recipe, example=X, progress=False)


@pytest.mark.parametrize("name", ["int4_g32", "mxfp4", "nvfp4", "int3_g128"])
def test_casts_leave_packed_kernels_alone(name):
  """A tree.map to bfloat16 would turn codes and scales into other numbers."""
  recipe = everywhere(jq.weight_only(formats.named()[name]))
  model, packed = packed_dense(recipe)
  cast = map_float(lambda a: a.astype(jnp.bfloat16), packed)
  chex.assert_trees_all_equal(cast["params"]["kernel"], packed["params"]["kernel"])
  assert cast["params"]["bias"].dtype == jnp.bfloat16
  apply = jax.jit(jq.quantized(model, recipe))
  chex.assert_trees_all_equal(apply(cast, X), apply(packed, X))  # the bias is zero


def test_a_low_rank_branch_trains_over_a_packed_kernel():
  """Gradients for the float part only; optimizers see neither codes nor scales."""
  model, packed = packed_dense()
  base = packed["params"]["kernel"]
  branch = kernels.LowRank(jax.random.normal(jax.random.key(2), (K, 2)) * 0.1, jnp.zeros((2, 8)))
  apply = jq.quantized(model, INT4)
  target = jax.random.normal(jax.random.key(3), (4, 8))

  def loss(trained):
    kernel = kernels.Sum((base, trained["branch"]))
    return jnp.square(
      apply({"params": {"kernel": kernel, "bias": trained["bias"]}}, X) - target
    ).mean()

  tx = optax.adam(0.05)
  trained = {"branch": branch, "bias": packed["params"]["bias"]}
  state = tx.init(trained)

  @jax.jit
  def step(trained, state):
    value, grads = jax.value_and_grad(loss)(trained)
    updates, state = tx.update(grads, state)
    return optax.apply_updates(trained, updates), state, value

  losses = []
  for _ in range(20):
    trained, state, value = step(trained, state)
    losses.append(float(value))
  assert losses[-1] < 0.3 * losses[0]


def test_masked_optimizers_skip_packed_kernels():
  _, packed = packed_dense()
  is_float = lambda k: not kernels.is_node(k)
  mask = jq.map_kernels(is_float, packed["params"])
  assert mask == {"kernel": False, "bias": True}
  tx = optax.masked(optax.adam(0.1), mask)
  tx.init(packed["params"])


def test_packed_trees_are_donated():
  """No array is in the tree twice; the result may take the place of the argument."""
  model, packed = packed_dense()
  apply = jq.quantized(model, INT4)
  want = apply(packed, X)
  step = jax.jit(lambda v: (v, apply(v, X)), donate_argnums=0)
  held, y = step(jax.tree.map(jnp.copy, packed))
  chex.assert_trees_all_close(y, want, rtol=1e-6, atol=1e-6)  # jit against eager: fused bias
  chex.assert_trees_all_equal(held, packed)


def test_ensembles_by_vmap_over_variables():
  """Leading axes of a packed kernel are free: stacked models are one vmap."""
  model = nn.Dense(8)
  each = [jax.tree.map(lambda a, i=i: a * (i + 1), made(model)) for i in range(3)]
  packed = [jq.quantize_params(model, v, INT4, example=X, progress=False) for v in each]
  stacked = jax.tree.map(lambda *a: jnp.stack(a), *packed)
  apply = jq.quantized(model, INT4)
  y = jax.jit(jax.vmap(apply, in_axes=(0, None)))(stacked, X)
  # A batched product is another program than a single one: sums in another order.
  chex.assert_trees_all_close(y, jnp.stack([apply(v, X) for v in packed]), rtol=1e-5, atol=1e-5)
