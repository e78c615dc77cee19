"""RSQ and BoA on a small model: their statistics reach the solvers, and mistakes say so."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.formats import Format, int_grid
from jaxquant.models.attention_statistics import attention_statistics
from jaxquant.models.transformer import Transformer, TransformerShape
from jaxquant.recipes.weight_only.boa import boa
from jaxquant.recipes.weight_only.gptq import w4a16_gptq
from jaxquant.recipes.weight_only.rsq import rsq
from jaxquant.solvers.attention_aware import TwoSided

SHAPE = TransformerShape(
  vocab=32, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, d_ff=32, max_len=16
)
MODEL = Transformer(SHAPE)
TOKENS = jax.random.randint(jax.random.key(0), (4, 16), 0, SHAPE.vocab)
VARIABLES = jax.jit(MODEL.init)(jax.random.key(1), TOKENS)
INT3_G16 = Format(int_grid(3), 16)
FEW = "embed|head|.*/(q|o|gate|down)"  # each shape that is quantized is a compilation


def test_weights_of_one_are_gptq():
  """The same codes; the Hessians come from differently fused sums, so scales may move an ulp."""
  got = jq.quantize_params(MODEL, VARIABLES, rsq(INT3_G16, r_min=1.0, float_sites=FEW), [TOKENS])
  want = jq.quantize_params(
    MODEL, VARIABLES, w4a16_gptq(INT3_G16, float_sites=FEW), [TOKENS], progress=False
  )
  is_q = lambda k: isinstance(k, jq.QTensor)
  for a, b in zip(*(jax.tree.leaves(t, is_leaf=is_q) for t in (got, want)), strict=True):
    if is_q(a):
      assert (jnp.abs(jq.dequantize(a) - jq.dequantize(b)) < 1e-5).mean() > 0.98


def test_statistics_add_up_over_batches():
  whole = attention_statistics(MODEL, VARIABLES, boa(INT3_G16), [TOKENS])
  parts = attention_statistics(MODEL, VARIABLES, boa(INT3_G16), [TOKENS[:2], TOKENS[2:]])
  assert isinstance(whole["layers/attn/v"], TwoSided)
  assert whole["layers/attn/q"].outputs.shape == (2, 2, 16, 16)
  assert whole["layers/mlp/down"].shape == (2, 32, 32)
  v = parts["layers/attn/v"]  # its second factor is of the weights: one more for each batch
  parts["layers/attn/v"] = v._replace(outputs=v.outputs / 2)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), whole, parts)


def test_boa_runs():
  recipe = boa(INT3_G16, float_sites=FEW)
  packed = jq.quantize_params(MODEL, VARIABLES, recipe, [TOKENS])
  logits = jax.jit(jq.quantized(MODEL, recipe))(packed, TOKENS)
  assert jnp.isfinite(logits).all()


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: jq.quantize_params(
        nn.Dense(4),
        nn.Dense(4).init(jax.random.key(0), jnp.ones((1, 32))),
        rsq(INT3_G16).replace(rules=rsq(INT3_G16).rules[1:]),
        [jnp.ones((1, 32))],
        progress=False,
      ),
      "nobody said how Dense attends",
    ),
    (lambda: attention_statistics(MODEL, VARIABLES, rsq(), []), "wants batches"),
    (lambda: attention_statistics(MODEL, VARIABLES, w4a16_gptq(), [TOKENS]), "got Statistic"),
    (
      lambda: attention_statistics(MODEL, VARIABLES, rsq(float_sites="embed"), [TOKENS]),
      "head.*in no layer",
    ),
  ],
)
def test_errors(call, message):
  with pytest.raises(ValueError, match=message):
    call()
