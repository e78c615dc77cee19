"""LRM: directions are orthonormal, found once and never trained; the loss by its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.quantizers import mimic_loss, principal_directions

FEATURES = jax.random.normal(jax.random.key(0), (4, 32, 16)) * jnp.arange(1, 17) + 3.0


@pytest.mark.parametrize(("d", "count"), [(16, 4), (12, 3), (5, 2), (2, 2), (1, 1)])
def test_directions_are_orthonormal_and_a_quarter(d, count):
  p = principal_directions(FEATURES[..., :d])
  assert p.shape == (d, count)
  np.testing.assert_allclose(p.T @ p, np.eye(count), atol=1e-5)


def test_directions_hold_most_of_the_variance():
  flat = np.asarray(FEATURES.reshape(-1, 16), np.float64)
  flat = flat - flat.mean(0)
  p = np.asarray(principal_directions(FEATURES))
  variances = (flat @ p).var(0)
  assert (np.diff(variances) <= 0).all()
  best = np.linalg.svd(flat, compute_uv=False)[:4] ** 2 / len(flat)
  np.testing.assert_allclose(variances, best, rtol=1e-4)


def test_loss_and_what_is_trained():
  student = {"a": FEATURES, "b": FEATURES[..., :8]}
  teacher = {"a": FEATURES + 1.0, "b": FEATURES[..., :8] * 2}
  directions = {name: principal_directions(f) for name, f in teacher.items()}
  loss = lambda s, t, p: mimic_loss(s, t, p)
  value, grads = jax.value_and_grad(loss, argnums=(0, 1, 2))(student, teacher, directions)
  off = {n: (np.asarray(student[n]) - np.asarray(teacher[n])) @ directions[n] for n in student}
  want = 1e-4 * np.mean([np.square(a).mean() for a in off.values()])
  np.testing.assert_allclose(value, want, rtol=1e-5)
  assert all(np.abs(g).max() > 0 for g in grads[0].values())
  assert not any(np.asarray(g).any() for tree in grads[1:] for g in tree.values())
  # Differences outside of the directions cost nothing.
  outside = np.eye(16) - np.asarray(directions["a"] @ directions["a"].T)
  hidden = {**teacher, "a": teacher["a"] + FEATURES @ outside}
  assert mimic_loss(hidden, teacher, directions) < 1e-8 * float(value)


def test_blocks_are_the_same_everywhere():
  with pytest.raises(ValueError, match="same blocks"):
    mimic_loss({"a": FEATURES}, {"b": FEATURES}, {"a": jnp.eye(16)})
