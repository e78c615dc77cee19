"""Every kind of contraction through the interceptor, against the plain Linen module.

MXINT8 holds small integers exactly, and sums of their products are exact in float32 in any order.
So with integer weights and inputs the quantized module must equal the plain one to the last bit,
gradients included, fake-quantized or packed: any wrong axis shows.
"""

import dataclasses

import chex
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import formats, kernels
from jaxquant.contraction import Contraction, contraction, parameter
from jaxquant.ops.qdot import Operand, Rule
from jaxquant.rounding import stochastic
from jaxquant.statistics import AMAX, COUNT, HESSIAN

EXACT = jq.Recipe(rules=((".*", jq.weight_only(formats.MXINT8)),))


class Projection(nn.Module):
  """A user's module: kernel [N, K] declared in setup, with a gain."""

  features: int
  width: int

  def setup(self):
    self.kernel = self.param("kernel", nn.initializers.normal(), (self.features, self.width))
    self.gain = self.param("gain", nn.initializers.ones, (self.features,))

  def __call__(self, x):
    return (x @ self.kernel.T) * self.gain


@contraction.register
def _(module: Projection, method: str, x):
  if method != "__call__":
    return None
  finish = lambda y: y.reshape(*x.shape[:-1], -1) * parameter(module, "gain")
  return Contraction("kernel", x.reshape(-1, x.shape[-1]), lambda w: w.T, finish, "projection")


class Inherits(Projection):
  """Found by its base's registration."""


class Doubles(nn.Dense):
  """Overrides a registered method: its own part must run, the inner call is the site."""

  @nn.compact
  def __call__(self, inputs, times=2):
    return super().__call__(inputs * times) + 1


class Tied(nn.Module):
  @nn.compact
  def __call__(self, ids):
    embed = nn.Embed(11, 8, name="embed")
    return embed.attend(nn.Dense(8, name="mix")(embed(ids)))


class Attends(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Embed(11, 8).attend(x)


class Lifted(nn.Module):
  """nn.vmap over experts, nn.remat and nn.jit around a Linen class itself."""

  @nn.compact
  def __call__(self, x):
    axes = {"params": 0, "calib": 0}
    experts = nn.vmap(nn.Dense, variable_axes=axes, split_rngs={"params": True, "sr": True})
    x = experts(8, name="experts")(jnp.stack([x, x + 1]))
    return nn.jit(nn.Dense)(5, name="jitted")(nn.remat(nn.Dense)(6, name="remat")(x))


@dataclasses.dataclass(frozen=True)
class Case:
  """A module, the shape of its input, and the canonical [..., K, N] of its sites."""

  module: nn.Module
  x: tuple[int, ...]
  sites: tuple[tuple[int, ...], ...]
  ids: int = 0  # inputs are ids below this


def conv(features, window, x, site, **options):
  return Case(nn.Conv(features, window, **options), x, (site,))


def einsum(equation, w, x, site, **options):
  return Case(nn.Einsum(w, equation, **options), x, (site,))


CASES = {
  "dense": Case(nn.Dense(5), (3, 8), ((8, 5),)),
  "dense without bias": Case(nn.Dense(5, use_bias=False), (2, 3, 4, 8), ((8, 5),)),
  "dense on a vector": Case(nn.Dense(5), (8,), ((8, 5),)),
  "general": Case(nn.DenseGeneral((3, 4)), (2, 5, 8), ((8, 12),)),
  "general, two axes": Case(nn.DenseGeneral(5, axis=(-2, -1)), (2, 7, 3, 4), ((12, 5),)),
  "general, axes out of order": Case(nn.DenseGeneral(5, axis=(-1, 1)), (2, 7, 3, 4), ((28, 5),)),
  "general, first axis": Case(nn.DenseGeneral((2, 3), axis=0), (7, 3, 4), ((7, 6),)),
  "general, a batch axis": Case(
    nn.DenseGeneral((2, 3), axis=-1, batch_dims=(0,)), (4, 5, 8), ((4, 8, 6),)
  ),
  "general, two batch axes": Case(
    nn.DenseGeneral(6, axis=(-2, -1), batch_dims=(0, 1)), (2, 3, 5, 4, 8), ((2, 3, 32, 6),)
  ),
  "heads": einsum("btd,dhk->bthk", (8, 2, 3), (2, 5, 8), (8, 6)),
  "heads back": einsum("bthk,hkd->btd", (2, 3, 8), (2, 5, 2, 3), (6, 8)),
  "experts": einsum("ecd,edf->ecf", (4, 8, 6), (4, 5, 8), (4, 8, 6)),
  "experts inside": einsum("bced,edf->bcef", (4, 8, 6), (2, 5, 4, 8), (4, 8, 6), use_bias=False),
  "ellipsis": einsum("...d,df->...f", (8, 6), (2, 3, 5, 8), (8, 6)),
  "ellipsis before heads": einsum("...hk,hkd->...d", (2, 3, 8), (5, 2, 3), (6, 8)),
  "transposed weight": einsum("bd, vd -> bv", (7, 8), (3, 8), (8, 7)),
  "output in another order": einsum("btd,dhk->bhtk", (8, 2, 3), (2, 5, 8), (8, 6), use_bias=False),
  "conv 1x1": conv(6, (1, 1), (2, 5, 5, 3), (3, 6)),
  "conv 3x3 same": conv(6, (3, 3), (2, 5, 6, 3), (27, 6)),
  "conv 3x3 valid, strides": conv(6, (3, 3), (2, 7, 8, 3), (27, 6), strides=2, padding="VALID"),
  "conv, strides differ": conv(6, (3, 2), (2, 7, 8, 3), (18, 6), strides=(2, 1)),
  "conv, numbers as padding": conv(6, (3, 2), (2, 5, 6, 3), (18, 6), padding=[(0, 2), 1]),
  "conv circular": conv(6, (4, 3), (2, 7, 6, 3), (36, 6), padding="CIRCULAR"),
  "conv reflect": conv(6, (3, 4), (2, 7, 6, 3), (36, 6), padding="REFLECT"),
  "conv 1d causal, dilated": conv(
    6, 3, (2, 9, 4), (12, 6), padding="CAUSAL", kernel_dilation=2, use_bias=False
  ),
  "conv 1d": conv(6, (3,), (2, 9, 4), (12, 6)),
  "conv, dilated circular": conv(
    6, (3, 3), (2, 7, 8, 3), (27, 6), kernel_dilation=(2, 1), padding="CIRCULAR"
  ),
  "conv, dilated input": conv(6, (3, 3), (2, 4, 5, 3), (27, 6), input_dilation=2, padding=1),
  "conv, groups": conv(6, (3, 3), (2, 5, 5, 4), (2, 18, 3), feature_group_count=2),
  "conv, depthwise": conv(8, (3, 3), (2, 5, 5, 4), (4, 9, 2), feature_group_count=4),
  "conv, one image": conv(6, (3, 3), (5, 5, 3), (27, 6)),
  "conv, two batch axes": conv(6, (3, 3), (2, 3, 5, 5, 3), (27, 6)),
  "conv 3d": conv(4, (2, 2, 2), (1, 3, 4, 3, 2), (16, 4)),
  "lookup": Case(nn.Embed(11, 8), (2, 3), ((8, 11),), ids=11),
  "lookup of one": Case(nn.Embed(1, 8), (2, 3), ((8, 1),), ids=1),
  "attend": Case(Attends(), (2, 3, 8), ((8, 11),)),
  "tied": Case(Tied(), (2, 3), ((8, 11), (8, 8)), ids=11),
  "attention": Case(nn.MultiHeadDotProductAttention(2, qkv_features=8), (2, 5, 8), ((8, 8),) * 4),
  "a user's module": Case(Projection(5, 8), (2, 3, 8), ((8, 5),)),
  "a subclass of it": Case(Inherits(5, 8), (2, 3, 8), ((8, 5),)),
  "an override": Case(Doubles(5), (2, 8), ((8, 5),)),
  "lifted classes": Case(Lifted(), (3, 8), ((8, 8), (8, 6), (6, 5))),
}
TABLE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def integers(seed, shape, top=4):
  values = np.random.default_rng(seed).integers(1 - top, top, shape)
  return jnp.asarray(values, jnp.float32)


def inputs(case):
  if case.ids:
    return jnp.asarray(np.random.default_rng(1).integers(0, case.ids, case.x), jnp.int32)
  return integers(1, case.x)


def integer_variables(model, x):
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)
  leaves, tree = jax.tree.flatten(shapes)
  return tree.unflatten([integers(i, a.shape) for i, a in enumerate(leaves)])


@pytest.mark.sampled(3)
@TABLE
def test_equals_the_plain_module(case):
  """Values of fake-quantized and packed weights, and gradients: straight through."""
  model, x = case.module, inputs(case)
  variables = integer_variables(model, x)
  packed = jq.quantize_params(model, variables, EXACT, example=x, progress=False)
  assert any(kernels.is_node(k) for k in jax.tree.leaves(packed, is_leaf=kernels.is_node))
  apply = jq.quantized(model, EXACT)

  @jax.jit
  def run(variables, packed, x):
    def grads(apply):
      cotangent = lambda y: integers(7, y.shape).astype(y.dtype)
      y, pull = jax.vjp(lambda v: apply(v, x), variables)
      return y, pull(cotangent(y))

    return grads(apply), grads(model.apply), apply(packed, x)

  fake, plain, decoded = run(variables, packed, x)
  if isinstance(model, nn.MultiHeadDotProductAttention):  # softmax: not exact, fused as it comes
    chex.assert_trees_all_close(fake, plain, rtol=1e-4, atol=1e-3)
    chex.assert_trees_all_close(decoded, plain[0], rtol=1e-5, atol=1e-5)
  else:
    chex.assert_trees_all_equal(fake, plain)
    chex.assert_trees_all_equal(decoded, plain[0])
    assert decoded.dtype == plain[0].dtype


@TABLE
def test_sites_and_statistics(case):
  """The table has each contraction; a statistic is of the x that the kernel multiplies."""
  model, x = case.module, inputs(case)
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  table = jq.sites(model, variables, x, recipe=EXACT)
  assert tuple(s.shape for s in table) == case.sites
  collect = lambda of: jax.eval_shape(jq.collect(model, jq.Recipe(), of), variables, x)
  counts, hessians = collect(COUNT), collect(HESSIAN)
  for site in table:
    if site.kinds == ("lookup",):
      assert site.path not in counts
      continue
    lead = (*site.stack, *site.shape[:-2])
    assert counts[site.path].shape == lead
    assert hessians[site.path].shape == (*lead, site.shape[-2], site.shape[-2])


def test_bfloat16_compute():
  """Quantized in the parameter's dtype, multiplied in the module's."""
  for module in (nn.Dense(5, dtype=jnp.bfloat16), nn.Conv(5, (3,), dtype=jnp.bfloat16)):
    x = integers(1, (2, 6, 4))
    variables = integer_variables(module, x)
    y = jq.quantized(module, EXACT)(variables, x)
    assert y.dtype == jnp.bfloat16
    chex.assert_trees_all_equal(y, module.apply(variables, x))


# Not contractions: they stay as they are, and the table says so.


@pytest.mark.parametrize(
  ("module", "shape"),
  [
    (nn.Einsum((4, 8), "btd,td->bt"), (3, 4, 8)),  # a batch of dot products: N is empty
    (nn.Einsum((8, 6), "bd,df->f"), (3, 8)),  # sums over the rows
    (nn.Einsum((8, 8), "bd,dd->bd", use_bias=False), (3, 8)),  # a diagonal
    (nn.Conv(6, (3,), mask=jnp.ones((3, 4, 6))), (2, 9, 4)),
    (nn.ConvTranspose(6, (3,)), (2, 9, 4)),
    (nn.ConvLocal(6, (3,), use_bias=False), (2, 9, 4)),
  ],
)
def test_left_as_it_is(module, shape):
  x = integers(1, shape)
  variables = integer_variables(module, x)
  assert jnp.array_equal(jq.quantized(module, EXACT)(variables, x), module.apply(variables, x))
  table = jq.sites(module, variables, x, recipe=jq.Recipe())
  assert [s.path for s in table] + [path for path, _ in table.left] in (["kernel"], [""])


@pytest.mark.parametrize("equation", ["bd,df", "bd->bd", None])
def test_bad_equations_raise_what_linen_raises(equation):
  x = jnp.ones((2, 8))
  module = nn.Einsum((8, 6), equation)
  variables = {"params": {"kernel": jnp.ones((8, 6)), "bias": jnp.ones(6)}}
  with pytest.raises(ValueError) as plain:
    module.apply(variables, x)
  with pytest.raises(ValueError, match="einsum") as ours:
    jq.quantized(module, EXACT)(variables, x)
  assert str(ours.value) == str(plain.value)


def test_ids_out_of_range_are_nan_as_in_linen():
  module, ids = nn.Embed(5, 8), jnp.array([0, 4, 5, -1, -6])
  variables = integer_variables(module, ids)
  packed = jq.quantize_params(module, variables, EXACT, example=ids, progress=False)
  want = module.apply(variables, ids)
  assert np.isnan(want).any(-1).tolist() == [False, False, True, False, True]
  for held in (variables, packed):
    np.testing.assert_array_equal(jq.quantized(module, EXACT)(held, ids), want)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", formats.named())
def test_columns_are_those_of_the_whole(name):
  """A lookup decodes single columns: blocks, tiles and second levels must follow."""
  index = jnp.array([0, 39, 17, 16, 17])

  @jax.jit
  def run(w):
    q = jq.encode(w, formats.named()[name])
    some = [jq.dequantize(jq.intercept.columns(held, index)) for held in (q, jq.pack(q))]
    return some, jq.dequantize(q)[:, index]

  some, want = run(jax.random.normal(jax.random.key(0), (70, 40)))
  chex.assert_trees_all_equal(*some, want)


# Composed kernels.


def composed(w):
  low = kernels.LowRank(integers(1, (8, 2)), integers(2, (2, 5)))
  return kernels.Sum((jq.quantize(w, formats.MXINT8), jq.quantize(w, formats.MXINT4), low))


def codebook():
  index = jax.random.randint(jax.random.key(3), (4, 5), 0, 8).astype(jnp.uint8)
  return kernels.Codebook(index, jax.random.normal(jax.random.key(4), (8, 2)), jnp.ones((1, 5)))


@pytest.mark.parametrize("make", [lambda: composed(integers(0, (8, 5))), codebook])
def test_composed_kernels_are_not_quantized_again(make):
  """Each part stays as its solver left it, whatever format the rule names for float weights."""
  kernel, x = make(), integers(5, (3, 8))
  variables = {"params": {"kernel": kernel, "bias": integers(6, (5,))}}
  y = jq.quantized(nn.Dense(5), EXACT)(variables, x)
  want = x @ kernels.to_dense(kernel) + variables["params"]["bias"]
  np.testing.assert_allclose(y, want, rtol=1e-6, atol=1e-5)  # terms are added in another order


def test_composed_embedding():
  low = kernels.LowRank(integers(1, (8, 2)), integers(2, (2, 5)))
  table = kernels.Sum((jq.quantize(integers(0, (8, 5)), formats.MXINT8), low))
  ids = jnp.array([[0, 4], [2, 2]])
  y = jq.quantized(nn.Embed(5, 8), EXACT)({"params": {"embedding": table}}, ids)
  chex.assert_trees_all_equal(y, kernels.to_dense(table).T[ids])


# Boxes.


def test_boxed_parameters():
  init = nn.with_partitioning(nn.initializers.normal(), ("embed", "mlp"))
  module, x = nn.Dense(5, kernel_init=init), integers(1, (3, 8))
  boxed = module.init(jax.random.key(0), x)
  assert isinstance(boxed["params"]["kernel"], nn.Partitioned)
  plain = nn.meta.unbox(boxed)
  apply = jax.jit(jq.quantized(module, EXACT))
  chex.assert_trees_all_equal(apply(boxed, x), apply(plain, x))
  packed = jq.quantize_params(module, boxed, EXACT, example=x, progress=False)
  chex.assert_trees_all_equal(apply(packed, x), apply(plain, x))
  inside = jax.tree.map(lambda a: nn.Partitioned(a, ("embed", "mlp")), packed["params"]["kernel"])
  held = {"params": packed["params"] | {"kernel": inside}}
  chex.assert_trees_all_equal(apply(held, x), apply(plain, x))


# Errors.


def test_missing_parameters_raise_what_linen_raises():
  with pytest.raises(flax.errors.ScopeParamNotFoundError, match="kernel"):
    jq.quantized(nn.Dense(5), EXACT)({"params": {"bias": 0}}, jnp.ones((3, 8)))


def test_errors_name_the_site():
  x = integers(1, (3, 8))
  model = nn.Sequential([nn.Dense(5), nn.Dense(4)])
  variables = integer_variables(model, x)
  packed = jq.quantize_params(model, variables, EXACT, example=x, progress=False)
  other = jq.Recipe(rules=((".*", jq.weight_only(formats.INT8)),))
  with pytest.raises(ValueError, match=r"layers_0: the weight is packed as mxint8.*int8"):
    jq.quantized(model, other)(packed, x)
  with pytest.raises(ValueError, match=r"layers_0: .*\[8, 5\].*K=6.*another model"):
    jq.quantized(model, EXACT)(packed, integers(1, (3, 6)))
  noisy = jq.Recipe(rules=((".*", Rule(x=Operand(formats.INT8, rounding=stochastic))),))
  with pytest.raises(ValueError, match=r"layers_0: the rule is random.*rngs=\{'sr': key\}"):
    jq.quantized(model, noisy)(variables, x)


def test_experts_draw_their_own_noise():
  rule = Rule(x=Operand(formats.INT4, rounding=stochastic))
  module, x = nn.Einsum((3, 8, 6), "ecd,edf->ecf"), jnp.ones((3, 5, 8)) * jnp.linspace(0.1, 1, 8)
  variables = {"params": {"kernel": jnp.ones((3, 8, 6)), "bias": jnp.zeros((3, 6))}}
  apply = jax.jit(jq.quantized(module, jq.Recipe(rules=((".*", rule),))))
  y = apply(variables, x, rngs={"sr": jax.random.key(0)})
  assert len({a.tobytes() for a in np.asarray(y)}) == 3
  chex.assert_trees_all_equal(y, apply(variables, x, rngs={"sr": jax.random.key(0)}))


# Statistics.


def test_statistics_of_shared_modules_and_batches_combine():
  class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
      layer = nn.Dense(8, name="layer")
      return layer(layer(x))

  model, x = Twice(), integers(1, (3, 8))
  variables = integer_variables(model, x)
  inner = nn.Dense(8).apply({"params": variables["params"]["layer"]}, x)
  got = jax.jit(jq.collect(model, jq.Recipe(), AMAX))(variables, x)
  chex.assert_trees_all_equal(got, {"layer": jnp.abs(jnp.concatenate([x, inner])).max(0)})


def test_statistics_of_chosen_sites_only():
  model, x = nn.Sequential([nn.Dense(5), nn.Dense(4)]), integers(1, (3, 8))
  variables = integer_variables(model, x)
  assert set(jq.collect(model, jq.Recipe(), AMAX)(variables, x)) == {"layers_0", "layers_1"}
  some = jq.collect(model, jq.Recipe(), AMAX, frozenset({"layers_1"}))(variables, x)
  assert set(some) == {"layers_1"}
