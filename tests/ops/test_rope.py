"""Rotary angles are exact at any position; scores of what is near depend on the distance alone."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.models import Transformer, TransformerShape
from jaxquant.ops.attention import attend, rope_tables, rotate
from jaxquant.ops.qdot import qdot
from jaxquant.recipes.training import rope_guard

D, THETA = 128, 10_000.0


def frequencies(theta=THETA, head_dim=D):
  return np.float64(theta) ** -(np.arange(0, head_dim, 2) / head_dim)


# float32 rounds the angle below pi (1.2e-7), its factor, the sine and the cosine. Above 2^24 the
# frequency's 48 bits show: position * 2^-49 turns.
@pytest.mark.parametrize("theta", [1e4, 5e5, 1e8])
@pytest.mark.parametrize(
  ("top", "band"), [(2**8, 4e-7), (2**17, 4e-7), (2**24, 6e-7), (2**31 - 1, 3e-5)]
)
def test_angles_do_not_lose_bits_with_the_position(theta, top, band):
  drawn = np.random.default_rng(0).integers(-top, top, 1000)
  positions = np.array([[0, 1, -1, top, -top, *drawn]], np.int32)
  angle = positions[0, :, None] * frequencies(theta)
  found = jax.jit(lambda p: rope_tables(p, D, theta))(positions)
  for got, want in zip(found, (np.cos(angle), np.sin(angle))):
    assert got.shape == (1, positions.size, 1, D // 2)
    assert got.dtype == jnp.float32
    assert np.abs(got[0, :, 0] - want).max() < band


def in_float32(positions):
  """Position times frequency in float32: what the phase is instead of."""
  angle = positions[..., None, None].astype(jnp.float32) * jnp.float32(frequencies())
  return jnp.cos(angle), jnp.sin(angle)


def in_bf16(positions):
  angle = positions[..., None, None].astype(jnp.bfloat16) * jnp.bfloat16(frequencies())
  return tuple(f(angle).astype(jnp.float32) for f in (jnp.cos, jnp.sin))


def phase(positions):
  return rope_tables(positions, D, THETA)


def rounded_phase(positions):
  return tuple(t.astype(jnp.bfloat16).astype(jnp.float32) for t in phase(positions))


@pytest.mark.parametrize(
  ("tables", "dtype", "want"),
  [
    (phase, jnp.float32, (2.4e-7, 2.4e-7, 2.4e-7, 2.4e-7)),
    (in_float32, jnp.float32, (1e-6, 6e-6, 9e-5, 7e-4)),
    (phase, jnp.bfloat16, (2.6e-3, 2.6e-3, 2.6e-3, 2.6e-3)),
    (rounded_phase, jnp.bfloat16, (3.3e-3, 3.3e-3, 3.3e-3, 3.3e-3)),
    (in_bf16, jnp.bfloat16, (7e-2, 0.43, 0.73, 0.79)),
  ],
)
def test_scores_after_a_common_shift(tables, dtype, want):
  """Mean change of q k^T / sqrt(D) over causal pairs, against independently measured figures.

  They have one digit and other draws of q and k: 15 %. Rounding q and k to bf16 costs the same
  everywhere; a float32 angle costs more the farther the tokens are; bf16 angles mean nothing.
  """
  t = 256
  q, k = np.random.default_rng(0).standard_normal((2, 1, t, 1, D)).astype(np.float32)

  @jax.jit
  def scores(shift):
    at = tables(shift + jnp.arange(t)[None])
    turned = [rotate(x, at).astype(dtype).astype(jnp.float32) for x in (q, k)]
    return jnp.einsum("bthd,bshd->ts", *turned, precision="highest") * D**-0.5

  seen = np.tril(np.ones((t, t), bool))
  found = [np.abs(scores(s) - scores(0))[seen].mean() for s in (16, 1024, 16384, 131072)]
  np.testing.assert_allclose(found, want, rtol=0.15)


def test_rotation_is_float32_and_the_cast_comes_last():
  x = jax.random.normal(jax.random.key(0), (1, 16, 2, D), jnp.bfloat16)
  at = phase(1000 + jnp.arange(16)[None])
  narrow, wide = jax.jit(lambda x: (rotate(x, at), rotate(x.astype(jnp.float32), at)))(x)
  chex.assert_trees_all_equal(narrow, wide.astype(x.dtype))


@pytest.mark.parametrize(
  ("dtype", "said"),
  [
    (jnp.bfloat16, "bfloat16, which counts only up to 256;"),
    (jnp.float16, "float16, which counts only up to 2048;"),
    (jnp.float32, "float32, which counts only up to 16777216;"),
    (jnp.bool, "bool; they have to be integers"),
  ],
)
def test_positions_that_cannot_count_are_refused(dtype, said):
  model = Transformer(TransformerShape(vocab=8, d_model=16, n_layers=1, head_dim=8, d_ff=16))
  tokens = jnp.zeros((1, 4), jnp.int32)
  with pytest.raises(TypeError, match=rf"RoPE: positions \[1, 4\] came as {said}"):
    jax.eval_shape(lambda: model.init(jax.random.key(0), tokens, positions=tokens.astype(dtype)))


@pytest.mark.parametrize(("dtype", "precision"), [(jnp.float32, "HIGHEST"), (jnp.bfloat16, None)])
def test_products_of_attention_are_in_float32_or_from_bf16_into_float32(dtype, precision):
  """TPUs and GPUs would multiply float32 in bf16 or TF32 unless told."""
  q = jnp.ones((1, 4, 2, 8), dtype)
  jaxpr = jax.make_jaxpr(lambda q: attend(q, q, q, jnp.ones((1, 4, 4), bool), scale=1.0))(q)
  dots = [e.params for e in jaxpr.eqns if e.primitive.name == "dot_general"]
  assert len(dots) == 2
  for dot in dots:
    assert dot["preferred_element_type"] == jnp.float32
    assert (dot["precision"] and dot["precision"][0].name) == precision


def test_what_is_left_of_bf16_is_the_rounding_of_six_operands():
  """The recipe's three products: operands rounded to bf16, sums in float32."""
  x, w, g = (
    np.random.default_rng(i).standard_normal(s).astype(np.float32)
    for i, s in enumerate(((16, 32), (32, 24), (16, 24)))
  )
  rule = rope_guard().rule("layers/attn/q")
  y, back = jax.vjp(lambda x, w: qdot(x, w, rule), x, w)
  narrow = lambda a: np.asarray(a, jnp.bfloat16).astype(np.float64)
  want = narrow(x) @ narrow(w), narrow(g) @ narrow(w).T, narrow(x).T @ narrow(g)
  for got, exact in zip((y, *back(g)), want):
    np.testing.assert_allclose(got, exact, atol=1e-5)  # float32 sums of up to 32 products
    assert np.abs(got - np.asarray(got, jnp.bfloat16).astype(np.float32)).max() > 1e-3
