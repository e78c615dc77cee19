"""The plain KV cache: keys (after RoPE) and values, exact, in one array each for all layers.

Slot j of a row holds the token at position j of that row, so "key slot <= query slot" is the whole
mask, and what lies beyond a row's length (padding, an older sequence) is never seen.
"""

import dataclasses
import functools
from typing import Protocol

import flax.struct
import jax
import jax.numpy as jnp


class KVShape(Protocol):
  """What the size of a cache depends on; a model's shape is one."""

  n_layers: int
  n_kv_heads: int
  head_dim: int
  max_len: int
  dtype: jax.typing.DTypeLike


@flax.struct.dataclass
class KVCache:
  """Keys and values of all layers.

  All layers are in one array, which the layer scan carries and updates in place: as xs and ys of
  the scan the whole cache would be copied every step.

  Attributes:
    k: [L, B, T, Hkv, D].
    v: [L, B, T, Hkv, D].
    length: int32 [B], tokens held by each row.
  """

  k: jax.Array
  v: jax.Array
  length: jax.Array


@functools.singledispatch
def init_cache(
  shape: KVShape,
  batch: int,
  max_len: int | None = None,
  dtype: jax.typing.DTypeLike | None = None,
) -> KVCache:
  """An empty cache for `batch` rows of at most `max_len` tokens (default: the shape's).

  Models that keep something else than keys and values register their shape. A row must not grow
  past max_len: lengths are traced values, so nobody can check it here.
  """
  tokens = shape.max_len if max_len is None else max_len
  dtype = shape.dtype if dtype is None else dtype
  kv = (shape.n_layers, batch, tokens, shape.n_kv_heads, shape.head_dim)
  return KVCache(jnp.zeros(kv, dtype), jnp.zeros(kv, dtype), jnp.zeros(batch, jnp.int32))


def write(
  cache: KVCache, layer: jax.Array, slots: jax.Array, k: jax.Array, v: jax.Array
) -> KVCache:
  """Puts the tokens of one layer, k and v [B, T, Hkv, D], into their slots, int32 [B, T].

  Tokens whose slot is past the end are dropped: only padding may have one.
  """
  at = (layer, jnp.arange(slots.shape[0])[:, None], slots)
  put = lambda old, new: old.at[at].set(new.astype(old.dtype), mode="drop")
  return dataclasses.replace(cache, k=put(cache.k, k), v=put(cache.v, v))


def read(cache: KVCache, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Keys and values of one layer, each [B, T, Hkv, D]."""
  at = lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)
  return at(cache.k), at(cache.v)
