"""One site's float weight into its packed kernel, by the recipe's solver."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.calibration_checks import is_abstract
from jaxquant.kernels import leaves, pack_kernel
from jaxquant.ops.qdot import Operand, quantize_operand
from jaxquant.recipe import Recipe
from jaxquant.rounding import nearest_even, stochastic
from jaxquant.sites import Site
from jaxquant.solvers.rtn import rtn
from jaxquant.tensor import QTensor, unpack


def solve_site(site: Site, weight: jax.Array, statistic: object, recipe: Recipe) -> object:
  """One site's packed kernel; layers and experts are solved one after the other.

  Args:
    site: from `sites`.
    weight: the stored parameter, with its stacked axes.
    statistic: what `calibrate` returned, or None.
    recipe: names the solver.

  Raises:
    ValueError: if the result is not finite.
  """
  layer = dataclasses.replace(site, stack=())
  solved = []
  for at in np.ndindex(site.stack):  # a loop here: one layer in float32 at a time, one compilation
    w = canonical(layer, weight[at] if at else weight)
    kernel = _solve(recipe, site.rule.w, w, jax.tree.map(lambda a, at=at: a[at], statistic))
    if not all(is_abstract(good) or bool(good) for good in _finite(kernel)):
      raise ValueError(
        f"{site.path}{list(at) if at else ''}: the solver "
        f"{getattr(recipe.solve, '__name__', recipe.solve)} failed (NaN). With GPTQ: too few or "
        "constant calibration tokens make H singular; add tokens or damping."
      )
    solved.append(kernel)
  return stacked(solved, site.stack)


def factored(statistic: object, recipe: Recipe, lead: int) -> object:
  """What the solver makes of a statistic once, for all weights that meet these inputs.

  A solver `f` that has `f.factor`, a function (statistic, **options of f) -> value, takes this
  value in place of the statistic (`gptq`); for others nothing happens. The statistic is consumed.

  Args:
    statistic: of one layer, [E..., ...]; nobody else needs it.
    recipe: names the solver.
    lead: how many axes E there are.
  """
  solve = recipe.solve
  factor = getattr(getattr(solve, "func", solve), "factor", None)
  if factor is None or statistic is None:
    return statistic
  return _factored(factor, tuple(getattr(solve, "keywords", {}).items()), lead, statistic)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def _factored(factor: Callable, options: tuple, lead: int, statistic: object) -> object:
  one = functools.partial(factor, **dict(options))
  for _ in range(lead):
    one = functools.partial(jax.lax.map, one)
  return one(statistic)


def learned_kernel(site: Site, weight: jax.Array, variables: dict) -> object:
  """The packed kernel of a site whose rule has learned it (`jaxquant.quantizers`).

  Args:
    site: from `sites`.
    weight: the stored parameter, with its stacked axes.
    variables: with the trained collection "quant".

  Raises:
    ValueError: without that collection.
  """
  found = variables.get("quant", {})
  for name in (*site.path.split("/"), "state"):
    if name not in found:
      raise ValueError(
        f"{site.path}: its rule learns, and the variables hold nothing it has learned: pass "
        "those of the trained state, {'params': ..., 'quant': ...}"
      )
    found = found[name]
  pack = lambda theta, w: pack_kernel(site.rule.learned.kernel(theta, w))
  for _ in site.stack + site.shape[:-2]:
    pack = jax.vmap(pack)
  return jax.jit(pack)(found.get("learned", {}), canonical(site, weight))


def stacked(kernels: list, stack: tuple[int, ...]) -> object:
  """The kernels of all layers as one, [stack..., ...]."""
  join = lambda *a: jnp.stack(a).reshape(*stack, *a[0].shape)
  return jax.tree.map(join, *kernels) if stack else kernels[0]


def canonical(site: Site, weight: jax.Array) -> jax.Array:
  """The stored parameter as float32 [stack..., batch..., K, N], rotated as the site's rule says."""
  bring = site.call.canonical
  for _ in site.stack:
    bring = jax.vmap(bring)
  return quantize_operand(
    bring(weight).astype(jnp.float32), Operand(rotation=site.rule.w.rotation), -2
  )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _solve(recipe: Recipe, operand: Operand, w: jax.Array, statistic: object) -> object:
  """The solver mapped over leading axes, one at a time: memory of one layer."""

  def one(operands: tuple) -> object:
    return pack_kernel(_solver(recipe, operand)(*operands))

  for _ in w.shape[:-2]:
    one = functools.partial(jax.lax.map, one)
  return one((w, statistic))


def _solver(recipe: Recipe, operand: Operand) -> Callable[[jax.Array, object], object]:
  """(w, statistic) -> kernel. Round to nearest is what the rule itself does to a float weight."""
  if recipe.solve is rtn:
    rounding = nearest_even if operand.rounding is stochastic else operand.rounding
    nearest = dataclasses.replace(operand, rounding=rounding, rotation=None)
    return lambda w, _: quantize_operand(w, nearest, -2)
  given = {} if operand.scales is None else {"rule": operand.scales}
  return lambda w, statistic: recipe.solve(w, statistic, operand.fmt, **given)


@jax.jit
def _finite(kernel: object) -> list[jax.Array]:
  """Whether the float arrays of a kernel are finite, and of its QTensors what can say NaN."""
  found = []
  for leaf in leaves(kernel):
    if isinstance(leaf, QTensor):
      q = unpack(leaf)
      found += [q.scale, q.offset, q.data if q.fmt.elem.has_nan else None]
    else:
      found.append(leaf)
  floats = [a for a in jax.tree.leaves(found) if jnp.issubdtype(a.dtype, jnp.floating)]
  return [jnp.isfinite(a.astype(jnp.float32)).all() for a in floats]
