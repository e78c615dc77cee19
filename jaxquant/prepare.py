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
from flax.core import meta
from flax.traverse_util import flatten_dict

from jaxquant.calibration import walk_of
from jaxquant.calibration_checks import finite
from jaxquant.donation import consume_others
from jaxquant.graph import Graph, check, graph_of, matrix
from jaxquant.intercept import collect
from jaxquant.model_blocks import Blocks, blocks_of, has_blocks
from jaxquant.ranges import with_ranges
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
    donate: whether a step may consume the variables it gets.
  """

  model: nn.Module
  graph: Graph
  recipe: Recipe
  batches: tuple
  donate: bool = False

  def quantized(self, site: str) -> bool:
    """Whether the recipe gives a site's weight or input a format."""
    rule = self.recipe.rule(site)
    return rule.w.fmt is not None or rule.x.fmt is not None


class Step(Protocol):
  """A change of the weights that keeps the function; a frozen, hashable value.

  Attributes:
    statistic: what it needs of the inputs at its sites; None: nothing.
    local: True if what `apply` does to a block of the model needs this block's variables and
      statistics alone; large statistics are then held for one block at a time. May be left out.
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
  model: nn.Module,
  variables: object,
  recipe: Recipe,
  batches: Iterable | None = None,
  *,
  donate: bool = False,
) -> dict:
  """The variables after the recipe's steps: another parameterization of the same function.

  Args:
    model: the Linen module.
    variables: float variables.
    recipe: names the steps, and rules with static ranges of x (`jaxquant.ranges`), which are found
      last; without any, the variables come back as they are.
    batches: calibration inputs, each passed as `model.apply(variables, batch)`.
    donate: the variables are consumed: what a step replaces is deleted.

  Returns:
    Float variables of the same structure; static ranges under "quant".

  Raises:
    ValueError: steps and a model without graph; what calibrates and no batch; inputs or results
      that are not finite, naming the step and the site.

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
  batches = () if batches is None else tuple(batches)
  if recipe.prepare:
    graph = graph_of(model)
    check(graph, variables)
    variables = _stepped(variables, Context(model, graph, recipe, batches, donate))
  return with_ranges(model, variables, recipe, batches)


def _stepped(variables: dict, context: Context) -> dict:
  """The variables after all steps."""
  for step in context.recipe.prepare:
    before = jax.tree.leaves(variables) if context.donate else ()
    variables = _applied(step, variables, context)
    consume_others(before, variables)
    _check_finite(step, variables)
  return variables


def _applied(step: Step, variables: dict, context: Context) -> dict:
  """The variables after one step."""
  if step.statistic is None:
    return step.apply(variables, context, {})
  if not context.batches:
    raise ValueError(
      f"{context.recipe.name}: its step {type(step).__name__} calibrates: pass batches"
    )
  todo = tuple(_groups(step, context, variables))
  if len(todo) > 1 and getattr(step, "local", False) and has_blocks(context.model):
    blocks = blocks_of(context.model)
    below = tuple(f"{name}/" for name in blocks.names)
    inside = tuple(s for group in todo for s in group if s.startswith(below))
    variables = _block_by_block(step, variables, context, blocks, inside)
    todo = tuple(tuple(s for s in group if s not in inside) for group in todo)
  for group in filter(None, todo):
    variables = step.apply(variables, context, statistics(step, context, variables, group))
  return variables


def _block_by_block(
  step: Step, variables: dict, context: Context, blocks: Blocks, inside: tuple[str, ...]
) -> dict:
  """A local step on one block after the other; all statistics are those of the model before it."""
  walk, params = walk_of(context.model), meta.unbox(variables["params"])
  hidden = [walk.begin(variables, batch) for batch in context.batches]
  everything = {keys for name in blocks.names for keys in flatten_dict(params[name])}
  each = blocks.one_by_one(params, everything if context.donate else ())
  # Layers that were cut out of a stack are nobody else's.
  context = dataclasses.replace(context, donate=context.donate or blocks.stacked)
  done: dict[str, list] = {name: [] for name in blocks.names}
  for i, name in enumerate(blocks.names):
    block = {"params": {name: next(each)}}
    asked = tuple((s, (step.statistic,)) for s in inside if s.startswith(f"{name}/"))
    found = walk.gather(name, block["params"][name], hidden, asked, onward=True)
    block = step.apply(block, context, _checked(step, found, f" (block {i})"))
    done[name].append(block["params"].pop(name))
  return {**variables, "params": {**params, **blocks.joined(done)}}


def _checked(step: Step, found: dict[str, tuple[Tree]], where: str = "") -> dict[str, Tree]:
  """The statistics of a step, taken out of `found` so that nothing else holds them."""
  stats = {path: found.pop(path)[0] for path in tuple(found)}
  for path, value in stats.items():
    if not finite(value):
      raise ValueError(
        f"{path}{where}: its inputs are not finite on the calibration data (step "
        f"{type(step).__name__}). Look for a NaN batch, or for an activation that overflows in the "
        "float model."
      )
  return stats


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
    ValueError: for a statistic that is not finite, naming the site.
  """
  statistic = step.statistic
  run = _collector(context.model, statistic, frozenset(sites))
  batches = (run(variables, batch) for batch in context.batches)
  partial = functools.reduce(_combine(statistic), batches)
  return _checked(step, {path: (statistic.finish(value),) for path, value in partial.items()})


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
