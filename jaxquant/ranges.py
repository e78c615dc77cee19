"""Static ranges of activations: found on calibration data, kept beside the weights.

A rule asks for them (`Operand(fmt, Static())`), `prepare` and so `quantize_params` find them, and
every path reads them in the collection "quant": fake quantization, packed weights and decode.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxquant.calibration import gather
from jaxquant.calibration_checks import CalibrationWarning
from jaxquant.intercept import rotated
from jaxquant.recipe import Recipe
from jaxquant.sites import Site, sites
from jaxquant.state import STATE, merge
from jaxquant.statistics import AMAX


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
  table = sites(model, variables, batches[0], recipe=recipe)
  static = {s.path: s for s in table if s.rule.is_static and set(s.kinds) != {"lookup"}}
  wanted = {path: (rotated(AMAX, s.rule.x.rotation),) for path, s in static.items()}
  flat = {}
  for path, (seen,) in gather(model, variables, batches, wanted).items():
    a = _checked(static[path], seen.max(-1))
    entry = {"x": {"amax": a, "seen": jnp.zeros_like(a)}, "clock": jnp.zeros(a.shape, jnp.int32)}
    at = (*(path.split("/") if path else ()), STATE)
    flat |= {(*at, *keys): leaf for keys, leaf in flatten_dict(entry).items()}
  return {**variables, "quant": merge(variables.get("quant", {}), unflatten_dict(flat))}


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
