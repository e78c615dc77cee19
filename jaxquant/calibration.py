"""Calibration: statistics of the inputs of many sites, several of each in one pass.

Letters: L layers, E experts, M tokens, K channels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxquant.calibration_checks import HEALTH, checked
from jaxquant.graph import graph_of
from jaxquant.intercept import collect_each, intercepted, observer, rotated
from jaxquant.model_blocks import blocks_of
from jaxquant.recipe import Recipe
from jaxquant.sites import Site
from jaxquant.statistics import Statistic, Tree, several

Wanted = Mapping[str, tuple[Statistic, ...]]  # by path
IN_FLOAT = Recipe()


Find = Callable[[Wanted], dict[str, tuple[Tree, ...]]]


class Cache(Protocol):
  """Keeps statistics between calls; `jaxquant.statistics_cache` is one."""

  def of(self, model: nn.Module, variables: object, batches: Sequence) -> Find:
    """`gather` for a float model and its data, which remembers."""
    ...


def groups(
  todo: Sequence[Site], statistic: Statistic | None, budget: int
) -> Iterator[tuple[Site, ...]]:
  """Runs of sites whose statistics together stay below the budget; at least one site each.

  Args:
    todo: sites in the order they are solved in.
    statistic: of each; None takes no room.
    budget: bytes.
  """
  group: list[Site] = []
  held = 0
  for site in todo:
    size = 0 if statistic is None else size_of(site, statistic)
    if group and held + size > budget:
      yield tuple(group)
      group, held = [], 0
    group.append(site)
    held += size
  if group:
    yield tuple(group)


def expected(site: Site, of: Callable[[jax.Array], Tree]) -> Tree:
  """ShapeDtypeStructs [L, E, ...] of a function of a site's inputs x [M, K]."""
  x = jax.ShapeDtypeStruct((*site.stack, *site.shape[:-2], 1, site.shape[-2]), jnp.float32)
  for _ in x.shape[:-2]:
    of = jax.vmap(of)
  return jax.eval_shape(of, x)


def size_of(site: Site, statistic: Statistic) -> int:
  """Bytes of a site's statistic, all layers."""
  arrays = jax.tree.leaves(expected(site, statistic.of))
  return sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays)


def by_input(model: nn.Module, group: Sequence[Site]) -> tuple[tuple[Site, ...], ...]:
  """The sites of a group, those together that read the same x in the same basis.

  The model's graph says so (readers of one norm: q, k and v; gate and up); without one, and for
  kernels of other experts or channels, each site is alone.
  """
  known = graph_of.dispatch(type(model)) is not graph_of.dispatch(object)
  norms = graph_of(model).norms if known else ()
  source = {reader.site: norm.site for norm in norms for reader in norm.readers}
  found: dict[tuple, list[Site]] = {}
  for site in group:
    seen_as = (source.get(site.path, site.path), site.rule.x.rotation, site.stack, site.shape[:-1])
    found.setdefault(seen_as, []).append(site)
  return tuple(map(tuple, found.values()))


def requests(recipe: Recipe, group: Sequence[Site]) -> dict[str, tuple[Statistic, ...]]:
  """What a recipe wants to know of some sites: {path: (HEALTH, its statistic)}.

  A site that is only looked up has no input x and is not asked.
  """
  both = (HEALTH, recipe.statistic)
  used = [site for site in group if set(site.kinds) != {"lookup"}]
  return {site.path: tuple(rotated(s, site.rule.x.rotation) for s in both) for site in used}


def calibrate(
  model: nn.Module,
  variables: object,
  recipe: Recipe,
  batches: Sequence,
  group: Sequence[Site],
  *,
  running: Recipe = IN_FLOAT,
  find: Find | None = None,
) -> dict[str, Tree]:
  """The recipe's statistic of some sites over all batches; one pass over the data.

  Args:
    model: the Linen module.
    variables: float variables.
    recipe: names the statistic.
    batches: calibration inputs.
    group: the sites.
    running: how the model runs meanwhile; by default in float.
    find: where statistics come from, if not from `gather`.

  Returns:
    {path: statistic}, stacked over the layers of a scanned site, as `checked` returns it, one
    object for all sites that read the same x; None for a recipe without statistic.

  Raises:
    ValueError: for inputs that are not finite or all zero, naming the site.
  """
  if recipe.statistic is None:
    return {site.path: None for site in group}
  together = by_input(model, group)
  wanted = requests(recipe, [first for first, *_ in together])
  if find is None:
    found = gather(model, variables, batches, wanted, running=running)
  else:
    found = find(wanted)

  def blame(path: str) -> str:
    run = _collector(model, running, ((path, (HEALTH,)),))
    finite = (bool(run(variables, batch)[path][0].finite.all()) for batch in batches)
    return next((f" (first in batch {i})" for i, good in enumerate(finite) if not good), "")

  values = {}
  for first, *others in together:
    value = checked(first, found.pop(first.path, None), recipe, blame)
    values |= {site.path: value for site in (first, *others)}
  return values


def gather(
  model: nn.Module,
  variables: object,
  batches: Sequence,
  wanted: Wanted,
  *,
  running: Recipe = IN_FLOAT,
) -> dict[str, tuple[Tree, ...]]:
  """Finished statistics of the inputs at some sites over all batches; one pass over the data.

  Args:
    model: the Linen module.
    variables: float variables.
    batches: each passed as `model.apply(variables, batch)`.
    wanted: statistics of each path.
    running: how the model runs meanwhile.

  Returns:
    {path: its statistics}, stacked over the layers of a scanned site.
  """
  if not wanted:
    return {}
  run = _collector(model, running, tuple(wanted.items()))
  return accumulate(wanted, (run(variables, batch) for batch in batches))


def accumulate(wanted: Wanted, partials: Iterator[dict[str, Tree]]) -> dict[str, tuple[Tree, ...]]:
  """Finished statistics from the partial results of each batch; two of them are held at a time."""
  total = functools.reduce(_combine(tuple(wanted.items())), partials)
  return {path: several(*wanted[path]).finish(total.pop(path)) for path in list(total)}


def walk_of(model: nn.Module, running: Recipe = IN_FLOAT) -> Walk:
  """The Walk of a model, one object unless an array among the model's fields has no hash."""
  try:
    return _cached_walk(model, running)
  except TypeError:
    return Walk(model, running)


Asked = tuple[tuple[str, tuple[Statistic, ...]], ...]  # a hashable Wanted


class Walk:
  """The blocks of a model one after the other, and statistics of the inputs inside.

  One block's statistics and the hidden states of all batches are held at a time; no sum is held
  twice. Compiled once per block name, and kept by `walk_of`.

  Args:
    model: with `blocks_of` registered.
    running: how blocks run in `begin` and `advance`; statistics are those of float blocks.
  """

  def __init__(self, model: nn.Module, running: Recipe) -> None:
    self.model, self.blocks, self.running = model, blocks_of(model), running
    self.begin = jax.jit(self._begin)
    self.advance = jax.jit(self._advance, static_argnums=0)
    self._look = jax.jit(self._looked, static_argnums=(0, 1, 2), donate_argnums=5)

  def _begin(self, variables: dict, batch: object) -> jax.Array:
    with intercepted(self.running):
      return self.blocks.begin(variables, batch)

  def _advance(self, name: str, params: dict, h: jax.Array) -> jax.Array:
    with intercepted(self.running):
      return self.blocks.run(name, params, h)

  def _looked(
    self, name: str, asked: Asked, onward: bool, params: dict, h: jax.Array, total: dict | None
  ) -> tuple[dict[str, Tree], jax.Array | None]:
    """The partial results with one batch more; `onward`: what the float block puts out.

    Where the output is not wanted, the compiler drops what lies behind the last site.
    """
    each = {path: several(*statistics) for path, statistics in asked}
    found = dict(total or {})

    def put(module: nn.Module, path: str, more: Callable[[Tree | None], Tree]) -> None:
      del module
      found[path] = more(found.get(path))

    with intercepted(IN_FLOAT, observer(each.get, put)):
      h = self.blocks.run(name, params, h)
    return found, h if onward else None

  def gather(
    self, name: str, params: dict, hidden: list, asked: Asked, onward: bool
  ) -> dict[str, tuple[Tree, ...]]:
    """Finished statistics of one float block; `onward`: hidden becomes what the block puts out.

    Raises:
      ValueError: for a transform inside the block that lets no statistic out.
    """
    total = None
    for at, h in enumerate(hidden):
      try:
        total, h = self._look(name, asked, onward, params, h, total)
      except jax.errors.UnexpectedTracerError as error:
        raise ValueError(
          f"{name}: statistics do not get out of a transform inside this block (nn.scan, nn.remat, "
          "nn.vmap); give `blocks_of` a `run` without it, or use Recipe(inputs='float') and more "
          "statistics_bytes"
        ) from error
      hidden[at] = h if onward else hidden[at]
    return {path: several(*each).finish(total.pop(path)) for path, each in asked if path in total}


@functools.lru_cache(maxsize=16)
def _cached_walk(model: nn.Module, running: Recipe) -> Walk:
  return Walk(model, running)


@functools.lru_cache(maxsize=64)
def _combine(asked: Asked) -> Callable:
  each = {path: several(*statistics) for path, statistics in asked}
  combine = lambda a, b: {path: each[path].combine(a[path], b[path]) for path in a}
  return jax.jit(combine, donate_argnums=0)


def _collector(model: nn.Module, running: Recipe, asked: Asked) -> Callable:
  """`collect_each`, compiled once unless an array among the model's fields has no hash."""
  try:
    return _cached_collector(model, running, asked)
  except TypeError:
    return _cached_collector.__wrapped__(model, running, asked)


@functools.lru_cache(maxsize=64)
def _cached_collector(model: nn.Module, running: Recipe, asked: Asked) -> Callable:
  each = {path: several(*statistics) for path, statistics in asked}
  return jax.jit(collect_each(model, running, each.get))
