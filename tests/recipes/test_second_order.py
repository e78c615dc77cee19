"""Recipes of the second-order and low-rank solvers on a small model: quantized, run, compared."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.formats import INT3_G128, Format, int_grid
from jaxquant.kernels import Pre, Sum, is_node, size_bits, to_dense
from jaxquant.models.transformer import Transformer, TransformerShape
from jaxquant.recipes.weight_only.bitstack import bitstack
from jaxquant.recipes.weight_only.eora import eora
from jaxquant.recipes.weight_only.gptq import w4a16_gptq
from jaxquant.recipes.weight_only.quantease import quantease
from jaxquant.solvers.sign_svd import layers, prefix

SHAPE = TransformerShape(
  vocab=32, d_model=64, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=32, d_ff=64, max_len=32
)
MODEL = Transformer(SHAPE)
TOKENS = jax.random.randint(jax.random.key(0), (4, 32), 0, SHAPE.vocab)
VARIABLES = jax.jit(MODEL.init)(jax.random.key(1), TOKENS)
INT3_G32 = Format(int_grid(3), 32)
FEW = "embed|head|.*/(q|k|o|gate|down)"  # each shape that is quantized is a compilation
RECIPES = {  # with the node that a kernel becomes
  "gptq act-order": (w4a16_gptq(INT3_G32, order=True, float_sites=FEW), Pre),
  "gptq static act-order": (
    w4a16_gptq(INT3_G32, order=True, static_groups=True, float_sites=FEW),
    jq.QTensor,
  ),
  "quantease": (quantease(INT3_G128, sweeps=4, float_sites=FEW), jq.QTensor),
  "quantease outliers": (quantease(INT3_G32, sweeps=4, outliers=0.01, float_sites=FEW), Sum),
  "eora": (eora(INT3_G32, r=8, float_sites=FEW), Sum),
  "bitstack": (bitstack(r=4, n=4, float_sites=FEW), Pre),
  "bitstack unscaled": (bitstack(r=4, n=4, scaled=False, float_sites=FEW), Sum),
}


def up(packed):
  return packed["params"]["layers"]["mlp"]["up"]["kernel"]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("recipe", "node"), RECIPES.values(), ids=RECIPES)
def test_quantizes_and_runs(recipe, node, tmp_path):
  packed = jq.quantize_params(MODEL, VARIABLES, recipe, [TOKENS], progress=False)
  kernel = up(packed)
  assert isinstance(kernel, node)
  dense = jax.tree.map(lambda k: k, VARIABLES)
  for block in ("attn", "mlp"):
    for name, site in packed["params"]["layers"][block].items():
      if not is_node(site["kernel"]):
        continue
      was = VARIABLES["params"]["layers"][block][name]["kernel"]
      dense["params"]["layers"][block][name]["kernel"] = to_dense(site["kernel"]).reshape(was.shape)
  got = jax.jit(jq.quantized(MODEL, recipe))(packed, TOKENS)
  np.testing.assert_allclose(got, MODEL.apply(dense, TOKENS), atol=2e-4)  # sums in another order
  jq.checkpoint.save(tmp_path / "packed", packed)
  again = jq.checkpoint.restore(tmp_path / "packed")
  jax.tree.map(np.testing.assert_array_equal, up(again), kernel)


def test_piles_are_cut_under_scan():
  packed = jq.quantize_params(
    MODEL, VARIABLES, bitstack(r=4, n=3, float_sites=FEW), [TOKENS], progress=False
  )
  kernel = up(packed)
  assert len(layers(kernel)) == 3
  w = VARIABLES["params"]["layers"]["mlp"]["up"]["kernel"]
  error = [float(jnp.linalg.norm(to_dense(prefix(kernel, m)) - w)) for m in (1, 2, 3)]
  assert error[0] > error[1] > error[2]
  assert size_bits(prefix(kernel, 1)) < size_bits(kernel) / 2
