"""Optimizers for training in low precision, as optax transformations.

They look at each tensor by itself. Where a model keeps its layers stacked [L, ...] for a scan, a
leaf holds L tensors: `stacked` says how many leading axes number them, so that a scan trains like a
loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxquant.tensor import F32_TINY

Stacked = Callable[[tuple, jax.Array], int]  # (path of a leaf, leaf) -> leading axes


def one_tensor(path: tuple, leaf: jax.Array) -> int:
  """Every leaf is one tensor."""
  del path, leaf
  return 0


def _over(reduce: Callable, stacked: Stacked, *trees: optax.Params) -> optax.Params:
  """A number per tensor, broadcastable to its leaf: `reduce` over all but the leading axes."""

  def one(path: tuple, *leaves: jax.Array) -> jax.Array:
    axes = tuple(range(stacked(path, leaves[0]), leaves[0].ndim))
    return reduce(*(a.astype(jnp.float32) for a in leaves), axes)

  return jax.tree.map_with_path(one, *trees)


def scale_by_stable_adam(
  b1: float = 0.9,
  b2: float = 0.99,
  eps: float = 1e-8,
  *,
  mu_dtype: jax.typing.DTypeLike | None = None,
  stacked: Stacked = one_tensor,
) -> optax.GradientTransformation:
  """Adam whose update of a tensor shrinks where its second moment lags behind.

      m^ / (sqrt(v^) + eps) / max(1, RMS),  RMS^2 = mean(g^2 / max(v^, eps^2))

  RMS is about 1 while v^ describes g, and large in a step whose gradient comes out of nowhere, such
  as those before the loss spikes of low-precision training (StableAdamW, arXiv:2304.13013, section
  3.4; AdaFactor's update clipping, arXiv:1804.04235). Its authors' code averages with debiased
  betas, which is v^ = v / (1 - b2^t), and decays weights at the full rate, as a chain does.

  Args:
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: beside the root.
    mu_dtype: in which the first moment is stored; None: that of the parameters.
    stacked: (path, leaf) -> how many leading axes number tensors.
  """
  adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype)

  def lag(g: jax.Array, v: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    floor = max(eps**2, F32_TINY)  # elements without a gradient have no part in it
    mean = (jnp.square(g) / jnp.maximum(v, floor)).mean(axes, keepdims=True)
    return jnp.maximum(1, jnp.sqrt(mean))

  def update(
    grads: optax.Updates, state: optax.ScaleByAdamState, params: optax.Params | None = None
  ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
    updates, state = adam.update(grads, state, params)
    v = optax.tree.bias_correction(state.nu, b2, state.count)
    factors = _over(lag, stacked, grads, v)
    return jax.tree.map(lambda u, f: (u / f).astype(u.dtype), updates, factors), state

  return optax.GradientTransformation(adam.init, update)


class SpikeState(NamedTuple):
  """What `clip_spikes` remembers; a number per tensor each, float32.

  Attributes:
    count: int32 scalar, steps done.
    largest: average of the largest magnitude.
    norm: average of the norm.
    square: average of its square.
  """

  count: jax.Array
  largest: optax.Params
  norm: optax.Params
  square: optax.Params


def clip_spikes(
  norm_decay: float = 0.7,
  square_decay: float = 0.9,
  largest_decay: float = 0.999,
  eps: float = 1e-8,
  *,
  stacked: Stacked = one_tensor,
) -> optax.GradientTransformation:
  """Gradients whose spikes and norms are those of the recent past, tensor by tensor.

      T = avg(max |g|),  g <- g T / max |g| where |g| > T              (AdaClip)
      g <- g / |g| * avg(|g|) / (sqrt(avg(|g|^2)) + eps)               (AdaGN)

  Averages are exponential and include this step, their bias is corrected. The result has a norm of
  about 1 (arXiv:2502.17055, section 3, defaults of its code). That code starts the correction anew
  with the momentum, and so has next to no threshold for hundreds of steps; here it goes on.

  Args:
    norm_decay: of avg(|g|), the paper's gamma_1.
    square_decay: of avg(|g|^2), gamma_2.
    largest_decay: of T, gamma_3 or theta.
    eps: beside the root.
    stacked: (path, leaf) -> how many leading axes number tensors.
  """
  norm_of = lambda g, axes: jnp.sqrt(jnp.square(g).sum(axes, keepdims=True))
  largest_of = lambda g, axes: jnp.abs(g).max(axes, keepdims=True)

  def init(params: optax.Params) -> SpikeState:
    zeros = lambda: jax.tree.map(jnp.zeros_like, _over(norm_of, stacked, params))
    return SpikeState(jnp.zeros((), jnp.int32), zeros(), zeros(), zeros())

  def update(
    grads: optax.Updates, state: SpikeState, params: optax.Params | None = None
  ) -> tuple[optax.Updates, SpikeState]:
    del params
    count = state.count + 1
    average = lambda old, new, decay: optax.tree.update_moment(new, old, decay, 1)
    corrected = lambda tree, decay: optax.tree.bias_correction(tree, decay, count)
    top = _over(largest_of, stacked, grads)
    largest = average(state.largest, top, largest_decay)

    def clipped(g: jax.Array, top: jax.Array, threshold: jax.Array) -> jax.Array:
      ratio = threshold / jnp.where(top > 0, top, 1)
      return jnp.where(jnp.abs(g) > threshold, g * ratio, g)

    g = jax.tree.map(clipped, grads, top, corrected(largest, largest_decay))
    now = _over(norm_of, stacked, g)
    norm = average(state.norm, now, norm_decay)
    square = average(state.square, jax.tree.map(jnp.square, now), square_decay)
    ratio = lambda a, b: a / (jnp.sqrt(b) + eps)
    goal = jax.tree.map(ratio, corrected(norm, norm_decay), corrected(square, square_decay))
    scaled = lambda g, n, to: (g * (to / jnp.where(n > 0, n, 1))).astype(g.dtype)
    return jax.tree.map(scaled, g, now, goal), SpikeState(count, largest, norm, square)

  return optax.GradientTransformation(init, update)


def reset_every(steps: int, inner: optax.GradientTransformation) -> optax.GradientTransformation:
  """The transformation, with a fresh state in every step whose number is a multiple of `steps`.

  Momentum reset of arXiv:2501.06842, section 3: what a spike left in the moments is forgotten, and
  their bias is corrected as in the first steps.
  """

  def init(params: optax.Params) -> tuple:
    return jnp.zeros((), jnp.int32), inner.init(params)

  def update(
    grads: optax.Updates, state: tuple, params: optax.Params | None = None
  ) -> tuple[optax.Updates, tuple]:
    count, kept = state[0] + 1, state[1]
    fresh = inner.init(grads if params is None else params)
    kept = jax.tree.map(lambda new, old: jnp.where(count % steps == 0, new, old), fresh, kept)
    updates, kept = inner.update(grads, kept, params)
    return updates, (count, kept)

  return optax.GradientTransformation(init, update)


def scale_by_stable_spam(
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  *,
  reset: int = 1000,
  mu_dtype: jax.typing.DTypeLike | None = None,
  stacked: Stacked = one_tensor,
) -> optax.GradientTransformation:
  """Adam of gradients without spikes, whose moments start anew every `reset` steps (StableSPAM).

  `clip_spikes`, then `reset_every` around Adam (arXiv:2502.17055). It clips by itself: a clip of
  the global norm in front of it would only move its averages.

  Args:
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: beside all roots.
    reset: steps between two resets of the moments.
    mu_dtype: in which the first moment is stored; None: that of the parameters.
    stacked: (path, leaf) -> how many leading axes number tensors.
  """
  adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype)
  return optax.chain(clip_spikes(eps=eps, stacked=stacked), reset_every(reset, adam))


def _adam(*, mu_dtype: jax.typing.DTypeLike | None, stacked: Stacked):
  del stacked  # it treats each element by itself
  return optax.scale_by_adam(b2=0.95, mu_dtype=mu_dtype)


# By the name that a config gives; all take (mu_dtype, stacked).
METHODS: dict[str, Callable[..., optax.GradientTransformation]] = {
  "adamw": _adam,
  "stable_adamw": scale_by_stable_adam,
  "stable_spam": scale_by_stable_spam,
}
