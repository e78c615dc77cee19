"""Post-training quantization: calibrate, solve and pack, with few statistics held at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from flax.traverse_util import unflatten_dict
from tqdm import tqdm

from jaxquant.calibration import Cache, calibrate, groups, size_of
from jaxquant.calibration_checks import finite
from jaxquant.donation import check_unshared, consume_all, consume_others
from jaxquant.kernels import is_node, size_bits, to_dense
from jaxquant.model_blocks import attention_statistics, has_blocks
from jaxquant.prepare import prepare
from jaxquant.recipe import Recipe
from jaxquant.sequential import layers_in_order, solve_in_order
from jaxquant.sites import Site, Sites, flat_params, sites
from jaxquant.solving import canonical, learned_kernel, solve_site
from jaxquant.statistics import AttentionStatistic
from jaxquant.tensor import QTensor


def quantize_params(
  model: nn.Module,
  variables: object,
  recipe: Recipe,
  batches: Iterable | None = None,
  *,
  example: object | None = None,
  statistics_bytes: int = 2**26,
  cache: Cache | None = None,
  progress: bool = True,
  donate: bool = False,
) -> dict:
  """The variables with every kernel that the recipe quantizes packed.

  With `recipe.inputs` "float", statistics are those of the float model. They are collected for as
  many sites at a time as `statistics_bytes` holds, one pass over the data each, and dropped when
  the group is solved; the layers of a scanned site come together, [L, ...]. If those of one site
  exceed `statistics_bytes`, or all sites of a loop over layers do, and `blocks_of` knows the model:
  block by block (`jaxquant.sequential`), in one pass. With "quantized" always so, on what the
  quantized blocks before give. Solvers run layer by layer.

  With `donate` the variables are given away, as in `jax.jit(donate_argnums=...)`: each float kernel
  is deleted once it is packed, so that the model is never held twice. The result is the same to the
  bit. At the end every array of `variables["params"]` is deleted that is not itself part of the
  result; using it raises jax's "Array has been deleted". What is wrong with the arguments is said
  before anything is deleted; if calibration or a solver fails later, take all of them as lost.

  Under `jax.eval_shape`, for recipes that do not calibrate, it gives shapes; there are no values
  then, and what is checked of values is not checked.

  Args:
    model: the Linen module.
    variables: float variables; the recipe's steps are applied to them first (`prepare`).
    recipe: steps, rules, solver and statistic.
    batches: calibration inputs, each passed as `model.apply(variables, batch)`; a generator is
      drawn into a list. Needed if the recipe has a statistic.
    example: an input to find the sites with; by default the first batch.
    statistics_bytes: bound on the statistics held at a time (a single site may exceed it).
    cache: keeps statistics of the float model on disk for other recipes (`StatisticsCache`); the
      layers of a scanned site then come together whatever their size.
    progress: show a bar over the sites.
    donate: the variables are consumed; only jax.Arrays can be, not those of numpy.

  Returns:
    Variables of the same structure whose quantized kernels are packed nodes. Sites of a learned
    rule give what they have learned; their parameters for inputs and outputs stay in "quant".

  Raises:
    ValueError: no calibration batch for a solver that needs one; non-finite batches, statistics or
      results, naming the site; a rule that matches nothing; to donate one array under two names.
  """
  batches = list(batches) if batches is not None else []
  if not batches and (recipe.calibrates or example is None):
    raise ValueError(
      f"quantize_params: recipe {recipe.name!r} "
      + ("calibrates: pass batches" if recipe.calibrates else "needs an example input or batches")
    )
  table = sites(model, variables, batches[0] if example is None else example, recipe=recipe)
  flat = flat_params(variables)
  for site in table.quantized():
    _check(site, flat[site.keys])
  del flat
  if donate:
    check_unshared(variables["params"])
  given = jax.tree.leaves(variables["params"]) if donate else []
  if hasattr(recipe.solve, "quantize_params"):  # learns several sites together (jaxquant.blocks)
    packed = recipe.solve.quantize_params(model, variables, recipe, batches, progress=progress)
  else:
    options = {"statistics_bytes": statistics_bytes, "cache": cache, "donate": donate}
    packed = _quantize(model, variables, recipe, batches, table, progress, **options)
  consume_others(given, packed)
  return packed


def _quantize(
  model: nn.Module,
  variables: object,
  recipe: Recipe,
  batches: list,
  table: Sites,
  progress: bool,
  *,
  statistics_bytes: int,
  cache: Cache | None,
  donate: bool,
) -> dict:
  """`quantize_params` for solvers of one site; keeps no float kernel that is packed."""
  variables = prepare(model, variables, recipe, batches, donate=donate)
  flat = flat_params(variables)
  trained = [site for site in table if site.rule.learned is not None]
  for site in trained:
    flat[site.keys] = learned_kernel(site, flat[site.keys], variables)
  todo = [site for site in table.quantized() if site not in trained]
  if isinstance(recipe.statistic, AttentionStatistic):
    found = attention_statistics(model, variables, recipe, batches)
    solved = {s.keys: solve_site(s, flat[s.keys], found[s.path], recipe.at(s.path)) for s in todo}
    return {**variables, "params": unflatten_dict(flat | solved)}
  runs = tuple(groups(todo, recipe.statistic, statistics_bytes))
  in_order = _in_order(model, recipe, runs, statistics_bytes, cache)
  total = layers_in_order(model, table) if in_order else len(todo)
  with tqdm(total=total, desc=recipe.name, unit="site", disable=not progress) as bar:
    if in_order:
      how = {"statistics_bytes": statistics_bytes, "done": bar.update, "donate": donate}
      del flat
      return solve_in_order(model, variables, recipe, batches, table, **how)
    known = cache is not None and recipe.statistic is not None
    find = cache.of(model, variables, batches) if known else None
    spent = []
    for group in runs:
      found = calibrate(model, variables, recipe, batches, group, find=find)
      if group is runs[-1]:  # nothing runs the float model any more
        variables, find = {k: v for k, v in variables.items() if k != "params"}, None
      for site in group:
        spent += [flat[site.keys]] if donate else []
        mine = recipe.at(site.path)
        flat[site.keys] = solve_site(site, flat[site.keys], found.pop(site.path), mine)
        bar.update()
        if group is runs[-1]:
          consume_all(spent)
  return {**variables, "params": unflatten_dict(flat)}


def _in_order(
  model: nn.Module,
  recipe: Recipe,
  runs: Sequence[tuple[Site, ...]],
  budget: int,
  cache: Cache | None,
) -> bool:
  """Whether to go block by block."""
  if recipe.statistic is None:
    return False
  if recipe.inputs == "quantized":
    return True
  scanned = [site for run in runs for site in run if site.stack]
  large = any(size_of(s, recipe.statistic) > budget for s in scanned) if scanned else len(runs) > 1
  return large and cache is None and has_blocks(model)


def _check(site: Site, weight: object) -> None:
  """Raises ValueError for a kernel that cannot be packed as its rule says."""
  if is_node(weight):
    raise ValueError(f"{site.path}: already packed as {site.kernel}; start from float variables")
  if not finite(weight):
    raise ValueError(f"{site.path}: the weight has NaN or infinity; it cannot be quantized")
  rotation = site.rule.w.rotation
  if rotation is not None and (rotation.random or site.shape[-2] % rotation.block):
    raise ValueError(
      f"{site.path}: a packed weight is rotated once and for all, so the rotation of its rule must "
      f"not be random and its block must divide K={site.shape[-2]}; got {rotation}"
    )


@dataclasses.dataclass(frozen=True)
class SiteReport:
  """How one quantized kernel differs from its float original.

  Attributes:
    path: of the site.
    kernel: format or node type.
    bits: per weight, everything included.
    bytes: stored.
    error: relative Frobenius error of the weight, [layers]; of a rotated one in its own basis.
  """

  path: str
  kernel: str
  bits: float
  bytes: int
  error: tuple[float, ...]


def report(
  model: nn.Module, variables: object, packed: object, recipe: Recipe, example: object
) -> list[SiteReport]:
  """Bits and weight error of every packed site.

  Args:
    model: the Linen module.
    variables: float variables.
    packed: from `quantize_params`.
    recipe: that was used.
    example: a model input.
  """
  table = sites(model, variables, example, recipe=recipe)
  before, after = flat_params(variables), flat_params(packed)
  rows = []
  for site in table:
    kernel = after[site.keys]
    if not is_node(kernel):
      continue
    w = canonical(site, before[site.keys]).reshape(-1, *site.shape[-2:])
    error = _relative_error(kernel, w)
    name = str(kernel.fmt) if isinstance(kernel, QTensor) else type(kernel).__name__
    bits = size_bits(kernel)
    rows.append(SiteReport(site.path, name, bits / site.size, bits // 8, tuple(error.tolist())))
  return rows


@jax.jit
def _relative_error(kernel: object, w: jax.Array) -> jax.Array:
  off = jnp.linalg.norm(to_dense(kernel).reshape(w.shape) - w, axis=(-2, -1))
  return off / jnp.maximum(jnp.linalg.norm(w, axis=(-2, -1)), jnp.finfo(w.dtype).tiny)


def size_bytes(variables: object) -> int:
  """Bytes of all parameters as they are stored, packed nodes at their real size."""
  params = meta.unbox(variables["params"])
  total = sum(size_bits(k) for k in jax.tree.leaves(params, is_leaf=is_node))
  return total // 8
