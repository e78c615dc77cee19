"""Scales found by trying them: the output error of the quantized weights decides."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.fold import fold_scale
from jaxquant.graph import Edge, Norm, matrix
from jaxquant.ops.qdot import Operand, quantize_operand
from jaxquant.prepare import Context
from jaxquant.sites import flat_params
from jaxquant.solvers.cholesky import energy
from jaxquant.statistics import HESSIAN, MEAN_ABS, Statistic, Tree
from jaxquant.steps.smooth import edges
from jaxquant.tensor import QTensor, dequantize


def _mean_and_hessian(x: jax.Array) -> tuple[Tree, jax.Array]:
  return MEAN_ABS.of(x), HESSIAN.of(x)


def _onto(partial: tuple, x: jax.Array) -> tuple[Tree, jax.Array]:
  return MEAN_ABS.onto(partial[0], x), HESSIAN.onto(partial[1], x)


def _finished(partial: tuple[Tree, jax.Array]) -> tuple[jax.Array, jax.Array]:
  return MEAN_ABS.finish(partial[0]), HESSIAN.finish(partial[1])


@dataclasses.dataclass(frozen=True)
class SearchScales:
  """AWQ: the power of the mean activation that hurts least; arXiv:2306.00978, eq. 4 and 5.

      s = mean|X|^r / sqrt(max s min s),  r in 0, 1/steps ... ;  least sum tr(dW^T H dW),
      dW = Q(W * s) / s - W

  The error is that of the outputs of all weights which read the channels, through H = X^T X. The
  published code compares the output of the whole attention or MLP instead. r = 0 is no scale.

  A scale acts on whole rows of W, and its gain is a sum over columns which all see the same H, so
  some of them decide for all: at most `columns` of each weight, evenly spread. (Shipped model, 3
  bits: of 768 columns, 512 choose what all choose; 256 choose scales up to 3.5 % worse.)

  Attributes:
    steps: candidates per edge.
    smallest: of mean|X|^r before it is normalized, as in the published code.
    columns: of each weight that are tried; None for all.
  """

  steps: int = 20
  smallest: float = 1e-4
  columns: int | None = 512
  statistic: Statistic | None = dataclasses.field(
    default=Statistic(_mean_and_hessian, finish=_finished, add=_onto), repr=False
  )
  local: ClassVar[bool] = True  # an edge lies within one block, or outside of all

  def sites(self, context: Context) -> tuple[tuple[str, ...], ...]:
    """The first reader of each edge; the others have the same input."""
    return tuple((e.readers[0].site,) for e in self._edges(context))

  def apply(self, variables: dict, context: Context, stats: dict[str, Tree]) -> dict:
    """Edge by edge, layer by layer."""
    for edge in self._edges(context):
      if edge.readers[0].site not in stats:
        continue
      mean, h = stats[edge.readers[0].site]
      flat = flat_params(variables)
      readers = tuple(r for r in edge.readers if context.recipe.rule(r.site).w.fmt is not None)
      operands = tuple(
        dataclasses.replace(context.recipe.rule(r.site).w, rotation=None) for r in readers
      )
      s = _searched(self, operands, mean, h, tuple(matrix(flat, r) for r in readers))
      variables = fold_scale(variables, context.graph, edge, s, donate=context.donate)
    return variables

  def _edges(self, context: Context) -> tuple[Edge, ...]:
    """Grouped heads share values, and the published code leaves their v -> o alone; so do we."""
    weighted = lambda e: any(context.recipe.rule(r.site).w.fmt is not None for r in e.readers)
    alone = lambda e: isinstance(e, Norm) or e.repeat == 1
    return tuple(e for e in edges(context) if weighted(e) and alone(e))

  def best(
    self,
    operands: tuple[Operand, ...],
    mean: jax.Array,
    h: jax.Array,
    weights: tuple[jax.Array, ...],
  ) -> jax.Array:
    """The scale [K] of one layer's edge.

    Args:
      operands: how each weight is quantized.
      mean: mean |X|, [K].
      h: X^T X, [K, K].
      weights: float32 [K, N] each.
    """
    tried = [_spread(w, self.columns, o.fmt.block_n) for w, o in zip(weights, operands)]
    shares = [some.shape[1] / w.shape[1] for some, w in zip(tried, weights)]

    def attempt(i: jax.Array) -> tuple[jax.Array, jax.Array]:
      s = jnp.maximum(mean ** (i / self.steps), self.smallest)
      s = s / jnp.sqrt(s.max() * s.min())
      rows = s[:, None]
      error = 0.0
      for w, operand, share in zip(tried, operands, shares):
        q = quantize_operand(w * rows, operand, -2)
        off = (dequantize(q) if isinstance(q, QTensor) else q) / rows - w
        off = jax.lax.optimization_barrier(off)  # not anew for each product
        error += energy(h, off) / share
      return error, s

    errors, scales = jax.lax.map(attempt, jnp.arange(self.steps))
    return scales[errors.argmin()]


def _spread(w: jax.Array, most: int | None, tile: int | None) -> jax.Array:
  """At most `most` columns of w [K, N], in whole tiles of the format, evenly spread."""
  n, tile = w.shape[1], tile or w.shape[1]
  if most is None or n <= most or tile > most:
    return w
  first = np.linspace(0, n // tile - 1, most // tile).round().astype(int) * tile
  return w[:, (first[:, None] + np.arange(tile)).ravel()]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _searched(step: SearchScales, operands: tuple[Operand, ...], *found: object) -> jax.Array:
  """`best` for one layer after the other."""
  find = lambda args: step.best(operands, *args)
  for _ in found[0].shape[:-1]:
    find = functools.partial(jax.lax.map, find)
  return find(found)
