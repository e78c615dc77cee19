"""A decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU, no biases.

Every contraction with a weight is an ordinary Linen module (DenseGeneral, Dense, Embed.attend), so
an interceptor can take it over; the collections and keys which it may use are lifted through the
layer scan. Letters: B batch, T time, H heads, D head dim.
"""

import dataclasses
import re
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from jaxquant import graph
from jaxquant.cache.plain import KVCache, read, write
from jaxquant.models.softmax_taps import softmax_measures
from jaxquant.ops.attention import attend, document_mask, rope_tables, rotate
from jaxquant.tapping import tap


@dataclasses.dataclass(frozen=True)
class TransformerShape:
  """Sizes and number types of a decoder.

  Attributes:
    vocab: number of tokens.
    d_model: width of the residual stream.
    n_layers: number of blocks.
    n_heads: query heads.
    n_kv_heads: key/value heads; divides n_heads.
    head_dim: D, even.
    d_ff: hidden width of the SwiGLU.
    tied: the embedding is also the output head.
    scan: one block under `nn.scan`, parameters stacked [n_layers, ...]; else a Python loop.
    remat: recompute each block in the backward pass.
    dtype: of activations; normalization, rotation and softmax are f32 always.
    param_dtype: of parameters.
    rope_theta: base of the rotary frequencies.
    max_len: the longest sequence, and the default size of a cache.
    attn_chunk: queries per block of attention; more of them are taken block by block, recomputed
      in the backward pass, so that no [T, S] array exists. None: all at once.
    loss_chunk: tokens per row whose logits exist at a time when `targets` are given, and which a
      scale per tensor spans if the head is quantized. None: all.
    batch_axis: mesh axis that the batch is sharded over; the residual stream is held to it. Needs a
      mesh in force (`jax.set_mesh`). None: left to the compiler.
  """

  vocab: int = 256
  d_model: int = 256
  n_layers: int = 6
  n_heads: int = 4
  n_kv_heads: int = 2
  head_dim: int = 64
  d_ff: int = 768
  tied: bool = False
  scan: bool = True
  remat: bool = False
  dtype: jax.typing.DTypeLike = jnp.float32
  param_dtype: jax.typing.DTypeLike = jnp.float32
  rope_theta: float = 10_000.0
  max_len: int = 2048
  attn_chunk: int | None = None
  loss_chunk: int | None = None
  batch_axis: str | None = None

  def __post_init__(self):
    if self.n_heads % self.n_kv_heads:
      raise ValueError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}.")
    if self.head_dim % 2:
      raise ValueError(f"head_dim={self.head_dim} is odd; RoPE rotates pairs of channels.")


def _dense(
  shape: TransformerShape,
  features: int | tuple[int, ...],
  name: str,
  *,
  axis: int | tuple[int, ...] = -1,
  gain: float = 1.0,
) -> nn.DenseGeneral:
  """A contraction; its kernel starts with variance gain / fan_in."""
  return nn.DenseGeneral(
    features,
    axis=axis,
    use_bias=False,
    dtype=shape.dtype,
    param_dtype=shape.param_dtype,
    kernel_init=nn.initializers.variance_scaling(gain, "fan_in", "truncated_normal"),
    name=name,
  )


def _norm(shape: TransformerShape, name: str) -> nn.RMSNorm:
  return nn.RMSNorm(dtype=shape.dtype, param_dtype=shape.param_dtype, name=name)


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
    q = rotate(_dense(s, (s.n_heads, s.head_dim), "q")(x), context.rope)
    k = rotate(_dense(s, (s.n_kv_heads, s.head_dim), "k")(x), context.rope)
    v = _dense(s, (s.n_kv_heads, s.head_dim), "v")(x)
    if cache is not None:
      cache = write(cache, layer, context.slots, k, v)
      k, v = read(cache, layer)
    how = {"scale": s.head_dim**-0.5, "chunk": s.attn_chunk}
    tap(self, "softmax", lambda: softmax_measures(q, k, context.mask, **how))
    o = _attend(q, k, v, context.mask, s)
    return _dense(s, s.d_model, "o", axis=(-2, -1), gain=0.5 / s.n_layers)(o), cache


def _attend(
  q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, shape: TransformerShape
) -> jax.Array:
  """`attend`, `attn_chunk` queries at a time."""
  one = lambda q, mask: attend(q, k, v, mask, scale=shape.head_dim**-0.5)
  if shape.attn_chunk is None or q.shape[1] <= shape.attn_chunk:
    return one(q, mask)
  chunks = tuple(_chunks(x, shape.attn_chunk, "attn_chunk") for x in (q, mask))
  o = jax.lax.map(jax.checkpoint(lambda chunk: one(*chunk)), chunks)
  return o.swapaxes(0, 1).reshape(q.shape)


def _chunks(x: jax.Array, size: int, name: str) -> jax.Array:
  """[B, T, ...] -> [T / size, B, size, ...].

  Raises:
    ValueError: a part of a chunk would be left over.
  """
  b, t = x.shape[:2]
  if t % size:
    raise ValueError(f"{t} tokens are not a multiple of {name}={size}; choose a divisor of {t}.")
  return x.reshape(b, t // size, size, *x.shape[2:]).swapaxes(0, 1)


class SwiGLU(nn.Module):
  """Gated feed-forward layer, down(silu(gate(x)) * up(x)); arXiv:2002.05202, eq. 6."""

  shape: TransformerShape

  @nn.compact
  def __call__(self, x):
    """X [B, T, d_model] -> the same shape."""
    s = self.shape
    h = nn.silu(_dense(s, s.d_ff, "gate")(x)) * _dense(s, s.d_ff, "up")(x)
    # 0.5 / n_layers here and in attention: GPT-2's scale of the 2 n_layers residual writers.
    return _dense(s, s.d_model, "down", gain=0.5 / s.n_layers)(h)


class Block(nn.Module):
  """One pre-norm layer, in the form of a scan body."""

  shape: TransformerShape

  @nn.compact
  def __call__(self, carry, layer, context):
    """Carry (h [B, T, d_model], cache), layer index, context -> (the same carry, None)."""
    h, cache = carry
    s = self.shape
    a, cache = Attention(s, name="attn")(_norm(s, "attn_norm")(h), cache, layer, context)
    h = h + a
    h = h + SwiGLU(s, name="mlp")(_norm(s, "mlp_norm")(h))
    return (_held(h, s), cache), None


def _held(h: jax.Array, shape: TransformerShape) -> jax.Array:
  """H [B, ...] sharded over the batch axis; left to itself, XLA may shard d_model instead."""
  if shape.batch_axis is None:
    return h
  return jax.lax.with_sharding_constraint(h, PartitionSpec(shape.batch_axis))


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
    s = self.shape
    if tokens.shape[1] > s.max_len:
      raise ValueError(
        f"{tokens.shape[1]} tokens, but the model's max_len is {s.max_len}.\n"
        f"  Cut them, or build it with dataclasses.replace(shape, max_len={tokens.shape[1]})."
      )
    embed = nn.Embed(s.vocab, s.d_model, dtype=s.dtype, param_dtype=s.param_dtype, name="embed")
    context = _context(s, tokens, cache, positions, documents)
    start = (_held(embed(tokens), s), cache)
    (h, cache), _ = self._layers()(start, jnp.arange(s.n_layers), context)
    h = _norm(s, "final_norm")(h)
    head = embed if s.tied else _dense(s, s.vocab, "head")
    if targets is not None:
      return _losses(head, h, targets, s)
    logits = _logits(head, h)
    if cache is None:
      return logits
    grown = cache.length + (tokens.shape[1] if lengths is None else lengths)
    return logits, dataclasses.replace(cache, length=grown)

  def _layers(self):
    """The stack of blocks as one function (carry, layer indices [L], context) -> (carry, None)."""
    s = self.shape
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
      return scanned(s, name="layers")

    def loop(carry, layers, context):
      for i in range(s.n_layers):
        carry, _ = block(s, name=f"layers_{i}")(carry, layers[i], context)
      return carry, None

    return loop


def _logits(head: nn.Embed | nn.DenseGeneral, h: jax.Array) -> jax.Array:
  """F32 logits [..., V] of h [..., d_model]."""
  return (head.attend(h) if isinstance(head, nn.Embed) else head(h)).astype(jnp.float32)


def _losses(
  head: nn.Module, h: jax.Array, targets: jax.Array, shape: TransformerShape
) -> jax.Array:
  """Negative log-likelihoods [B, T] of targets [B, T], `loss_chunk` tokens of a row at a time."""

  def one(head, carry, chunk):
    h, targets = chunk
    loss = optax.softmax_cross_entropy_with_integer_labels
    return carry, loss(_logits(head, h), targets)

  if shape.loss_chunk is None or h.shape[1] <= shape.loss_chunk:
    return one(head, None, (h, targets))[1]
  scanned = nn.scan(
    nn.remat(one, prevent_cse=False), variable_broadcast="params", split_rngs={"sr": True}
  )
  chunks = tuple(_chunks(x, shape.loss_chunk, "loss_chunk") for x in (h, targets))
  _, losses = scanned(head, None, chunks)
  return losses.swapaxes(0, 1).reshape(targets.shape)


def _context(
  shape: TransformerShape,
  tokens: jax.Array,
  cache: KVCache | None,
  positions: jax.Array | None,
  documents: jax.Array | None = None,
) -> Context:
  """Slots, mask and rotation of tokens [B, T] that continue the rows of the cache."""
  b, t = tokens.shape
  start = jnp.zeros(b, jnp.int32) if cache is None else cache.length
  slots = start[:, None] + jnp.arange(t, dtype=jnp.int32)
  keys = t if cache is None else cache.k.shape[2]
  # A row's slot is its order in time: what is padding or not yet written lies in later slots.
  mask = jnp.arange(keys, dtype=jnp.int32) <= slots[..., None]
  if documents is not None:
    if cache is not None:
      raise ValueError("documents with a cache: a row of a cache is one document; unpack them.")
    mask = document_mask(documents)
  positions = slots if positions is None else positions
  return Context(rope_tables(positions, shape.head_dim, shape.rope_theta), slots, mask)


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


@graph.graph_of.register
def _(model: Transformer) -> graph.Graph:
  s = model.shape
  blocks = ["layers"] if s.scan else [f"layers_{i}" for i in range(s.n_layers)]
  embed = graph.Weight("embed", "embedding")
  head = dataclasses.replace(embed, transposed=True) if s.tied else graph.Weight("head")
  parts = [_block_graph(s, block) for block in blocks]
  joined = {name: sum((part[name] for part in parts), ()) for name in parts[0]}
  joined["writers"] = (embed, *joined["writers"])
  joined["norms"] += (graph.Norm("final_norm", (head,)),)
  return graph.Graph(**joined)


def _block_graph(shape: TransformerShape, block: str) -> dict[str, tuple]:
  """Writers, norms, links and pairs of one block, or of all blocks of a scan."""
  q, k, v = (graph.Weight(f"{block}/attn/{name}", outputs=2) for name in "qkv")
  o = graph.Weight(f"{block}/attn/o", inputs=2)
  gate, up, down = (graph.Weight(f"{block}/mlp/{name}") for name in ("gate", "up", "down"))
  heads = {"head_dim": shape.head_dim, "repeat": shape.n_heads // shape.n_kv_heads}
  attn_norm = graph.Norm(f"{block}/attn_norm", (q, k, v))
  return {
    "writers": (o, down),
    "norms": (attn_norm, graph.Norm(f"{block}/mlp_norm", (gate, up))),
    "links": (graph.Link(v, o, **heads), graph.Link(up, down, gates=(gate,))),
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
