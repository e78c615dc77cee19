"""Optimizers of low-precision training against the published algorithms, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxquant import optimizers, training

STEPS, RESET = 6, 4
STACKED = (2, 4, 3)  # two layers in one leaf
PARAMS = {"layers": {"kernel": jnp.ones(STACKED)}, "head": {"kernel": jnp.ones((3, 5))}}
LAYERED = lambda path, leaf: int(path[0].key == "layers")


def gradients():
  """Six steps; the fourth is a spike in one layer of the stack, the last has a zero tensor."""
  rng = np.random.default_rng(0)
  steps = [jax.tree.map(lambda a: rng.standard_normal(a.shape), PARAMS) for _ in range(STEPS)]
  steps[3]["layers"]["kernel"][1] *= 100
  steps[5]["head"]["kernel"][:] = 0
  return jax.tree.map(np.float32, steps)


def tensors(tree):
  """Layer by layer, float64."""
  return [*np.float64(tree["layers"]["kernel"]), np.float64(tree["head"]["kernel"])]


def run(tx):
  """Updates of all steps, tensor by tensor: [steps][tensor]."""
  update, state, found = jax.jit(tx.update), tx.init(PARAMS), []
  for g in gradients():
    u, state = update(g, state, PARAMS)
    found.append(tensors(u))
  return found


def stable_adam(grads, b1=0.9, b2=0.99, eps=1e-8):
  """arXiv:2304.13013, algorithm 2, with the debiased betas of its code: (update, RMS) per step."""
  m = v = 0.0
  for t, g in enumerate(grads, 1):
    one, two = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in (b1, b2))
    m, v = one * m + (1 - one) * g, two * v + (1 - two) * g * g
    rms = np.sqrt((g * g / np.maximum(v, eps**2)).mean())
    yield m / (np.sqrt(v) + eps) / max(1, rms), rms


def stable_spam(grads, b1=0.9, b2=0.999, g1=0.7, g2=0.9, g3=0.999, eps=1e-8):
  """arXiv:2502.17055, algorithm 1: (update, threshold over the largest gradient) per step."""
  top = norm = square = m = v = 0.0
  t_adam = 0
  for t, g in enumerate(grads, 1):
    largest = np.abs(g).max()
    top = g3 * top + (1 - g3) * largest
    threshold = top / (1 - g3**t)
    if largest > 0:
      g = np.where(np.abs(g) > threshold, g / largest * threshold, g)
    size = np.linalg.norm(g)
    norm, square = g1 * norm + (1 - g1) * size, g2 * square + (1 - g2) * size**2
    if size > 0:
      g = g / size * (norm / (1 - g1**t)) / (np.sqrt(square / (1 - g2**t)) + eps)
    if t % RESET == 0:
      m = v = t_adam = 0
    t_adam += 1
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    hat = m / (1 - b1**t_adam), v / (1 - b2**t_adam)
    yield hat[0] / (np.sqrt(hat[1]) + eps), threshold / max(largest, 1e-30)


CASES = {
  "stable_adamw": (optimizers.scale_by_stable_adam(stacked=LAYERED), stable_adam),
  "stable_spam": (optimizers.scale_by_stable_spam(reset=RESET, stacked=LAYERED), stable_spam),
}


@pytest.mark.parametrize("name", CASES)
def test_updates_are_those_of_the_published_algorithm(name):
  """For each layer of a stack by itself. 1 - .999^t has five digits in float32, updates are ~1."""
  tx, by_hand = CASES[name]
  found = run(tx)
  facts = []
  for i, grads in enumerate(zip(*map(tensors, gradients()))):
    updates, fact = zip(*by_hand(grads))
    for got, want in zip(found, updates):
      np.testing.assert_allclose(got[i], want, rtol=0, atol=3e-5)
    facts.append(fact[3])
  # In the step of the spike its tensor alone is held back: the other layer's update is its own.
  spiked, calm = facts[1], (facts[0], facts[2])
  if name == "stable_adamw":
    assert spiked > 1.5 > 1.2 > max(calm)
  else:
    assert spiked < 0.3 < min(calm)


def test_a_spike_is_smaller_than_in_adam():
  norm = lambda tx: np.linalg.norm(run(tx)[3][1])
  plain = norm(optax.scale_by_adam(b2=0.99))
  assert norm(CASES["stable_adamw"][0]) < 0.7 * plain
  assert norm(optax.chain(optimizers.clip_spikes(stacked=LAYERED))) == pytest.approx(1, abs=0.5)


def test_adamw_is_that_of_optax():
  """Bit for bit, and the same tree: older checkpoints fit."""
  ours = training.optimizer(10, 1e-2, 2)
  schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 10)
  adamw = optax.adamw(
    schedule, b2=0.95, weight_decay=0.1, mask=lambda p: jax.tree.map(lambda _: True, p)
  )
  theirs = optax.chain(optax.clip_by_global_norm(1.0), adamw)
  assert jax.tree.structure(ours.init(PARAMS)) == jax.tree.structure(theirs.init(PARAMS))
  jax.tree.map(np.testing.assert_array_equal, run(ours), run(theirs))


@pytest.mark.parametrize("name", optimizers.METHODS)
def test_methods_by_name(name):
  """Weight decay times the learning rate, which is what is left where there is no gradient."""
  tx = training.optimizer(10, 1e-2, 1, weight_decay=0.5, clip=None, method=name)
  state, zeros = tx.init(PARAMS), jax.tree.map(jnp.zeros_like, PARAMS)
  _, state = tx.update(zeros, state, PARAMS)  # the rate starts at zero
  updates, _ = jax.jit(tx.update)(zeros, state, PARAMS)
  jax.tree.map(lambda u: np.testing.assert_allclose(u, -0.5e-2, rtol=1e-6), updates)


def test_an_unknown_method_is_refused():
  with pytest.raises(ValueError, match=r"method is one of adamw, stable_adamw.*got 'sgd'"):
    training.optimizer(10, 1e-2, 1, method="sgd")
