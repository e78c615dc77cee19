"""Calibration and solving block by block, whether their parameters lie apart or stacked [L, ...].

With `Recipe.inputs` "quantized" the inputs of block l come from the quantized blocks before it, the
default of GPTQ, RSQ and DGQ; with "float" from the float blocks. One block's statistics and the
hidden states of all batches are held at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxquant.calibration import IN_FLOAT, Asked, by_input, calibrate, groups, requests
from jaxquant.calibration_checks import checked
from jaxquant.intercept import intercepted, observer
from jaxquant.kernels import is_node
from jaxquant.model_blocks import Blocks, blocks_of
from jaxquant.recipe import Recipe
from jaxquant.sites import Site, Sites, flat_params
from jaxquant.solving import solve_site, stacked
from jaxquant.statistics import Tree, several


def solve_in_order(
  model: nn.Module,
  variables: dict,
  recipe: Recipe,
  batches: Sequence,
  table: Sites,
  *,
  statistics_bytes: int,
  done: Callable[[], object],
) -> dict:
  """The variables with every kernel that the recipe quantizes packed, block after block.

  Within a block all statistics are those of its float weights. Sites before the blocks are solved
  first, on float inputs; those behind them last, on the outputs of the blocks.

  Args:
    model: with `blocks_of` registered.
    variables: float variables, prepared.
    recipe: rules, solver and statistic.
    batches: calibration inputs.
    table: from `sites`.
    statistics_bytes: bound on the statistics held at a time.
    done: called once for every site (every layer of a site counts, if layers are stacked).

  Raises:
    ValueError: a model without blocks; what `checked` and `solve_site` raise, naming the block.
  """
  blocks = blocks_of(model)
  within = {s.path: _block_of(s, blocks) for s in table}
  first = next(i for i, s in enumerate(table) if within[s.path])
  outside = [s for s in table.quantized() if not within[s.path]]
  early = {s.path for s in table.sites[:first]}

  in_float = recipe.inputs == "float"
  running = IN_FLOAT if in_float else recipe

  def solve_outside(packed: dict, todo: list[Site]) -> dict:
    flat = flat_params(packed)
    source = variables if in_float else packed
    for group in groups(todo, recipe.statistic, statistics_bytes):
      found = calibrate(model, source, recipe, batches, group, running=running)
      for site in group:
        mine = recipe.at(site.path)
        flat[site.keys] = solve_site(site, flat[site.keys], found.pop(site.path), mine)
        done()
    return {**packed, "params": unflatten_dict(flat)}

  packed = solve_outside(variables, [s for s in outside if s.path in early])
  run = _Run(model, blocks, recipe, running, statistics_bytes)
  mine = {name: _inside(table.quantized(), within, name, blocks) for name in set(blocks.names)}
  hidden = [run.begin(variables if in_float else packed, batch) for batch in batches]
  solved: dict[str, list] = {name: [] for name in blocks.names}
  for i, name in enumerate(blocks.names):
    after = run.solve(i, blocks.take(variables["params"], i), mine[name], hidden, done)
    solved[name].append({keys: a for keys, a in _flat(after).items() if keys in mine[name]})
    if not (in_float and mine[name]):  # else they moved on while statistics were collected
      hidden[:] = [run.advance(name, after, h) for h in hidden]
  params = {**packed["params"], **_joined(variables["params"], solved, blocks)}
  return solve_outside({**packed, "params": params}, [s for s in outside if s.path not in early])


def layers_in_order(model: nn.Module, table: Sites) -> int:
  """How many sites `solve_in_order` solves: layers of stacked blocks one by one."""
  blocks = blocks_of(model)
  lengths = {name: blocks.names.count(name) for name in blocks.names}
  return sum(lengths.get(_block_of(site, blocks), 1) for site in table.quantized())


def _block_of(site: Site, blocks: Blocks) -> str | None:
  return next((name for name in blocks.names if site.path.startswith(f"{name}/")), None)


def _inside(
  todo: Sequence[Site], within: dict[str, str | None], name: str, blocks: Blocks
) -> dict[tuple[str, ...], Site]:
  """Sites of one block by their keys below it, without the axis of stacked layers."""
  depth, lead = len(name.split("/")), 1 if blocks.stacked else 0
  return {
    s.keys[depth:]: dataclasses.replace(s, stack=s.stack[lead:])
    for s in todo
    if within[s.path] == name
  }


def _joined(params: dict, packed: dict[str, list], blocks: Blocks) -> dict:
  """{block name: its parameters with the packed kernels}, stacked again if they were."""
  found = {}
  for name, parts in packed.items():
    stack = (len(parts),) if blocks.stacked else ()
    new = {keys: stacked([part[keys] for part in parts], stack) for keys in parts[0]}
    found[name] = unflatten_dict(_flat(params[name]) | new)
  return found


def _flat(params: dict) -> dict:
  return flatten_dict(params, is_leaf=lambda _, a: is_node(a))


class _Run:
  """The functions of `solve_in_order` for one model and recipe, compiled once per block name."""

  def __init__(
    self, model: nn.Module, blocks: Blocks, recipe: Recipe, running: Recipe, budget: int
  ) -> None:
    self.model, self.blocks, self.recipe, self.running = model, blocks, recipe, running
    self.budget = budget
    self.begin = jax.jit(self._begin)
    self.advance = jax.jit(self._advance, static_argnums=0)
    self.look = jax.jit(self._look, static_argnums=(0, 1, 2), donate_argnums=5)

  def _begin(self, variables: dict, batch: object) -> jax.Array:
    with intercepted(self.running):
      return self.blocks.begin(variables, batch)

  def _advance(self, name: str, params: dict, h: jax.Array) -> jax.Array:
    with intercepted(self.running):
      return self.blocks.run(name, params, h)

  def _look(
    self, name: str, asked: Asked, onward: bool, params: dict, h: jax.Array, total: dict | None
  ) -> tuple[dict[str, Tree], jax.Array | None]:
    """The partial results of one batch added to `total`; `onward`: what the float block puts out.

    Where the output is not wanted, the compiler drops what lies behind the last site.
    """
    each = {path: several(*statistics) for path, statistics in asked}
    found = dict(total or {})

    def put(module: nn.Module, path: str, statistic: object, value: Tree) -> None:
      del module
      found[path] = statistic.combine(found[path], value) if path in found else value

    with intercepted(IN_FLOAT, observer(each.get, put)):
      h = self.blocks.run(name, params, h)
    return found, h if onward else None

  def gather(
    self, name: str, params: dict, hidden: list, asked: Asked, onward: bool
  ) -> dict[str, Tree]:
    """Finished statistics of one float block; `onward`: hidden becomes what the block puts out."""
    total = None
    for at, h in enumerate(hidden):
      try:
        total, h = self.look(name, asked, onward, params, h, total)
      except jax.errors.UnexpectedTracerError as error:
        raise ValueError(
          f"{name}: statistics do not get out of a transform inside this block (nn.scan, nn.remat, "
          "nn.vmap); give `blocks_of` a `run` without it, or use Recipe(inputs='float') and more "
          "statistics_bytes"
        ) from error
      hidden[at] = h if onward else hidden[at]
    return {path: several(*each).finish(total.pop(path)) for path, each in asked if path in total}

  def solve(
    self, i: int, params: dict, mine: dict, hidden: list, done: Callable[[], object]
  ) -> dict:
    """Block i with packed kernels; with float inputs, `hidden` moves on to the next block's.

    The caller keeps no reference to `params`: each weight is freed when it is solved.
    """
    name, flat = self.blocks.names[i], _flat(params)
    keys_of = {site.path: keys for keys, site in mine.items()}
    runs = tuple(groups(tuple(mine.values()), self.recipe.statistic, self.budget))
    for group in runs:
      together = by_input(self.model, group)
      asked = tuple(requests(self.recipe, [first for first, *_ in together]).items())
      onward = self.recipe.inputs == "float" and group is runs[-1]
      found = self.gather(name, params, hidden, asked, onward)
      if group is runs[-1]:
        params = None
      for first, *others in together:
        named = lambda site: dataclasses.replace(site, path=f"{site.path} (block {i})")
        value = checked(named(first), found.pop(first.path, None), self.recipe)
        for site in (first, *others):
          keys = keys_of[site.path]
          mine = self.recipe.at(site.path)
          flat[keys] = solve_site(named(site), flat.pop(keys), value, mine)
          done()
    return unflatten_dict(flat)
