"""What decoders share: embedding, pre-norm blocks of a mixer and a SwiGLU, output head, losses.

A model is a mixer (what moves information between tokens: attention or a recurrence), the context
that its layers share, and `decode`. Every contraction with a weight is an ordinary Linen module
(DenseGeneral, Dense, Embed.attend), so an interceptor can take it over; the collections and keys
which it may use are lifted through the layer scan. Letters: B batch, T time.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from jaxquant import graph


@dataclasses.dataclass(frozen=True)
class DecoderShape:
  """Sizes and number types of a decoder, whatever its mixer.

  Attributes:
    vocab: number of tokens.
    d_model: width of the residual stream.
    n_layers: number of blocks.
    n_heads: heads of the mixer.
    d_ff: hidden width of the SwiGLU.
    tied: the embedding is also the output head.
    scan: one block under `nn.scan`, parameters stacked [n_layers, ...]; else a Python loop.
    remat: recompute each block in the backward pass.
    dtype: of activations; normalization is f32 always, and what the mixer says.
    param_dtype: of parameters.
    max_len: the longest sequence, and the default size of a cache.
    loss_chunk: tokens per row whose logits exist at a time when `targets` are given, and which a
      scale per tensor spans if the head is quantized; a recipe with state sees the chunks' sum, as
      of any module that is used more than once. None: all.
    batch_axis: mesh axis that the batch is sharded over; the residual stream is held to it. Needs a
      mesh in force (`jax.set_mesh`). None: left to the compiler.
  """

  vocab: int = 256
  d_model: int = 256
  n_layers: int = 6
  n_heads: int = 4
  d_ff: int = 768
  tied: bool = False
  scan: bool = True
  remat: bool = False
  dtype: jax.typing.DTypeLike = jnp.float32
  param_dtype: jax.typing.DTypeLike = jnp.float32
  max_len: int = 2048
  loss_chunk: int | None = None
  batch_axis: str | None = None


class Cache(Protocol):
  """What a mixer keeps of earlier tokens, for all layers: a dataclass and a pytree."""

  length: jax.Array  # int32 [B], tokens held by each row


def dense(
  shape: DecoderShape,
  features: int | tuple[int, ...],
  name: str,
  *,
  axis: int | tuple[int, ...] = -1,
  gain: float = 1.0,
  bias: bool = False,
) -> nn.DenseGeneral:
  """A contraction; its kernel starts with variance gain / fan_in."""
  return nn.DenseGeneral(
    features,
    axis=axis,
    use_bias=bias,
    dtype=shape.dtype,
    param_dtype=shape.param_dtype,
    kernel_init=nn.initializers.variance_scaling(gain, "fan_in", "truncated_normal"),
    name=name,
  )


def writer(shape: DecoderShape, name: str, axis: int | tuple[int, ...] = -1) -> nn.DenseGeneral:
  """A contraction whose output is added to the residual stream.

  Its gain 0.5 / n_layers is GPT-2's scale of the 2 n_layers residual writers.
  """
  return dense(shape, shape.d_model, name, axis=axis, gain=0.5 / shape.n_layers)


def norm(shape: DecoderShape, name: str) -> nn.RMSNorm:
  """RMSNorm over the last axis."""
  return nn.RMSNorm(dtype=shape.dtype, param_dtype=shape.param_dtype, name=name)


class SwiGLU(nn.Module):
  """Gated feed-forward layer, down(silu(gate(x)) * up(x)); arXiv:2002.05202, eq. 6."""

  shape: DecoderShape

  @nn.compact
  def __call__(self, x):
    """X [B, T, d_model] -> the same shape."""
    s = self.shape
    h = nn.silu(dense(s, s.d_ff, "gate")(x)) * dense(s, s.d_ff, "up")(x)
    return writer(s, "down")(h)


class Block(nn.Module):
  """One pre-norm layer, in the form of a scan body.

  Attributes:
    shape: sizes and number types.
    mixer: class of the module "attn", built from the shape; (x [B, T, d_model], cache, layer index,
      context) -> (the same shape as x, cache).
  """

  shape: DecoderShape
  mixer: type[nn.Module]

  @nn.compact
  def __call__(self, carry, layer, context):
    """Carry (h [B, T, d_model], cache), layer index, context -> (the same carry, None)."""
    h, cache = carry
    s = self.shape
    a, cache = self.mixer(s, name="attn")(norm(s, "attn_norm")(h), cache, layer, context)
    h = h + a
    h = h + SwiGLU(s, name="mlp")(norm(s, "mlp_norm")(h))
    return (_held(h, s), cache), None


def _held(h: jax.Array, shape: DecoderShape) -> jax.Array:
  """H [B, ...] sharded over the batch axis; left to itself, XLA may shard d_model instead."""
  if shape.batch_axis is None:
    return h
  return jax.lax.with_sharding_constraint(h, PartitionSpec(shape.batch_axis))


def decode(
  shape: DecoderShape,
  mixer: type[nn.Module],
  context: object,
  tokens: jax.Array,
  cache: Cache | None,
  lengths: jax.Array | None,
  targets: jax.Array | None,
):
  """Tokens to logits or losses, in the scope of the compact module that calls it.

  Args:
    shape: sizes and number types.
    mixer: of each block.
    context: what all layers share, as the mixer wants it.
    tokens: int32 [B, T].
    cache: what came before, or None.
    lengths: int32 [B], real tokens per row; None: all T.
    targets: int32 [B, T], the tokens that follow. Not together with a cache.

  Returns:
    f32 logits [B, T, vocab]; with a cache, (logits, the cache grown by `lengths`); with targets,
    f32 [B, T], the negative log-likelihood of each in nats.

  Raises:
    ValueError: more tokens than max_len.
  """
  s = shape
  if tokens.shape[1] > s.max_len:
    raise ValueError(
      f"{tokens.shape[1]} tokens, but the model's max_len is {s.max_len}.\n"
      f"  Cut them, or build it with dataclasses.replace(shape, max_len={tokens.shape[1]})."
    )
  embed = nn.Embed(s.vocab, s.d_model, dtype=s.dtype, param_dtype=s.param_dtype, name="embed")
  start = (_held(embed(tokens), s), cache)
  (h, cache), _ = _layers(s, mixer)(start, jnp.arange(s.n_layers), context)
  h = norm(s, "final_norm")(h)
  head = embed if s.tied else dense(s, s.vocab, "head")
  if targets is not None:
    return _losses(head, h, targets, s)
  logits = _logits(head, h)
  if cache is None:
    return logits
  grown = cache.length + (tokens.shape[1] if lengths is None else lengths)
  return logits, dataclasses.replace(cache, length=grown)


def _layers(shape: DecoderShape, mixer: type[nn.Module]):
  """The stack of blocks as one function (carry, layer indices [L], context) -> (carry, None)."""
  s = shape
  # Under a scan nothing can be shared across the loop, so the barrier that remat needs is waste.
  block = nn.remat(Block, prevent_cse=not s.scan) if s.remat else Block
  if s.scan:
    scanned = nn.scan(
      block,
      variable_axes={"params": 0, "calib": 0, "quant": 0, "taps": 0, "intermediates": 0},
      split_rngs={"params": True, "sr": True},
      in_axes=(0, nn.broadcast),
      length=s.n_layers,
    )
    return scanned(s, mixer, name="layers")

  def loop(carry, layers, context):
    for i in range(s.n_layers):
      carry, _ = block(s, mixer, name=f"layers_{i}")(carry, layers[i], context)
    return carry, None

  return loop


def _logits(head: nn.Embed | nn.DenseGeneral, h: jax.Array) -> jax.Array:
  """F32 logits [..., V] of h [..., d_model]."""
  return (head.attend(h) if isinstance(head, nn.Embed) else head(h)).astype(jnp.float32)


def _losses(head: nn.Module, h: jax.Array, targets: jax.Array, shape: DecoderShape) -> jax.Array:
  """Negative log-likelihoods [B, T] of targets [B, T], `loss_chunk` tokens of a row at a time."""

  def one(head, carry, chunk):
    h, targets = chunk
    loss = optax.softmax_cross_entropy_with_integer_labels
    return carry, loss(_logits(head, h), targets)

  if shape.loss_chunk is None or h.shape[1] <= shape.loss_chunk:
    return one(head, None, (h, targets))[1]
  scanned = nn.scan(
    nn.remat(one, prevent_cse=False),
    variable_broadcast=["params", "quant"],
    split_rngs={"sr": True},
  )
  pieces = tuple(chunks(x, shape.loss_chunk, "loss_chunk") for x in (h, targets))
  _, losses = scanned(head, None, pieces)
  return losses.swapaxes(0, 1).reshape(targets.shape)


def chunks(x: jax.Array, size: int, name: str) -> jax.Array:
  """[B, T, ...] -> [T / size, B, size, ...].

  Raises:
    ValueError: a part of a chunk would be left over.
  """
  b, t = x.shape[:2]
  if t % size:
    raise ValueError(f"{t} tokens are not a multiple of {name}={size}; choose a divisor of {t}.")
  return x.reshape(b, t // size, size, *x.shape[2:]).swapaxes(0, 1)


def slots_of(tokens: jax.Array, cache: Cache | None) -> jax.Array:
  """The place of each token [B, T] in its row, which continues that of the cache: int32 [B, T]."""
  b, t = tokens.shape
  start = jnp.zeros(b, jnp.int32) if cache is None else cache.length
  return start[:, None] + jnp.arange(t, dtype=jnp.int32)


def _layer_names(tree: dict) -> list[str]:
  return sorted((k for k in tree if re.fullmatch(r"layers_\d+", k)), key=lambda k: int(k[7:]))


def stack_layers(params: dict) -> dict:
  """`layers_0 .. layers_n` -> `layers` with a leading axis [L]: from the loop to the scan.

  Leaves may sit in any pytree node (a packed kernel), as long as the layers agree on the nodes.
  """
  names = _layer_names(params)
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *(params[k] for k in names))
  return {k: v for k, v in params.items() if k not in names} | {"layers": stacked}


def unstack_layers(params: dict) -> dict:
  """`layers` [L, ...] -> `layers_0 .. layers_n`: the inverse of `stack_layers`."""
  n = len(jax.tree.leaves(params["layers"])[0])
  each = {f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(n)}
  return {k: v for k, v in params.items() if k != "layers"} | each


def block_names(shape: DecoderShape) -> tuple[str, ...]:
  """Module path of each block; under `nn.scan` one for all."""
  return ("layers",) if shape.scan else tuple(f"layers_{i}" for i in range(shape.n_layers))


def decoder_graph(shape: DecoderShape, mixers: list[dict[str, tuple]]) -> graph.Graph:
  """The graph of a decoder from that of its mixers.

  Args:
    shape: sizes and number types.
    mixers: for each of `block_names`: its writers and norms, links and pairs, if it has any.
  """
  embed = graph.Weight("embed", "embedding")
  head = dataclasses.replace(embed, transposed=True) if shape.tied else graph.Weight("head")
  parts = [(mixer, _mlp_graph(block)) for mixer, block in zip(mixers, block_names(shape))]
  names = ("writers", "norms", "links", "pairs")
  joined = {n: sum((p.get(n, ()) for both in parts for p in both), ()) for n in names}
  joined["writers"] = (embed, *joined["writers"])
  joined["norms"] += (graph.Norm("final_norm", (head,)),)
  return graph.Graph(**joined)


def _mlp_graph(block: str) -> dict[str, tuple]:
  gate, up, down = (graph.Weight(f"{block}/mlp/{name}") for name in ("gate", "up", "down"))
  return {
    "writers": (down,),
    "norms": (graph.Norm(f"{block}/mlp_norm", (gate, up)),),
    "links": (graph.Link(up, down, gates=(gate,)),),
  }
