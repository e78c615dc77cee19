"""Rotations learned from the loss of the quantized network."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax

from jaxquant.fold import fold_heads, fuse_norm_gains, residual_rotate
from jaxquant.graph import Graph, Link, matrix
from jaxquant.intercept import quantized
from jaxquant.ops.qdot import Operand
from jaxquant.prepare import Context
from jaxquant.recipe import Recipe
from jaxquant.sites import flat_params
from jaxquant.solvers.cayley import cayley_step
from jaxquant.state import without_state
from jaxquant.statistics import Statistic, Tree
from jaxquant.transforms import orthogonal, rht

Rotations = dict[str, jax.Array]  # "stream" [d, d]; a writer's site: [D, D] or, stacked, [L, D, D]


@dataclasses.dataclass(frozen=True)
class LearnRotations:
  """SpinQuant's R1 (stream) and R2 (values of each layer); arXiv:2405.16406, section 3.2.

  Minimizes the next-token cross entropy of the model whose activations (and weights, if asked) are
  quantized as the recipe says, from a random Hadamard rotation. Batches are tokens [B, T], taken in
  order and again. The rotations are then folded: nothing runs more at inference.

  Attributes:
    steps: of Cayley SGD; 100 in the paper.
    rate: at the start, falling to zero as a cosine.
    weights: quantize weights too while learning; the paper leaves them to GPTQ.
    seed: of the first rotation's signs.
  """

  steps: int = 100
  rate: float = 1.5
  weights: bool = False
  seed: int = 0
  statistic: Statistic | None = dataclasses.field(default=None, repr=False)
  reads_batches: ClassVar[bool] = True

  def sites(self, context: Context) -> tuple[tuple[str, ...], ...]:
    """None: it looks at the loss."""
    del context
    return ()

  def apply(self, variables: dict, context: Context, stats: dict[str, Tree]) -> dict:
    """Learns and folds.

    Raises:
      ValueError: without batches, or if the loss is not finite.
    """
    del stats
    rotations, losses = self.learn(variables, context)
    if not bool(jnp.isfinite(losses).all()):
      raise ValueError(
        f"{context.recipe.name}: the loss of LearnRotations is not finite (first at step "
        f"{int(jnp.argmin(jnp.isfinite(losses)))} of {self.steps}); look for a NaN batch or lower "
        "its rate"
      )
    return rotated(fuse_norm_gains(variables, context.graph), context.graph, rotations)

  def learn(self, variables: dict, context: Context) -> tuple[Rotations, jax.Array]:
    """The rotations, and the loss before each step [steps]."""
    if not context.batches:
      raise ValueError(f"{context.recipe.name}: LearnRotations needs batches of tokens [B, T]")
    variables = fuse_norm_gains(variables, context.graph)
    rotations = first_rotations(variables, context.graph, self.seed)
    momentum = jax.tree.map(jnp.zeros_like, rotations)
    loss = _loss(context, self.weights)
    rate = optax.cosine_decay_schedule(self.rate, max(self.steps, 1))
    step = jax.jit(lambda r, m, i, batch: _step(loss, variables, r, m, rate(i), batch))
    losses = []
    for i in range(self.steps):
      batch = context.batches[i % len(context.batches)]
      rotations, momentum, value = step(rotations, momentum, i, batch)
      losses.append(value)
    return rotations, jnp.array(losses)


def _loss(context: Context, weights: bool) -> Callable:
  """(variables, tokens) -> cross entropy of the next token under quantization."""
  recipe = context.recipe
  in_float = lambda rule: dataclasses.replace(rule, w=Operand(rotation=rule.w.rotation))
  rules = recipe.rules if weights else tuple((p, in_float(r)) for p, r in recipe.rules)
  learning = Recipe(rules, name=f"{recipe.name} while learning")
  apply = quantized(context.model, without_state(learning, static=False))  # ranges come last

  def loss(variables: dict, tokens: jax.Array) -> jax.Array:
    logits = apply(variables, tokens[:, :-1])
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    return cross_entropy(logits.astype(jnp.float32), tokens[:, 1:]).mean()

  graph = context.graph
  return lambda rotations, variables, tokens: loss(rotated(variables, graph, rotations), tokens)


def _step(
  loss: Callable,
  variables: dict,
  rotations: Rotations,
  momentum: Rotations,
  rate: jax.Array,
  batch: jax.Array,
) -> tuple[Rotations, Rotations, jax.Array]:
  value, gradients = jax.value_and_grad(loss)(rotations, variables, batch)

  def turn(x: jax.Array, g: jax.Array, m: jax.Array) -> tuple[jax.Array, jax.Array]:
    one = functools.partial(cayley_step, rate=rate)
    for _ in range(x.ndim - 2):
      one = jax.vmap(one)
    return one(x, g, m)

  found = {name: turn(rotations[name], gradients[name], momentum[name]) for name in rotations}
  return {n: x for n, (x, _) in found.items()}, {n: m for n, (_, m) in found.items()}, value


def _heads(graph: Graph) -> tuple[Link, ...]:
  return tuple(link for link in graph.links if link.head_dim)


def first_rotations(variables: dict, graph: Graph, seed: int) -> Rotations:
  """Random Hadamard matrices for the stream and for the values of each layer.

  Args:
    variables: float.
    graph: of the model.
    seed: of the signs.
  """
  flat = flat_params(variables)
  matrix_of = lambda i, n: rht(jax.random.fold_in(jax.random.key(seed), i), n)(jnp.eye(n))
  found = {"stream": matrix_of(0, matrix(flat, graph.writers[0]).shape[-1])}
  for i, link in enumerate(_heads(graph)):
    stack = matrix(flat, link.writer).shape[:-2]
    m = matrix_of(i + 1, link.head_dim)
    found[link.writer.site] = jnp.broadcast_to(m, (*stack, *m.shape))
  return found


def rotated(variables: dict, graph: Graph, rotations: Rotations) -> dict:
  """The stream and the values turned; differentiable in the rotations.

  Args:
    variables: float, with gains of 1.
    graph: of the model.
    rotations: as of `first_rotations`.
  """
  variables = residual_rotate(variables, graph, orthogonal(rotations["stream"]))
  for link in _heads(graph):
    m = rotations[link.writer.site]
    t = orthogonal(m) if m.ndim == 2 else jax.vmap(orthogonal)(m)
    variables = fold_heads(variables, link, t, stacked=m.ndim == 3)
  return variables
