"""Attention in plain JAX: the specification of every attention kernel.

Letters: B batch, T query time, S key time, H query heads, Hkv key/value heads, D head dim.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

_BITS = 48  # of a frequency in turns: an error of position * 2^-49 turns


def rope_tables(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
  """Cos and sin of position * theta^(-2i/D), i < D/2, in f32, as exact at 10^7 as at 10.

  arXiv:2104.09864, eq. 15. A float32 product of position and frequency misses the angle by up to
  2^-24 * position, which scores then see as a shift (arXiv:2411.13476, for bf16). So the
  angle is a phase in turns, an integer modulo 2^32, as in a numerically controlled oscillator:

      phase = floor(position * round(2^48 frequency / 2 pi) / 2^16)  mod 2^32

  Whole turns wrap around without a rounding, for any position, known to the compiler or not, and no
  table of all positions exists. Measured against float64: 3e-7 up to position 2^20, 4e-7 at 2^24,
  2e-5 at 2^31 (the product in float32: 7e-3 at 2^17, meaningless at 2^24).

  Args:
    positions: integers [B, T], negative ones turn back.
    head_dim: D, even.
    theta: base of the frequencies.

  Returns:
    Two arrays [B, T, 1, D/2], f32, that broadcast over heads.

  Raises:
    TypeError: positions are not integers.

  Example:
    >>> import jax.numpy as jnp
    >>> cos, _ = rope_tables(jnp.array([[0, 710]]), 2, 10_000.0)  # 710 = 226 pi + 6e-5
    >>> cos.round(6).ravel().tolist()
    [1.0, 1.0]
  """
  _check_positions(positions)
  turns = float(theta) ** -(np.arange(0, head_dim, 2) / head_dim) / (2 * np.pi)
  frequency = np.rint(np.ldexp(turns, _BITS)).astype(np.uint64)
  high, low = ((frequency >> s & (2**b - 1)).astype(np.uint32) for s, b in ((16, 32), (0, 16)))
  at = positions[..., None, None].astype(jnp.int32)
  word = lambda x: x.astype(jnp.uint32)  # products of words are modulo 2^32
  phase = word(at) * high + word(at >> 16) * low + (word(at & 0xFFFF) * low >> 16)
  within_half_a_turn = jax.lax.bitcast_convert_type(phase, jnp.int32).astype(jnp.float32)
  angle = within_half_a_turn * np.float32(2 * np.pi / 2**32)
  return jnp.cos(angle), jnp.sin(angle)


def _check_positions(positions: jax.Array) -> None:
  if jnp.issubdtype(positions.dtype, jnp.integer):
    return
  name, limit = positions.dtype.name, ""
  if jnp.issubdtype(positions.dtype, jnp.floating):
    limit = f", which counts only up to {2 ** (jnp.finfo(positions.dtype).nmant + 1)}"
  raise TypeError(
    f"RoPE: positions {list(positions.shape)} came as {name}{limit}; they have to be integers.\n"
    "  Count tokens in int32, and do not cast positions together with activations."
  )


def rotate(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Rotates the pairs (i, i + D/2) of x [B, T, H, D] in f32; the cast to x.dtype comes last."""
  cos, sin = tables
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def document_mask(documents: jax.Array) -> jax.Array:
  """Causal attention within documents, and to document 0: AnchorAttention and its baseline.

      mask[t, s] = s <= t and (documents[s] == documents[t] or documents[s] == 0)

  arXiv:2411.13476: one anchor token (the BOS) of document 0 in front of the pack is the
  attention sink of all documents, and positions run on over the pack. Without a document 0 it is
  attention within documents; with all of them 0, plain causal attention.

  Args:
    documents: integers [B, T], the document of each token.

  Returns:
    Bool [B, T, T], True where query t sees key s. Each query sees itself.

  Example:
    >>> import jax.numpy as jnp
    >>> document_mask(jnp.array([[0, 1, 1, 2]]))[0].astype(int).tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]
  """
  query, key = documents[:, :, None], documents[:, None, :]
  t = jnp.arange(documents.shape[1], dtype=jnp.int32)
  return (t <= t[:, None]) & ((query == key) | (key == 0))


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, *, scale: float) -> jax.Array:
  """Masked grouped-query attention, softmax(scale * q k^T) v, with f32 softmax and sums.

  f32 operands are multiplied in f32 on TPU and GPU too, where bf16 or TF32 would be the default.
  Query head h reads key head h // (H / Hkv); keys and values are never repeated.

  Args:
    q: [B, T, H, D].
    k: [B, S, Hkv, D].
    v: [B, S, Hkv, D].
    mask: bool, broadcastable to [B, T, S]; True where the query sees the key. Every query must
      see at least one key.
    scale: multiplies the logits, usually D ** -0.5.

  Returns:
    [B, T, H, D] in q.dtype.
  """
  grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
  highest = jax.lax.Precision.HIGHEST if jnp.float32 in (q.dtype, v.dtype) else None
  dot = functools.partial(jnp.einsum, precision=highest, preferred_element_type=jnp.float32)
  logits = dot("bthgd,bshd->bhgts", grouped, k)
  lowest = jnp.finfo(jnp.float32).min
  p = jax.nn.softmax(jnp.where(mask[:, None, None], scale * logits, lowest), axis=-1)
  o = dot("bhgts,bshd->bthgd", p.astype(v.dtype), v)
  return o.reshape(q.shape).astype(q.dtype)
