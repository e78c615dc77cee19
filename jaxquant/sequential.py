"""Calibration and solving block by block, whether their parameters lie apart or stacked [L, ...].

With `Recipe.inputs` "quantized" the inputs of block l come from the quantized blocks before it, the
default of GPTQ, RSQ and DGQ; with "float" from the float blocks. One block's statistics and the
hidden states of all batches are held at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import flax.linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxquant.calibration import IN_FLOAT, Walk, by_input, calibrate, groups, requests, walk_of
from jaxquant.calibration_checks import checked
from jaxquant.donation import consume_all
from jaxquant.kernels import is_node
from jaxquant.model_blocks import Blocks, blocks_of
from jaxquant.recipe import Recipe
from jaxquant.sites import Site, Sites, flat_params
from jaxquant.solving import factored, solve_site, stacked
from jaxquant.state import without_state


def solve_in_order(
  model: nn.Module,
  variables: dict,
  recipe: Recipe,
  batches: Sequence,
  table: Sites,
  *,
  statistics_bytes: int,
  done: Callable[[], object],
  donate: bool = False,
) -> dict:
  """The variables with every kernel that the recipe quantizes packed, block after block.

  Within a block all statistics are those of its float weights. With float inputs the sites outside
  the blocks are solved first; with quantized ones, those behind the blocks last, on their outputs.

  Args:
    model: with `blocks_of` registered.
    variables: float variables, prepared.
    recipe: rules, solver and statistic.
    batches: calibration inputs.
    table: from `sites`.
    statistics_bytes: bound on the statistics held at a time.
    done: called once for every site (every layer of a site counts, if layers are stacked).
    donate: kernels that are packed are deleted then, stacks of them when they are taken apart.

  Raises:
    ValueError: a model without blocks; what `checked` and `solve_site` raise, naming the block.
  """
  blocks = blocks_of(model)
  within = {s.path: _block_of(s, blocks) for s in table}
  first = next(i for i, s in enumerate(table) if within[s.path])
  outside = [s for s in table.quantized() if not within[s.path]]
  early = {s.path for s in table.sites[:first]}

  in_float = recipe.inputs == "float"
  running = IN_FLOAT if in_float else without_state(recipe, static=False)  # blocks have no state
  run = _Run(walk_of(model, running), recipe, statistics_bytes)

  def solve_outside(packed: dict, todo: list[Site]) -> dict:
    flat, spent = flat_params(packed), []
    for group in groups(todo, recipe.statistic, statistics_bytes):
      found = calibrate(model, packed, recipe, batches, group, running=run.walk.running)
      for site in group:
        spent.append(flat[site.keys])
        mine = recipe.at(site.path)
        flat[site.keys] = solve_site(site, flat[site.keys], found.pop(site.path), mine)
        done()
    if donate:
      consume_all(spent)
    return {**packed, "params": unflatten_dict(flat)}

  hidden = [run.walk.begin(variables, batch) for batch in batches] if in_float else []
  packed = solve_outside(variables, [s for s in outside if in_float or s.path in early])
  if not in_float:
    hidden = [run.walk.begin(packed, batch) for batch in batches]
  params = packed["params"]
  mine = {name: _inside(table.quantized(), within, name, blocks) for name in set(blocks.names)}
  each = blocks.one_by_one(params, mine[blocks.names[0]] if donate else ())
  solved: dict[str, list] = {name: [] for name in blocks.names}
  for i, name in enumerate(blocks.names):
    after = run.solve(i, next(each), mine[name], hidden, done, donate)
    solved[name].append({keys: a for keys, a in _flat(after).items() if keys in mine[name]})
    if not (in_float and mine[name]):  # else they moved on while statistics were collected
      hidden[:] = [run.walk.advance(name, after, h) for h in hidden]
  packed = {**packed, "params": {**params, **_joined(params, solved, blocks)}}
  late = [] if in_float else [s for s in outside if s.path not in early]
  return solve_outside(packed, late) if late else packed


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
  """`solve_in_order` for one model and recipe."""

  def __init__(self, walk: Walk, recipe: Recipe, budget: int) -> None:
    self.walk, self.recipe, self.budget = walk, recipe, budget

  def solve(
    self,
    i: int,
    params: dict,
    mine: dict,
    hidden: list,
    done: Callable[[], object],
    donate: bool,
  ) -> dict:
    """Block i with packed kernels; with float inputs, `hidden` moves on to the next block's.

    The caller keeps no reference to `params`: each weight is freed when it is solved, if no later
    group of statistics needs it; what the caller's caller holds too, only if it is donated.
    """
    name, flat = self.walk.blocks.names[i], _flat(params)
    keys_of = {site.path: keys for keys, site in mine.items()}
    runs = tuple(groups(tuple(mine.values()), self.recipe.statistic, self.budget))
    spent = []
    for group in runs:
      together = by_input(self.walk.model, group)
      asked = tuple(requests(self.recipe, [first for first, *_ in together]).items())
      onward = self.recipe.inputs == "float" and group is runs[-1]
      found = self.walk.gather(name, params, hidden, asked, onward)
      if group is runs[-1]:
        params = None
        consume_all(spent)
      for first, *others in together:
        named = lambda site: dataclasses.replace(site, path=f"{site.path} (block {i})")
        value = checked(named(first), found.pop(first.path, None), self.recipe)
        solvers = {self.recipe.at(site.path) for site in (first, *others)}
        if len(solvers) == 1:
          value = factored(value, *solvers, len(first.shape) - 2)
        for site in (first, *others):
          keys = keys_of[site.path]
          spent += [flat[keys]] if donate else []
          flat[keys] = solve_site(named(site), flat[keys], value, self.recipe.at(site.path))
          done()
        if params is None:
          consume_all(spent)
    return unflatten_dict(flat)
