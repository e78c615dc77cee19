"""Static ranges of activations: found on calibration data, kept beside the weights.

A rule asks for them (`Operand(fmt, Static())`), `prepare` and so `quantize_params` find them, and
every path reads them in the collection "quant": fake quantization, packed weights and decode.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxquant.calibration_checks import CalibrationWarning
from jaxquant.intercept import collect_each, rotated
from jaxquant.recipe import Recipe
from jaxquant.sites import Site, sites
from jaxquant.state import STATE, merge
from jaxquant.statistics import AMAX, Statistic


def with_ranges(model: nn.Module, variables: dict, recipe: Recipe, batches: Sequence) -> dict:
  """The variables with A = max |x| of every site whose rule is static, over all batches.

  Args:
    model: the Linen module.
    variables: float variables; they run in float meanwhile.
    recipe: without a static rule the variables come back as they are.
    batches: calibration inputs.

  Returns:
    The variables; "quant" has float32 [layers..., experts...] at every such site.

  Raises:
    ValueError: no batch; inputs that are not finite, or all zero, naming the site.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxquant as jq
    >>> from jaxquant.ops.tracked import Static
    >>> model, x = nn.Dense(2, name="fc"), jnp.array([[1.0, -4.0]])
    >>> rule = jq.Rule(x=jq.Operand(jq.formats.INT8_TENSOR, Static()))
    >>> variables = model.init(jax.random.key(0), x)
    >>> found = with_ranges(model, variables, jq.Recipe(((".*", rule),)), [x])
    >>> float(found["quant"]["state"]["x"]["amax"])
    4.0
  """
  if not any(rule.is_static for _, rule in recipe.rules):
    return variables
  if not batches:
    raise ValueError(f"{recipe.name}: static ranges come from calibration data: pass batches")
  run, flat = _collector(model, recipe), {}
  found = functools.reduce(_larger, (run(variables, batch) for batch in batches))
  usable = lambda a: bool(((a > 0) & jnp.isfinite(a)).all())
  if not all(map(usable, found.values())):  # only then, because a table takes time to trace
    table = sites(model, variables, batches[0], recipe=recipe)
    found = {path: _checked(table[path], a) for path, a in found.items()}
  for path, a in found.items():
    entry = {"x": {"amax": a, "seen": jnp.zeros_like(a)}, "clock": jnp.zeros(a.shape, jnp.int32)}
    at = (*(path.split("/") if path else ()), STATE)
    flat |= {(*at, *keys): leaf for keys, leaf in flatten_dict(entry).items()}
  return {**variables, "quant": merge(variables.get("quant", {}), unflatten_dict(flat))}


@jax.jit
def _larger(a: dict[str, jax.Array], b: dict[str, jax.Array]) -> dict[str, jax.Array]:
  return {path: jnp.maximum(a[path], b[path]) for path in a}


def _collector(model: nn.Module, recipe: Recipe) -> Callable:
  """(variables, batch) -> {path: A}, compiled once unless a field of the model has no hash."""
  try:
    return _cached_collector(model, recipe)
  except TypeError:
    return _cached_collector.__wrapped__(model, recipe)


@functools.lru_cache(maxsize=16)
def _cached_collector(model: nn.Module, recipe: Recipe) -> Callable:
  def chosen(path: str) -> Statistic | None:
    rule = recipe.rule(path)
    return rotated(AMAX, rule.x.rotation) if rule.is_static else None

  run = collect_each(model, Recipe(), chosen)
  return jax.jit(lambda *args: {path: a.max(-1) for path, a in run(*args).items()})


def _checked(site: Site, a: jax.Array) -> jax.Array:
  """Ranges that can be used; an expert without tokens gets the largest of its layer's others."""
  each = np.asarray(a).reshape(*a.shape[: len(site.stack)], -1)  # [layers..., experts]
  if not np.isfinite(each).all():
    raise ValueError(
      f"{site.path}: its inputs are not finite on the calibration data, so they have no range. "
      "Look for a NaN batch, or for an activation that overflows in the float model."
    )
  if not each.any(-1).all():
    raise ValueError(
      f"{site.path}: all its inputs are zero on the calibration data; a static range of zero would "
      "make every later input zero. Take other data, or dynamic scales."
    )
  empty = int((each == 0).sum())
  if empty:
    warnings.warn(
      f"{site.path}: no calibration token came to {empty} of {each.size} experts; they get the "
      "largest range of the others. More or other tokens would reach them.",
      CalibrationWarning,
      stacklevel=2,
    )
  return jnp.asarray(np.where(each > 0, each, each.max(-1, keepdims=True)).reshape(a.shape))
