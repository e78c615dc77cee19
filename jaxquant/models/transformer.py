"""A decoder with softmax attention: RMSNorm, RoPE, grouped-query attention, SwiGLU, no biases.

Letters: B batch, T time, H heads, D head dim.
"""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxquant import graph
from jaxquant.cache.plain import KVCache, read, write
from jaxquant.models.decoder import (
  DecoderShape,
  block_names,
  chunks,
  decode,
  decoder_graph,
  dense,
  slots_of,
  writer,
)
from jaxquant.models.softmax_taps import softmax_measures
from jaxquant.ops.attention import attend, document_mask, rope_tables, rotate
from jaxquant.tapping import tap


@dataclasses.dataclass(frozen=True)
class TransformerShape(DecoderShape):
  """Sizes and number types of a decoder; rotation and softmax are f32 always.

  Attributes:
    n_kv_heads: key/value heads; divides n_heads.
    head_dim: D, even.
    rope_theta: base of the rotary frequencies.
    attn_chunk: queries per block of attention; more of them are taken block by block, recomputed
      in the backward pass, so that no [T, S] array exists. None: all at once.
  """

  n_kv_heads: int = 2
  head_dim: int = 64
  rope_theta: float = 10_000.0
  attn_chunk: int | None = None

  def __post_init__(self):
    if self.n_heads % self.n_kv_heads:
      raise ValueError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}.")
    if self.head_dim % 2:
      raise ValueError(f"head_dim={self.head_dim} is odd; RoPE rotates pairs of channels.")


class Context(NamedTuple):
  """What all layers share: where the tokens are.

  Attributes:
    rope: cos and sin, each f32 [B, T, 1, D/2].
    slots: int32 [B, T], the place of each token in its row.
    mask: bool [B, T, S], which keys each token sees.
  """

  rope: tuple[jax.Array, jax.Array]
  slots: jax.Array
  mask: jax.Array


class Attention(nn.Module):
  """Grouped-query attention over this layer's keys: those of x, or those of the cache."""

  shape: TransformerShape

  @nn.compact
  def __call__(self, x, cache, layer, context):
    """X [B, T, d_model] -> the same shape, and the cache that has x's keys and values too."""
    s = self.shape
    q = rotate(dense(s, (s.n_heads, s.head_dim), "q")(x), context.rope)
    k = rotate(dense(s, (s.n_kv_heads, s.head_dim), "k")(x), context.rope)
    v = dense(s, (s.n_kv_heads, s.head_dim), "v")(x)
    if cache is not None:
      cache = write(cache, layer, context.slots, k, v)
      k, v = read(cache, layer)
    how = {"scale": s.head_dim**-0.5, "chunk": s.attn_chunk}
    tap(self, "softmax", lambda: softmax_measures(q, k, context.mask, **how))
    o = _attend(q, k, v, context.mask, s)
    return writer(s, "o", axis=(-2, -1))(o), cache


def _attend(
  q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, shape: TransformerShape
) -> jax.Array:
  """`attend`, `attn_chunk` queries at a time."""
  one = lambda q, mask: attend(q, k, v, mask, scale=shape.head_dim**-0.5)
  if shape.attn_chunk is None or q.shape[1] <= shape.attn_chunk:
    return one(q, mask)
  pieces = tuple(chunks(x, shape.attn_chunk, "attn_chunk") for x in (q, mask))
  o = jax.lax.map(jax.checkpoint(lambda chunk: one(*chunk)), pieces)
  return o.swapaxes(0, 1).reshape(q.shape)


class Transformer(nn.Module):
  """Tokens to logits; with a cache, prefill and decode too.

  Without a cache each token sees itself and all before it. With one, the tokens continue the rows
  of the cache: row b gets `lengths[b]` tokens more, what follows them in `tokens[b]` is padding
  and leaves no trace. Prefill is a call with an empty cache and right-padded prompts; decode is a
  call with T = 1. It is the same code.

  Attributes:
    shape: sizes and number types.
  """

  shape: TransformerShape

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    cache: KVCache | None = None,
    positions: jax.Array | None = None,
    lengths: jax.Array | None = None,
    targets: jax.Array | None = None,
    documents: jax.Array | None = None,
  ):
    """Computes the logits of the next token, or the loss of given ones.

    Args:
      tokens: int32 [B, T].
      cache: what came before, or None.
      positions: int32 [B, T], for RoPE only; default: the place in the row.
      lengths: int32 [B], real tokens per row, the rest is padding (default: all T). They matter
        to the cache alone.
      targets: int32 [B, T], the tokens that follow. Not together with a cache.
      documents: int32 [B, T], the document of each token of a pack (`document_mask`); default: a
        row is one document. Not together with a cache.

    Returns:
      f32 logits [B, T, vocab]; with a cache, (logits, the cache grown by `lengths`); with targets,
      f32 [B, T], the negative log-likelihood of each in nats.
    """
    context = context_of(self.shape, tokens, cache, positions, documents)
    return decode(self.shape, Attention, context, tokens, cache, lengths, targets)


def context_of(
  shape: TransformerShape,
  tokens: jax.Array,
  cache: KVCache | None = None,
  positions: jax.Array | None = None,
  documents: jax.Array | None = None,
) -> Context:
  """Slots, mask and rotation of tokens [B, T] that continue the rows of the cache."""
  slots = slots_of(tokens, cache)
  keys = tokens.shape[1] if cache is None else cache.k.shape[2]
  # A row's slot is its order in time: what is padding or not yet written lies in later slots.
  mask = jnp.arange(keys, dtype=jnp.int32) <= slots[..., None]
  if documents is not None:
    if cache is not None:
      raise ValueError("documents with a cache: a row of a cache is one document; unpack them.")
    mask = document_mask(documents)
  positions = slots if positions is None else positions
  return Context(rope_tables(positions, shape.head_dim, shape.rope_theta), slots, mask)


@graph.graph_of.register
def _(model: Transformer) -> graph.Graph:
  return decoder_graph(model.shape, [_graph(model.shape, b) for b in block_names(model.shape)])


def _graph(shape: TransformerShape, block: str) -> dict[str, tuple]:
  """What one block's attention, or that of all blocks of a scan, adds to the graph."""
  q, k, v = (graph.Weight(f"{block}/attn/{name}", outputs=2) for name in "qkv")
  o = graph.Weight(f"{block}/attn/o", inputs=2)
  heads = {"head_dim": shape.head_dim, "repeat": shape.n_heads // shape.n_kv_heads}
  return {
    "writers": (o,),
    "norms": (graph.Norm(f"{block}/attn_norm", (q, k, v)),),
    "links": (graph.Link(v, o, **heads),),
    "pairs": (graph.Pair(q, k, **heads),),
  }


def untie(model: Transformer, variables: dict) -> tuple[Transformer, dict]:
  """The same function with an output head of its own, so that scales can be folded into it.

  Args:
    model: with `shape.tied`.
    variables: its float variables.
  """
  head = {"kernel": variables["params"]["embed"]["embedding"].T}
  untied = Transformer(dataclasses.replace(model.shape, tied=False))
  return untied, {**variables, "params": {**variables["params"], "head": head}}
