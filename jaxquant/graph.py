"""The model graph: which parameters write and read the channels that a transform may act on.

A graph is data: weights, and the edges between them along which a linear map can be moved without a
change of the function (`jaxquant.fold` moves it). Parameters of a loop over layers are weights one
by one; those of an `nn.scan` are one weight with a stack of matrices.
Letters: K input and N output channels of one weight, D head dim, H query heads, G key/value heads.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxquant.kernels import is_node
from jaxquant.sites import flat_params

Keys = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Weight:
  """A parameter as a matrix [stack..., K, N].

  Attributes:
    site: module path, "layers/attn/q"; a "bias" beside the parameter belongs to it.
    param: its name there.
    inputs: how many of its axes are input channels K.
    outputs: how many axes, the last ones, are output channels N.
    transposed: stored as [N, K] (an embedding that is also the head).
  """

  site: str
  param: str = "kernel"
  inputs: int = 1
  outputs: int = 1
  transposed: bool = False

  @property
  def keys(self) -> Keys:
    """Where it lies in the params dict."""
    return (*self.site.split("/"), self.param)

  @property
  def bias(self) -> Keys:
    """Where its bias would lie."""
    return (*self.site.split("/"), "bias")


@dataclasses.dataclass(frozen=True)
class Norm:
  """A normalization, and all weights that read its output (nothing else may).

  Attributes:
    site: module path.
    readers: weights whose K is its width.
    param: name of the gain; a "bias" beside it is scaled along.
    offset: gain = parameter + offset (1.0 where the parameter starts at zero).
    centred: it subtracts the mean (LayerNorm), so that no rotation passes through it.
    stream: it reads the residual stream.
  """

  site: str
  readers: tuple[Weight, ...]
  param: str = "scale"
  offset: float = 0.0
  centred: bool = False
  stream: bool = True

  @property
  def keys(self) -> Keys:
    """Where the gain lies in the params dict."""
    return (*self.site.split("/"), self.param)


@dataclasses.dataclass(frozen=True)
class Link:
  """Output channels of a weight that arrive channel by channel at another: v -> o, up -> down.

  Attributes:
    writer: with N channels.
    reader: with K = N * repeat channels.
    head_dim: D, if whole heads arrive (any linear map within a head passes); None: what lies
      between is elementwise and only linear in each channel.
    repeat: query heads that read one key/value head, H / G.
    gates: weights whose outputs multiply the writer's channels; they stay in their order.
  """

  writer: Weight
  reader: Weight
  head_dim: int | None = None
  repeat: int = 1
  gates: tuple[Weight, ...] = ()

  @property
  def readers(self) -> tuple[Weight, ...]:
    """As those of a Norm."""
    return (self.reader,)


@dataclasses.dataclass(frozen=True)
class Pair:
  """Query and key weights: a scale on one is undone on the other.

  Attributes:
    query: [K, H D].
    key: [K, G D].
    head_dim: D.
    repeat: H / G.
    rope: channels i and i + D/2 are rotated together, so they share a scale.
  """

  query: Weight
  key: Weight
  head_dim: int
  repeat: int = 1
  rope: bool = True


Edge = Norm | Link


@dataclasses.dataclass(frozen=True)
class Graph:
  """What may be folded in a model.

  Attributes:
    writers: weights whose output is added to the residual stream (the embedding among them).
    norms: all normalizations, in the order of their use.
    links: v -> o, up -> down.
    pairs: q, k.
  """

  writers: tuple[Weight, ...]
  norms: tuple[Norm, ...]
  links: tuple[Link, ...] = ()
  pairs: tuple[Pair, ...] = ()

  @property
  def weights(self) -> tuple[Weight, ...]:
    """All weights, each view once."""
    found = [*self.writers, *(r for n in self.norms for r in n.readers)]
    found += [w for e in self.links for w in (e.writer, e.reader, *e.gates)]
    found += [w for e in self.pairs for w in (e.query, e.key)]
    return tuple(dict.fromkeys(found))

  @property
  def edges(self) -> tuple[Edge, ...]:
    """What a scale can be folded into, and whose readers share their input."""
    return (*self.norms, *self.links)

  def tied(self, edge: Edge) -> bool:
    """Whether a reader's parameter is used elsewhere too, so that nothing folds into it alone."""
    uses = [w.keys for w in self.weights]
    return any(uses.count(w.keys) > 1 for w in edge.readers)


@functools.singledispatch
def graph_of(model: nn.Module) -> Graph:
  """The graph of a model, from the function registered for its class.

  Args:
    model: an unbound Linen module.

  Raises:
    ValueError: if nobody registered the class.

  Example:
    >>> from jaxquant.models.transformer import Transformer, TransformerShape
    >>> graph = graph_of(Transformer(TransformerShape()))
    >>> [norm.site for norm in graph.norms]
    ['layers/attn_norm', 'layers/mlp_norm', 'final_norm']
  """
  raise ValueError(
    f"{type(model).__name__} has no graph, and the recipe moves scales or rotations between its "
    "weights. Say which weights write and read each norm and link:\n"
    "  @jaxquant.graph.graph_of.register\n"
    f"  def _(model: {type(model).__name__}) -> jaxquant.graph.Graph: ..."
  )


def check(graph: Graph, variables: object) -> None:
  """Raises ValueError if the graph does not describe these variables, naming the site."""
  flat = flat_params(variables)
  for weight in graph.weights:
    matrix(flat, weight)
  for norm in graph.norms:
    width = gain_of(flat, norm).shape[-1]
    for reader in norm.readers:
      _fits(reader, matrix(flat, reader).shape[-2], width, f"channels of {norm.site}")
  for link in graph.links:
    n = matrix(flat, link.writer).shape[-1]
    _fits(
      link.reader, matrix(flat, link.reader).shape[-2], n * link.repeat, f"of {link.writer.site}"
    )


def _fits(weight: Weight, got: int, wanted: int, of: str) -> None:
  if got != wanted:
    raise ValueError(f"{weight.site}: K={got}, but the graph says {wanted} ({of}). Correct it.")


def float_kernel(flat: dict, weight: Weight) -> jax.Array:
  """A weight of `flat_params`; ValueError, naming its site, if it is not there or packed."""
  if weight.keys not in flat:
    near = sorted("/".join(k) for k in flat if k[-1] == weight.param)
    raise ValueError(f"{weight.site}: the graph names a parameter that is not among {near}")
  value = flat[weight.keys]
  if is_node(value):
    raise ValueError(f"{weight.site}: packed already; transforms fold into float variables only")
  return value


def matrix(flat: dict, weight: Weight) -> jax.Array:
  """A weight of `flat_params` as float32 [stack..., K, N]."""
  value = float_kernel(flat, weight)
  own = weight.inputs + weight.outputs
  stack, axes = value.shape[: value.ndim - own], value.shape[value.ndim - own :]
  n = math.prod(axes[weight.inputs :])
  w = value.reshape(*stack, -1, n).astype(jnp.float32)
  return w.swapaxes(-1, -2) if weight.transposed else w


def gain_of(flat: dict, norm: Norm) -> jax.Array:
  """The gain of a norm, float32 [stack..., K]."""
  if norm.keys not in flat:
    raise ValueError(f"{norm.site}: the graph names a gain {norm.param!r} that is not there")
  return flat[norm.keys].astype(jnp.float32) + norm.offset


def spread(link: Edge, s: jax.Array) -> jax.Array:
  """A value per channel of an edge, [..., N], as one per input channel of its readers, [..., K]."""
  if isinstance(link, Norm) or link.repeat == 1:
    return s
  heads = s.reshape(*s.shape[:-1], -1, 1, link.head_dim)
  heads = jnp.broadcast_to(heads, (*heads.shape[:-2], link.repeat, link.head_dim))
  return heads.reshape(*s.shape[:-1], -1)


def shared(link: Edge, a: jax.Array) -> jax.Array:
  """The reverse of `spread`: the largest value of the readers' channels that share one channel."""
  if isinstance(link, Norm) or link.repeat == 1:
    return a
  heads = a.reshape(*a.shape[:-1], -1, link.repeat, link.head_dim)
  return heads.max(-2).reshape(*a.shape[:-1], -1)
