"""What the softmax of an attention layer looks like, for those who watch a training run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.scipy.special import entr


def softmax_measures(
  q: jax.Array, k: jax.Array, mask: jax.Array, *, scale: float, chunk: int | None = None
) -> dict[str, jax.Array]:
  """Entropy of the attention, and largest logit and kurtosis before the softmax.

      entropy  = -sum_s p_s ln p_s, in nats, mean over queries
      kurtosis = E[(z - mu)^4] / sigma^4 - 3 over all logits z = scale q k^T that a query sees

  Sinks and outliers show as low entropy, large logits and heavy tails (arXiv:2602.02047 watches
  them on both sides of the softmax).

  Args:
    q: [B, T, H, D], rotated.
    k: [B, S, Hkv, D], rotated; Hkv divides H.
    mask: bool, broadcastable to [B, T, S].
    scale: multiplies the logits.
    chunk: queries at a time; None: all.

  Returns:
    float32 scalars: `entropy` of all heads, `entropy_min` of the head where it is least,
    `logit_max`, `kurtosis` of all heads and `kurtosis_max` of the worst head.

  Example:
    >>> one = jnp.ones((1, 2, 1, 4))
    >>> found = softmax_measures(one, one, jnp.ones((1, 2, 2), bool), scale=0.5)
    >>> float(found["entropy"]) == float(jnp.log(2.0)), float(found["logit_max"])
    (True, 2.0)
  """
  b, t, h, d = q.shape
  grouped = q.reshape(b, t, k.shape[2], -1, d).swapaxes(0, 1)
  mask = jnp.broadcast_to(mask, (b, t, k.shape[1])).swapaxes(0, 1)

  def query(one: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
    q, mask = one  # [B, Hkv, H / Hkv, D], [B, S]
    z = scale * jnp.einsum("bhgd,bshd->bhgs", q, k, preferred_element_type=jnp.float32)
    return _row(z, jnp.broadcast_to(mask[:, None, None], z.shape))

  rows = jax.lax.map(query, (grouped, mask), batch_size=min(chunk or t, t))
  rows = tuple(a.reshape(t * b, h).T for a in rows)  # [H, T B]
  entropy, largest, *moments = rows
  by_head = entropy.mean(-1)
  return {
    "entropy": by_head.mean(),
    "entropy_min": by_head.min(),
    "logit_max": largest.max(),
    "kurtosis": _kurtosis(tuple(a.reshape(-1) for a in moments)),
    "kurtosis_max": _kurtosis(tuple(moments)).max(),
  }


def _row(z: jax.Array, mask: jax.Array) -> tuple[jax.Array, ...]:
  """Entropy, largest, and count, mean, sums of d^2, d^3, d^4 of the logits [..., S] in a mask."""
  p = jax.nn.softmax(jnp.where(mask, z, jnp.finfo(jnp.float32).min), axis=-1)
  n = mask.sum(-1).astype(jnp.float32)
  mean = jnp.where(mask, z, 0).sum(-1) / n
  d = jnp.where(mask, z - mean[..., None], 0)
  largest = jnp.where(mask, z, -jnp.inf).max(-1)
  return entr(p).sum(-1), largest, n, mean, *((d**i).sum(-1) for i in (2, 3, 4))


def _kurtosis(moments: tuple[jax.Array, ...]) -> jax.Array:
  """Excess kurtosis of parts [..., parts] with these moments, all parts together."""
  n, mean, m2, m3, m4 = moments
  total = n.sum(-1)
  d = mean - ((n * mean).sum(-1) / total)[..., None]  # from the mean of all
  all2 = (m2 + n * d**2).sum(-1)
  all4 = (m4 + 4 * d * m3 + 6 * d**2 * m2 + n * d**4).sum(-1)
  return jnp.where(all2 == 0, 0, total * all4 / jnp.where(all2 == 0, 1, all2) ** 2 - 3)
