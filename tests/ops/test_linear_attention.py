"""Gated linear attention is its recurrence, at any strength of the gates."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.ops.linear_attention import gated_linear_attention

B, T, H, D, E = 4, 50, 2, 4, 8  # no power of 2 divides 50
SCALE = D**-0.5
# Gate logits: nearly no decay, the decay at the start of training, hardly any memory, and tokens
# that forget everything among tokens that forget nothing (exp(-1000 / 16) and less).
STRENGTH = jnp.array([[10.0, 1], [0, 1], [-100, 100], [0, 10_000]])


def draw(seed=0):
  keys = jax.random.split(jax.random.key(seed), 5)
  q, k = jax.random.normal(keys[0], (2, B, T, H, D))
  v = jax.random.normal(keys[1], (B, T, H, E))
  shift, spread = STRENGTH.T[..., None, None, None]
  logits = shift + spread * jax.random.normal(keys[2], (B, T, H, D))
  state = jax.random.normal(keys[3], (B, H, D, E))
  return q, k, v, jax.nn.log_sigmoid(logits) / 16, state


def recurrence(q, k, v, g, state):
  """Equation 3, token by token in float64."""
  q, k, v, g, state = (np.asarray(x, np.float64) for x in (q, k, v, g, state))
  out = []
  for t in range(q.shape[1]):
    state = np.exp(g[:, t])[..., None] * state + k[:, t, ..., None] * v[:, t, :, None]
    out.append(SCALE * np.einsum("bhd,bhde->bhe", q[:, t], state))
  return np.stack(out, 1), state


@functools.cache
def jitted(chunk):
  return jax.jit(functools.partial(gated_linear_attention, scale=SCALE, chunk=chunk))


@pytest.mark.parametrize("chunk", [1, 16])
def test_every_chunk_is_the_recurrence(chunk):
  """f32: sums of 50 products of size 1 to 30 in another order, so 1e-5."""
  xs = draw()
  assert jnp.exp(xs[3]).min() == 0
  assert jnp.exp(xs[3]).max() == 1
  for found, wanted in zip(jitted(chunk)(*xs), recurrence(*xs)):
    np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-6)


def test_a_sequence_may_be_cut_anywhere():
  q, k, v, g, state = draw()
  whole, last = jitted(16)(q, k, v, g, state)
  first, state = jitted(16)(*(x[:, :23] for x in (q, k, v, g)), state)
  rest, state = jitted(16)(*(x[:, 23:] for x in (q, k, v, g)), state)
  np.testing.assert_allclose(jnp.concatenate([first, rest], 1), whole, atol=1e-5)
  np.testing.assert_allclose(state, last, atol=1e-5)


def test_gradients_are_those_of_the_recurrence():
  xs = draw(1)

  def gradients(chunk):
    run = functools.partial(gated_linear_attention, scale=SCALE, chunk=chunk)
    loss = lambda *xs: sum(jnp.vdot(y, jnp.sin(jnp.arange(y.size))) for y in run(*xs))
    return jax.jit(jax.grad(loss, argnums=range(5)))(*xs)

  found, wanted = gradients(16), gradients(1)
  chex.assert_tree_all_finite(found)
  for a, b in zip(found, wanted):  # f32 sums over up to 50 tokens, relative to the largest
    np.testing.assert_allclose(a, b, atol=4e-6 * float(jnp.abs(b).max()))


def test_tokens_without_key_and_decay_leave_no_trace():
  q, k, v, g, state = draw()
  k, g = (x.at[:, 30:].set(0) for x in (k, g))
  _, padded = jitted(16)(q, k, v, g, state)
  # Whole chunks of 16 in both calls, so the same operations: equal bits.
  _, short = jitted(16)(*(x[:, :32] for x in (q, k, v, g)), state)
  np.testing.assert_array_equal(padded, short)


def test_bf16_inputs_are_computed_in_f32():
  q, k, v, g, state = draw()
  narrow = [x.astype(jnp.bfloat16) for x in (q, k, v)]
  o, last = jitted(16)(*narrow, g, state)
  wide, _ = jitted(16)(*(x.astype(jnp.float32) for x in narrow), g, state)
  assert (o.dtype, last.dtype) == (jnp.bfloat16, jnp.float32)
  np.testing.assert_allclose(o.astype(jnp.float32), wide, rtol=2**-8, atol=1e-6)  # one rounding


def test_a_chunk_that_cannot_be_halved_is_refused():
  with pytest.raises(ValueError, match="chunk=12 is not a power of 2"):
    gated_linear_attention(*draw(), scale=1.0, chunk=12)
