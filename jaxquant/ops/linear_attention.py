"""Gated linear attention in plain JAX: the specification of its kernels.

Letters: B batch, T time, H heads, D key dim, E value dim, C tokens of a chunk.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def gated_linear_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  log_decay: jax.Array,
  state: jax.Array | None = None,
  *,
  scale: float,
  chunk: int = 16,
) -> tuple[jax.Array, jax.Array]:
  """A recurrence over a matrix state whose rows decay at gates of their own.

      S_t = diag(exp g_t) S_{t-1} + k_t^T v_t        o_t = scale * q_t S_t

  arXiv:2312.06635, eq. 3, with the factor of its published code. A chunk of tokens is computed by
  matrix products (section 4), and the state goes from chunk to chunk; chunk = 1 is the recurrence
  as written. Everything is f32; the cast to q.dtype comes last. A token with k = 0 and g = 0
  leaves no trace.

  Args:
    q: [B, T, H, D].
    k: [B, T, H, D].
    v: [B, T, H, E].
    log_decay: g [B, T, H, D], finite and <= 0.
    state: f32 [B, H, D, E], S before the first token; None: zeros.
    scale: of the output, usually D ** -0.5.
    chunk: C, a power of 2. Rows are padded to a multiple of it, short ones to a power of 2.

  Returns:
    o [B, T, H, E] in q.dtype, and S after the last token, f32 [B, H, D, E].

  Raises:
    ValueError: chunk is not a power of 2.

  Example:
    >>> q = k = v = jnp.ones((1, 3, 1, 1))
    >>> g = jnp.log(jnp.full((1, 3, 1, 1), 0.5))
    >>> o, state = gated_linear_attention(q, k, v, g, scale=1.0)
    >>> o.ravel().tolist(), state.item()
    ([1.0, 1.5, 1.75], 1.75)
  """
  if chunk < 1 or chunk & (chunk - 1):
    raise ValueError(f"chunk={chunk} is not a power of 2; chunks are halved down to one token.")
  b, t, h, d = q.shape
  size = min(chunk, 1 << (t - 1).bit_length())
  state = jnp.zeros((b, h, d, v.shape[-1])) if state is None else state

  def pieces(x: jax.Array) -> jax.Array:  # [T / C, B, H, C, D]
    x = jnp.pad(x, [(0, 0), (0, -t % size), (0, 0), (0, 0)])
    return x.reshape(b, -1, size, h, x.shape[-1]).transpose(1, 0, 3, 2, 4)

  def body(state: jax.Array, x: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    q, k, v, g = (a.astype(jnp.float32) for a in x)
    o, state = _chunk(scale * q, k, v, g, state)
    return state, o

  xs = tuple(pieces(x) for x in (q, k, v, log_decay))
  # Of each chunk the backward pass holds the inputs and the state only.
  step = jax.checkpoint(body, prevent_cse=False)
  state, o = jax.lax.scan(step, state.astype(jnp.float32), xs)
  o = o.transpose(1, 0, 3, 2, 4).reshape(b, -1, h, v.shape[-1])
  return o[:, :t].astype(q.dtype), state


def _chunk(
  q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """One chunk: q, k, g [B, H, C, D], v [B, H, C, E], state [B, H, D, E] -> o, state.

  The decay between two tokens is split at a border between them: what q decays since the border,
  and k until it. The paper's border is the start of the chunk, so that k is divided by its decay
  and overflows for strong gates, which its section 4.3 answers with short blocks, taken token by
  token. Here the chunk is halved until one token is left; a pair's border is the middle of the
  smallest part that holds both. Every exponent is then a sum of gates, never a difference of large
  sums: no exponential is above 1, and each has the accuracy of f32, however strong the gates.
  """
  since, until, sees = _borders(q.shape[2])
  # By products with zeros and ones; on TPU the default precision would round g to bf16.
  sums = lambda m: jnp.einsum("ltu,bhud->lbhtd", m, g, precision=jax.lax.Precision.HIGHEST)
  q, k = q * jnp.exp(sums(since)), k * jnp.exp(sums(until))
  scores = jnp.einsum("lbhtd,lbhud->lbhtu", q[:-1], k[:-1])
  scores = jnp.where(sees[:, None, None], scores, 0).sum(0)
  o = scores @ v + q[-1] @ state
  total = jnp.exp(g.sum(-2))
  return o, total[..., None] * state + k[-1].swapaxes(-1, -2) @ v


@functools.cache
def _borders(c: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Which gates lie between a token and a border, and which pairs have it.

  One border per level: the token itself, the middles of parts of 2, 4, .. C tokens, and the start
  (for q) or end (for k) of the chunk, where the state is.

  Args:
    c: a power of 2.

  Returns:
    f32 [log2 C + 2, C, C], the gates u that q_t decays by since the border; the same of k_t until
    the border; and bool [log2 C + 1, C, C], whether t sees u across the border.
  """
  t, u = np.indices((c, c))
  sizes = [1 << i for i in range(c.bit_length())]  # of half a part; the last is the chunk
  none = np.zeros((c, c), bool)
  since = [none, *((t // s == u // s) & (u <= t) for s in sizes)]
  until = [none, *((t // s == u // s) & (u > t) for s in sizes)]
  sees = [t == u, *((t // s == u // s + 1) & (u // s % 2 == 0) for s in sizes[:-1])]
  return np.stack(since).astype(np.float32), np.stack(until).astype(np.float32), np.stack(sees)
