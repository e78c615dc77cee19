"""Preparation: function-preserving steps on the float weights before anything is quantized.

A recipe lists steps; `prepare` runs them in order and `quantize_params` calls it first. What comes
out has the same function, so the fake-quantized prepared weights and the packed ones still agree.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator
from typing import Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxquant.calibration_checks import finite
from jaxquant.graph import Graph, check, graph_of, matrix
from jaxquant.intercept import collect
from jaxquant.recipe import Recipe
from jaxquant.sites import flat_params
from jaxquant.statistics import Statistic, Tree

STATISTICS_BYTES = 2**26  # held at a time, as in `quantize_params`


@dataclasses.dataclass(frozen=True)
class Context:
  """What a step may look at.

  Attributes:
    model: the Linen module.
    graph: of the model.
    recipe: that is being applied; its rules say what each site gets afterwards.
    batches: calibration inputs.
  """

  model: nn.Module
  graph: Graph
  recipe: Recipe
  batches: tuple

  def quantized(self, site: str) -> bool:
    """Whether the recipe gives a site's weight or input a format."""
    rule = self.recipe.rule(site)
    return rule.w.fmt is not None or rule.x.fmt is not None


class Step(Protocol):
  """A change of the weights that keeps the function; a frozen, hashable value.

  Attributes:
    statistic: what it needs of the inputs at its sites; None: nothing.
  """

  statistic: Statistic | None

  def sites(self, context: Context) -> tuple[tuple[str, ...], ...]:
    """Where the statistic is collected; sites in one tuple come together."""
    ...

  def apply(self, variables: dict, context: Context, stats: dict[str, Tree]) -> dict:
    """The changed variables.

    Called once without a statistic, else once for each group of sites whose statistics fit into
    memory together: `stats` has this group, [L, ...] for scanned sites. What one group changes must
    not change the inputs at the sites of another.
    """
    ...


def prepare(
  model: nn.Module, variables: object, recipe: Recipe, batches: Iterable | None = None
) -> dict:
  """The variables after the recipe's steps: another parameterization of the same function.

  Args:
    model: the Linen module.
    variables: float variables.
    recipe: names the steps; without any, the variables come back as they are.
    batches: calibration inputs, each passed as `model.apply(variables, batch)`.

  Returns:
    Float variables of the same structure.

  Raises:
    ValueError: a model without graph; a step that calibrates and no batch; inputs or results that
      are not finite, naming the step and the site.

  Example:
    >>> import jax, jax.numpy as jnp, jaxquant as jq
    >>> from jaxquant.models.transformer import Transformer, TransformerShape
    >>> from jaxquant.steps import FuseGains
    >>> model, tokens = Transformer(TransformerShape(n_layers=1)), jnp.zeros((1, 4), jnp.int32)
    >>> variables = model.init(jax.random.key(0), tokens)
    >>> recipe = jq.Recipe(prepare=(FuseGains(),))
    >>> ready = prepare(model, variables, recipe)
    >>> bool(jnp.allclose(model.apply(ready, tokens), model.apply(variables, tokens), atol=1e-5))
    True
  """
  if not recipe.prepare:
    return variables
  graph = graph_of(model)
  check(graph, variables)
  context = Context(model, graph, recipe, tuple(batches or ()))
  for step in recipe.prepare:
    if step.statistic is None:
      variables = step.apply(variables, context, {})
    else:
      for group in _groups(step, context, variables):
        stats = statistics(step, context, variables, group)
        variables = step.apply(variables, context, stats)
    _check_finite(step, variables)
  return variables


def _groups(step: Step, context: Context, variables: dict) -> Iterator[tuple[str, ...]]:
  """Runs of a step's sites whose statistics together stay below the budget; at least one each."""
  flat = flat_params(variables)
  shapes = {w.site: matrix(flat, w).shape for w in context.graph.weights if not w.transposed}
  group: tuple[str, ...] = ()
  held = 0
  for together in step.sites(context):
    size = 0
    for site in together:
      *stack, k, _ = shapes[site]
      x = jax.ShapeDtypeStruct((1, k), jnp.float32)
      found = jax.tree.leaves(jax.eval_shape(step.statistic.of, x))
      size += math.prod(stack) * sum(a.size * a.dtype.itemsize for a in found)
    if group and held + size > STATISTICS_BYTES:
      yield group
      group, held = (), 0
    group, held = (*group, *together), held + size
  if group:
    yield group


def statistics(
  step: Step, context: Context, variables: dict, sites: tuple[str, ...]
) -> dict[str, Tree]:
  """A step's statistic at some sites of the float model, over all batches.

  Raises:
    ValueError: without batches; for a statistic that is not finite, naming the site.
  """
  name, statistic = type(step).__name__, step.statistic
  if not context.batches:
    raise ValueError(f"{context.recipe.name}: its step {name} calibrates: pass batches")
  run = _collector(context.model, statistic, frozenset(sites))
  batches = (run(variables, batch) for batch in context.batches)
  partial = functools.reduce(_combine(statistic), batches)
  found = {path: statistic.finish(value) for path, value in partial.items()}
  for path, value in found.items():
    if not finite(value):
      raise ValueError(
        f"{path}: its inputs are not finite on the calibration data (step {name}). Look for a NaN "
        "batch, or for an activation that overflows in the float model."
      )
  return found


@functools.lru_cache(maxsize=64)
def _collector(model: nn.Module, statistic: Statistic, sites: frozenset[str]):
  return jax.jit(collect(model, Recipe(), statistic, sites))


@functools.lru_cache(maxsize=64)
def _combine(statistic: Statistic):
  combine = lambda a, b: {path: statistic.combine(a[path], b[path]) for path in a}
  return jax.jit(combine, donate_argnums=0)


def _check_finite(step: Step, variables: dict) -> None:
  for keys, value in flat_params(variables).items():
    if not finite(value):
      raise ValueError(
        f"{'/'.join(keys)}: not finite after the step {type(step).__name__}. A dead channel or a "
        "scale of zero is the usual cause; a NaN in the weights before it the other."
      )
