"""A student that mimics its teacher's features in few directions: BinaryDM's LRM."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

WEIGHT = 1e-4  # of the loss, in the official code of arXiv:2404.05662


def principal_directions(features: jax.Array) -> jax.Array:
  """The leading max(2, d / 4) principal directions of features, orthonormal columns.

  Computed once, from the teacher's features on the first batch, and kept (arXiv:2404.05662,
  section 3.3; the number of directions is that of the official code).

  Args:
    features: [..., d], at least two samples.

  Returns:
    float32 [d, max(2, d // 4)], by falling variance.

  Example:
    >>> x = jnp.array([[3.0, 0.1, 0.0], [-3.0, 0.1, 0.0], [0.0, -0.2, 0.0]])
    >>> jnp.abs(principal_directions(x)).round(3).tolist()
    [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
  """
  flat = features.reshape(-1, features.shape[-1]).astype(jnp.float32)
  flat = flat - flat.mean(0)
  covariance = jnp.matmul(flat.T, flat, precision=jax.lax.Precision.HIGHEST) / flat.shape[0]
  _, directions = jnp.linalg.eigh(covariance)  # by rising variance
  count = min(max(2, flat.shape[-1] // 4), flat.shape[-1])
  return jax.lax.stop_gradient(directions[:, ::-1][:, :count])


def mimic_loss(
  student: Mapping[str, jax.Array],
  teacher: Mapping[str, jax.Array],
  directions: Mapping[str, jax.Array],
  weight: float = WEIGHT,
) -> jax.Array:
  """The weight times the mean over blocks of mean (f_s P - f_t P)^2; the teacher gets no gradient.

  Args:
    student: features [..., d] by block.
    teacher: the full-precision model's, of the same inputs.
    directions: P [d, k] by block, from `principal_directions` of the teacher.
    weight: of the loss.

  Raises:
    ValueError: for blocks without partners.
  """
  if not (student.keys() == teacher.keys() == directions.keys()):
    raise ValueError(
      f"mimic_loss wants the same blocks of all: student {sorted(student)}, teacher "
      f"{sorted(teacher)}, directions {sorted(directions)}"
    )

  def block(name: str) -> jax.Array:
    off = student[name] - jax.lax.stop_gradient(teacher[name])
    return jnp.square(off @ jax.lax.stop_gradient(directions[name])).mean()

  return weight * sum(block(name) for name in student) / len(student)
