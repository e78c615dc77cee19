"""Moves scales, rotations and permutations between the weights of a model; its function stays.

Pure functions (variables, graph or edge, map) -> variables, in float32 whatever the parameters'
dtype, for looped and stacked layers alike. Letters: K input and N output channels of a weight,
D head dim, G key/value heads, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from jaxquant.graph import (
  Edge,
  Graph,
  Keys,
  Link,
  Pair,
  Weight,
  float_kernel,
  gain_of,
  matrix,
  spread,
)
from jaxquant.sites import flat_params
from jaxquant.transforms import Transform


def _stored(flat: dict, weight: Weight, w: jax.Array) -> jax.Array:
  """A matrix back in the shape and dtype of its parameter."""
  w = w.swapaxes(-1, -2) if weight.transposed else w
  old = flat[weight.keys]
  return w.reshape(old.shape).astype(old.dtype)


def _with(variables: object, changes: dict[Keys, jax.Array]) -> dict:
  return {**variables, "params": unflatten_dict({**flat_params(variables), **changes})}


def _outputs(flat: dict, weight: Weight, t: Callable) -> Iterator[tuple[Keys, jax.Array]]:
  """A weight and its bias whose output channels went through t, a map along the last axis."""
  yield weight.keys, _stored(flat, weight, t(matrix(flat, weight)))
  bias = flat.get(weight.bias)
  if bias is not None:
    stack = bias.shape[: bias.ndim - weight.outputs]
    moved = t(bias.astype(jnp.float32).reshape(*stack, 1, -1))
    yield weight.bias, moved.reshape(bias.shape).astype(bias.dtype)


def _scaled_rows(weight: Weight, old: jax.Array, rows: jax.Array) -> jax.Array:
  flat = {weight.keys: old}
  return _stored(flat, weight, matrix(flat, weight) * rows)


_in_place = functools.partial(jax.jit, static_argnums=0, donate_argnums=1)(_scaled_rows)


def fold_scale(
  variables: object, graph: Graph, edge: Edge, s: jax.Array, *, donate: bool = False
) -> dict:
  """Divides the channels of an edge by s and multiplies its readers' rows by s.

      gain / s (or writer / s);  w_kn * s_k

  Args:
    variables: float.
    graph: of the model.
    edge: one of `graph.edges`.
    s: [stack..., N], non-zero, one per channel of the edge.
    donate: the readers' parameters are consumed, changed in place.

  Raises:
    ValueError: if a reader is tied to another use of its parameter.
  """
  flat = flat_params(variables)
  if graph.tied(edge):
    raise ValueError(
      f"{edge.readers[0].site}: tied to another use of its parameter, so no scale folds into it "
      "alone. Untie it first (jaxquant.models.transformer.untie for the shipped model)."
    )
  rows = spread(edge, s)[..., None]
  changes = {}
  for r in edge.readers:
    alike = dataclasses.replace(r, site="", param="kernel")  # one compilation for all that are
    changes[r.keys] = (_in_place if donate else _scaled_rows)(alike, float_kernel(flat, r), rows)
  if isinstance(edge, Link):
    columns = s[..., None, :]
    return _with(variables, changes | dict(_outputs(flat, edge.writer, lambda w: w / columns)))
  gain = flat[edge.keys]
  changes[edge.keys] = (gain_of(flat, edge) / s - edge.offset).astype(gain.dtype)
  bias = (*edge.keys[:-1], "bias")
  if bias in flat:
    changes[bias] = (flat[bias] / s).astype(gain.dtype)
  return _with(variables, changes)


def fuse_norm_gains(variables: object, graph: Graph) -> dict:
  """Every gain becomes 1, its readers have it: what a rotation of the stream needs (QuaRot, 3).

  Raises:
    ValueError: for a reader that is tied, unless its gain is 1 already; for a gain of zero.
  """
  for norm in graph.norms:
    gain = gain_of(flat_params(variables), norm)
    if _concrete(gain) and bool((gain == 1).all()):
      continue
    if _concrete(gain) and not bool(gain.all()):
      raise ValueError(f"{norm.site}: a gain of zero cannot be moved; prune the channel first")
    variables = fold_scale(variables, graph, norm, gain)
  return variables


def _concrete(x: jax.Array) -> bool:
  return not isinstance(x, jax.core.Tracer)


def residual_rotate(variables: object, graph: Graph, t: Transform) -> dict:
  """Rotates the residual stream: writers W t, readers t.fold(W); arXiv:2404.00456, section 4.1.

  Norms without mean and gain commute with an orthogonal t: RMS(x t) = RMS(x). A tied head needs
  nothing of its own, because W^T turns with W.

  Args:
    variables: with gains of 1 (`fuse_norm_gains`).
    graph: of the model.
    t: orthogonal, of the width of the stream.

  Raises:
    ValueError: for a LayerNorm, for gains that are not 1, for a t that is not orthogonal; the last
      two outside jit.
  """
  flat = flat_params(variables)
  stream = [norm for norm in graph.norms if norm.stream]
  for norm in stream:
    if norm.centred:
      raise ValueError(
        f"{norm.site}: a LayerNorm subtracts the mean, which a rotation does not keep. Move the "
        "mean into the writers and use RMSNorm."
      )
    gain = gain_of(flat, norm)
    if _concrete(gain) and not bool((gain == 1).all()):
      raise ValueError(f"{norm.site}: its gain is not 1; call fuse_norm_gains first")
  _check_orthogonal(t, matrix(flat, graph.writers[0]).shape[-1])
  changes = {}
  for writer in graph.writers:
    changes |= dict(_outputs(flat, writer, t))
  for reader in (r for norm in stream for r in norm.readers):
    if reader.keys not in changes:
      changes[reader.keys] = _stored(flat, reader, t.fold(matrix(flat, reader)))
  return _with(variables, changes)


def _check_orthogonal(t: Transform, n: int) -> None:
  m = t(jnp.eye(n))
  off = jnp.abs(jnp.matmul(m, m.T, precision=jax.lax.Precision.HIGHEST) - jnp.eye(n)).max()
  if _concrete(off) and not off < 1e-3:  # of float32 with much room: what is meant is a wrong t
    raise ValueError(
      f"residual_rotate: {type(t).__name__} is not orthogonal: |T T^T - I| = {float(off):.2g}"
    )


def fold_heads(
  variables: object, link: Link, t: Transform, *, stacked: bool = False, per_head: bool = False
) -> dict:
  """A map within each head: values t(v), the reader's rows t.fold(w). Attention mixes tokens only.

  The per-head rotation of QuaRot (arXiv:2404.00456, 4.3), the R2 of SpinQuant (arXiv:2405.16406),
  the affine maps of AffineQuant (arXiv:2403.12544).

  Args:
    variables: float.
    link: with a head_dim.
    t: of D channels, any invertible transform.
    stacked: the leaves of t have the leading axis [L] of the layers.
    per_head: they have the axis [G] of the key/value heads (after that of the layers).

  Raises:
    ValueError: for a link without heads.
  """
  d, flat = link.head_dim, flat_params(variables)
  if d is None:
    raise ValueError(f"{link.writer.site} -> {link.reader.site}: no heads, only scales fold here")
  each = 0 if per_head else None

  def values(t: Transform, w: jax.Array) -> jax.Array:
    heads = w.reshape(*w.shape[:-1], -1, d)
    return jax.vmap(lambda t, w: t(w), (each, -2), -2)(t, heads).reshape(w.shape)

  def rows(t: Transform, w: jax.Array) -> jax.Array:
    heads = w.reshape(*w.shape[:-2], -1, link.repeat, d, w.shape[-1])
    return jax.vmap(lambda t, w: t.fold(w), (each, -4), -4)(t, heads).reshape(w.shape)

  if stacked:
    values, rows = jax.vmap(values), jax.vmap(rows)
  changes = dict(_outputs(flat, link.writer, lambda w: values(t, w)))
  w = rows(t, matrix(flat, link.reader))
  return _with(variables, changes | {link.reader.keys: _stored(flat, link.reader, w)})


def fold_permutation(variables: object, link: Link, t: Transform) -> dict:
  """Reorders the channels of a link without heads, and of its gates: t(x) on writers, t.fold below.

  Args:
    variables: float.
    link: up -> down.
    t: a `permute` of N channels, shared by all layers.

  Raises:
    ValueError: for a link with heads (channels of other heads are not interchangeable).
  """
  if link.head_dim is not None:
    raise ValueError(f"{link.writer.site}: permute within a head by fold_heads")
  flat = flat_params(variables)
  changes = {}
  for weight in (link.writer, *link.gates):
    changes |= dict(_outputs(flat, weight, t))
  changes[link.reader.keys] = _stored(flat, link.reader, t.fold(matrix(flat, link.reader)))
  return _with(variables, changes)


def fold_pair(variables: object, pair: Pair, s: jax.Array) -> dict:
  """Queries * s, keys / s; the SmoothAttention of QServe (arXiv:2405.04532, section 4.2).

  Args:
    variables: float.
    pair: q and k.
    s: [stack..., G, D], non-zero; with RoPE [stack..., G, D/2], one for each rotated pair.
  """
  flat = flat_params(variables)
  s = jnp.concatenate([s, s], -1) if pair.rope else s
  heads = Link(pair.key, pair.query, pair.head_dim, pair.repeat)
  keys = s.reshape(*s.shape[:-2], 1, -1)
  queries = spread(heads, keys)
  changes = dict(_outputs(flat, pair.query, lambda w: w * queries))
  return _with(variables, changes | dict(_outputs(flat, pair.key, lambda w: w / keys)))


def inject_outliers(
  variables: object, graph: Graph, key: jax.Array, channels: int, factor: float
) -> dict:
  """Makes a few channels of every norm's output `factor` times larger, and keeps the function.

  Small models have no outlier channels, so methods against them show nothing on them otherwise.

  Args:
    variables: float.
    graph: of the model; norms with tied readers are left alone.
    key: chooses the channels, other ones in each layer.
    channels: how many in each norm.
    factor: gain * factor, readers / factor; a power of two changes no bit of the product.
  """
  for i, norm in enumerate(n for n in graph.norms if not graph.tied(n)):
    shape = flat_params(variables)[norm.keys].shape
    rank = jax.random.uniform(jax.random.fold_in(key, i), shape).argsort(-1).argsort(-1)
    variables = fold_scale(variables, graph, norm, jnp.where(rank < channels, 1 / factor, 1.0))
  return variables


def inject_key_outliers(
  variables: object, graph: Graph, key: jax.Array, pairs: int, factor: float
) -> dict:
  """Makes a few rotary pairs of every key head `factor` times larger; queries take it back.

  Args:
    variables: float.
    graph: of the model, whose pairs have RoPE.
    key: chooses the rotary pairs, other ones in each head and layer.
    pairs: how many in each head.
    factor: keys * factor, queries / factor; a power of two changes no bit of the product.
  """
  for i, pair in enumerate(graph.pairs):
    w = matrix(flat_params(variables), pair.key)
    shape = (*w.shape[:-2], w.shape[-1] // pair.head_dim, pair.head_dim // 2)
    rank = jax.random.uniform(jax.random.fold_in(key, i), shape).argsort(-1).argsort(-1)
    variables = fold_pair(variables, pair, jnp.where(rank < pairs, 1 / factor, 1.0))
  return variables
