"""A decoder with gated linear attention: no positions, and a state of constant size.

arXiv:2312.06635; layer of section 4.4, sizes and gates as in its published code.
Letters: B batch, T time, L layers, H heads, D key dim, E value dim.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from jaxquant import graph
from jaxquant.cache.plain import init_cache
from jaxquant.models.decoder import (
  DecoderShape,
  block_names,
  decode,
  decoder_graph,
  dense,
  norm,
  writer,
)
from jaxquant.ops.linear_attention import gated_linear_attention


@dataclasses.dataclass(frozen=True)
class GLAShape(DecoderShape):
  """Sizes and number types of a decoder; gates, recurrence and state are f32 always.

  Attributes:
    key_dim: D of each head; the paper has H D = d_model / 2.
    value_dim: E of each head; the paper has H E = d_model.
    gate_rank: of the projection that makes the gates.
    gate_temperature: tau, gates are sigmoid(.)^(1 / tau).
    chunk: tokens that are computed by matrix products between two states, a power of 2.
  """

  key_dim: int = 32
  value_dim: int = 64
  gate_rank: int = 16
  gate_temperature: float = 16.0
  chunk: int = 16

  def __post_init__(self):
    if self.chunk < 1 or self.chunk & (self.chunk - 1):
      raise ValueError(f"chunk={self.chunk} is not a power of 2.")


@flax.struct.dataclass
class GLAState:
  """What all layers remember of the tokens so far; it does not grow with them.

  All layers are in one array, which the layer scan carries and updates in place.

  Attributes:
    state: f32 [L, B, H, D, E].
    length: int32 [B], tokens that went into each row.
  """

  state: jax.Array
  length: jax.Array


@init_cache.register
def _(
  shape: GLAShape,
  batch: int,
  max_len: int | None = None,
  dtype: jax.typing.DTypeLike | None = None,
) -> GLAState:
  """Before the first token: S = 0. Any length has room in it; the default type is f32."""
  del max_len
  size = (shape.n_layers, batch, shape.n_heads, shape.key_dim, shape.value_dim)
  return GLAState(jnp.zeros(size, dtype or jnp.float32), jnp.zeros(batch, jnp.int32))


class Context(NamedTuple):
  """What all layers share.

  Attributes:
    real: bool [B, T], which tokens enter the state; None: all.
  """

  real: jax.Array | None


class GateLogits(nn.Module):
  """The low-rank projection x W_1 W_2 + b of the decay; arXiv:2312.06635, section 4.4."""

  shape: GLAShape

  @nn.compact
  def __call__(self, x):
    """X [B, T, d_model] -> [B, T, H, D]."""
    s = self.shape
    low = dense(s, s.gate_rank, "down")(x)
    return dense(s, (s.n_heads, s.key_dim), "up", bias=True)(low)


class GatedLinearAttention(nn.Module):
  """The mixer: a recurrence whose gates depend on the token, then a norm and an output gate.

  S_t = diag(sigmoid(gk(x_t))^(1/tau)) S_{t-1} + k(x_t)^T v(x_t); RMSNorm(q(x_t) S_t) * silu(g(x_t))
  of each head, with one gain for all of them; then o.
  """

  shape: GLAShape

  @nn.compact
  def __call__(self, x, cache, layer, context):
    """X [B, T, d_model] -> the same shape, and the cache with this layer's state after x."""
    s = self.shape
    q = dense(s, (s.n_heads, s.key_dim), "q")(x)
    k = dense(s, (s.n_heads, s.key_dim), "k")(x)
    v = dense(s, (s.n_heads, s.value_dim), "v")(x)
    logits = GateLogits(s, name="gk")(x).astype(jnp.float32)
    decay = nn.log_sigmoid(logits) / s.gate_temperature
    if context.real is not None:  # padding writes nothing and lets nothing fade
      real = context.real[..., None, None]
      k, decay = jnp.where(real, k, 0), jnp.where(real, decay, 0)
    how = {"scale": s.key_dim**-0.5, "chunk": s.chunk}
    before, cache = (None, None) if cache is None else _read(cache, layer)
    o, after = gated_linear_attention(q, k, v, decay, before, **how)
    if cache is not None:
      cache = _write(cache, layer, after)
    gate = nn.silu(dense(s, (s.n_heads, s.value_dim), "g")(x))
    return writer(s, "o", axis=(-2, -1))(norm(s, "o_norm")(o) * gate), cache


def _read(cache: GLAState, layer: jax.Array) -> tuple[jax.Array, GLAState]:
  """One layer's state [B, H, D, E], and the cache to write it back to.

  The barrier puts the read before the write; free to order them, XLA copies all layers first.
  """
  before = jax.lax.dynamic_index_in_dim(cache.state, layer, keepdims=False)
  before, state = jax.lax.optimization_barrier((before, cache.state))
  return before, dataclasses.replace(cache, state=state)


def _write(cache: GLAState, layer: jax.Array, after: jax.Array) -> GLAState:
  after = after.astype(cache.state.dtype)
  state = jax.lax.dynamic_update_index_in_dim(cache.state, after, layer, 0)
  return dataclasses.replace(cache, state=state)


class GLA(nn.Module):
  """Tokens to logits; with a state, prefill and decode too.

  Called as `Transformer` is, but for positions: the order of the tokens is all it sees. With a
  cache, row b gets `lengths[b]` tokens more, what follows them in `tokens[b]` is padding and leaves
  no trace. Prefill is a call with an empty state and right-padded prompts; decode is a call with
  T = 1. It is the same code.

  Attributes:
    shape: sizes and number types.

  Example:
    >>> model = GLA(GLAShape(vocab=8, d_model=16, n_layers=1, key_dim=4, value_dim=8, d_ff=16))
    >>> tokens = jnp.zeros((2, 5), jnp.int32)
    >>> variables = model.init(jax.random.key(0), tokens)
    >>> logits, state = model.apply(variables, tokens, cache=init_cache(model.shape, 2))
    >>> logits.shape, state.state.shape
    ((2, 5, 8), (1, 2, 4, 4, 8))
  """

  shape: GLAShape

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    cache: GLAState | None = None,
    lengths: jax.Array | None = None,
    targets: jax.Array | None = None,
  ):
    """Computes the logits of the next token, or the loss of given ones.

    Args:
      tokens: int32 [B, T].
      cache: what came before, or None.
      lengths: int32 [B], real tokens per row, the rest is padding (default: all T). They matter
        to the cache alone.
      targets: int32 [B, T], the tokens that follow. Not together with a cache.

    Returns:
      f32 logits [B, T, vocab]; with a cache, (logits, the cache grown by `lengths`); with targets,
      f32 [B, T], the negative log-likelihood of each in nats.
    """
    context = context_of(self.shape, tokens, lengths)
    return decode(self.shape, GatedLinearAttention, context, tokens, cache, lengths, targets)


def context_of(shape: GLAShape, tokens: jax.Array, lengths: jax.Array | None = None) -> Context:
  """Which of the tokens [B, T] are real."""
  del shape
  return Context(None if lengths is None else jnp.arange(tokens.shape[1]) < lengths[:, None])


@graph.graph_of.register
def _(model: GLA) -> graph.Graph:
  return decoder_graph(model.shape, [_graph(model.shape, b) for b in block_names(model.shape)])


def _graph(shape: GLAShape, block: str) -> dict[str, tuple]:
  """What one block's mixer, or that of all blocks of a scan, adds to the graph.

  Gates decay a channel of k without mixing it with others, so that a scale on q is undone on k.
  Between v and o lie a norm and a gate: nothing passes.
  """
  q, k, v, g = (graph.Weight(f"{block}/attn/{name}", outputs=2) for name in "qkvg")
  gk, o = graph.Weight(f"{block}/attn/gk/down"), graph.Weight(f"{block}/attn/o", inputs=2)
  return {
    "writers": (o,),
    "norms": (graph.Norm(f"{block}/attn_norm", (q, k, v, g, gk)),),
    "pairs": (graph.Pair(q, k, shape.key_dim, rope=False),),
  }
