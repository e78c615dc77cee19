"""What is wrong with calibration data, site by site, in words.

Letters: L layers, E experts, M tokens, K channels.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.recipe import Recipe
from jaxquant.sites import Site
from jaxquant.solvers.cholesky import dead_channels, pivots
from jaxquant.statistics import Statistic, Tree

LEAST, MOST = 1e-6, 10.0  # dampings that `least_damping` tries, in steps of ten


class CalibrationWarning(UserWarning):
  """The calibration data say little about a site; the result is sound, but look at the data."""


class Health(NamedTuple):
  """What tells good calibration inputs from bad ones.

  Attributes:
    tokens: int32 [...], rows of x that are not all zero.
    finite: bool [...].
    low: float32 [..., K], least value of each channel.
    high: float32 [..., K], largest value of each channel.
  """

  tokens: jax.Array
  finite: jax.Array
  low: jax.Array
  high: jax.Array


def health(x: jax.Array) -> Health:
  """The Health of x [..., M, K].

  Example:
    >>> import jax.numpy as jnp
    >>> int(health(jnp.array([[0.0, 0.0], [0.0, 1.0]])).tokens)
    1
  """
  x = x.astype(jnp.float32)
  tokens = (x != 0).any(-1).sum(-1, dtype=jnp.int32)
  return Health(tokens, jnp.isfinite(x).all((-2, -1)), x.min(-2), x.max(-2))


def _both(a: Health, b: Health) -> Health:
  low, high = jnp.minimum(a.low, b.low), jnp.maximum(a.high, b.high)
  return Health(a.tokens + b.tokens, a.finite & b.finite, low, high)


HEALTH = Statistic(health, _both)


def checked(
  site: Site,
  found: tuple[Health, Tree] | None,
  recipe: Recipe,
  blame: Callable[[str], str] = lambda path: "",
) -> Tree:
  """A site's statistic, after a look at what it was made from.

  Args:
    site: from `sites`.
    found: its Health and its statistic, [L, E, ...]; None for a site that is only looked up.
    recipe: names statistic and solver.
    blame: path -> which batch was not finite, in words.

  Returns:
    The statistic. Where there are no inputs, at a lookup and for an expert that no token reached,
    it is the one of the identity matrix, under which a solver sees the plain error of the weight.

  Raises:
    ValueError: for inputs that are not finite or all zero.

  Warns:
    CalibrationWarning: experts without tokens, dead channels, constant inputs, fewer tokens than
      channels, a Hessian without full rank.
  """
  if found is None:
    return _spread(_plain(site, recipe.statistic), site)
  seen, value = Health(*(np.asarray(a) for a in found[0])), found[1]
  if not seen.finite.all():
    raise ValueError(
      f"{site.path}: its inputs are not finite on the calibration data{_at(site, ~seen.finite)}"
      f"{blame(site.path)}. Look for a NaN batch, or for an activation that overflows in the float "
      "model."
    )
  if not finite(value):
    raise ValueError(
      f"{site.path}: its statistic is not finite, though its inputs are: sums overflow float32, or "
      "the statistic divides by zero. Look at the size of the inputs."
    )
  empty = seen.tokens == 0
  starved = empty.all(tuple(range(len(site.stack), empty.ndim)))  # all experts of a layer
  if starved.any():
    raise ValueError(
      f"{site.path}: all its inputs are zero on the calibration data{_at(site, starved)}; nothing "
      "can be learned from them. Other data, or a recipe without statistic, can help."
    )
  if empty.any():
    _warn(
      site,
      f"no calibration token came{_at(site, empty)}; {empty.sum()} of {empty.size} are solved "
      "by the plain error of their weights. More or other tokens would reach them",
    )
    value = _where(empty, _plain(site, recipe.statistic), value)
  _inspect(site, seen, ~empty, value, recipe)
  return value


def _inspect(site: Site, seen: Health, live: np.ndarray, value: Tree, recipe: Recipe) -> None:
  """Warns of inputs that say little; `live` [L, E] says where there are any."""
  k, fewest = site.shape[-2], int(seen.tokens[live].min())
  dead = (seen.low == 0) & (seen.high == 0) & live[..., None]
  if dead.any():
    most = int(dead.sum(-1).max())
    channels = np.flatnonzero(dead.reshape(-1, k).any(0))
    _warn(
      site,
      f"{most} of {k} channels are dead, zero for all tokens ({_few(channels)})"
      f"{_at(site, dead.any(-1))}; solvers are free to change their weights",
    )
  constant = (seen.low == seen.high).all(-1) & live & (seen.tokens > 1)
  if constant.any():
    _warn(
      site,
      f"all tokens are the same{_at(site, constant)}; what is learned holds for this input alone",
    )
  squares = [a for a in jax.tree.leaves(value) if a.shape[-2:] == (k, k)]
  if not squares:
    return
  if fewest < k:
    where = _at(site, live & (seen.tokens < k))
    _warn(
      site,
      f"{fewest} calibration tokens for K={k} channels{where}: the Hessian has rank {fewest} at "
      f"most, and damping{_damp(recipe)} decides the rest. Take {k} or more",
    )
    return
  for square in squares:
    least = np.asarray(_least_damping(square.reshape(-1, k, k)))
    if least.max() > 0:
      where = _at(site, least.reshape(live.shape) > 0)
      _warn(
        site,
        f"the Hessian of {fewest} tokens is rank deficient{where}: Cholesky needs a damping of "
        f"{least.max():.0e} of its mean diagonal; damping{_damp(recipe)} decides. Repeated or "
        "low-rank inputs are the usual cause",
      )


def least_damping(hessian: jax.Array) -> jax.Array:
  """The least d in 0, 1e-6, 1e-5 ... 10 that gives H + d mean(diag H) I a usable Cholesky factor.

  Usable: L_kk^2 > sqrt(K) eps H_kk for all k, as `error_feedback` asks; dead channels are left out.

  Args:
    hessian: float32 [K, K].

  Returns:
    float32 scalar; infinity if none is enough.

  Example:
    >>> import jax.numpy as jnp
    >>> float(least_damping(jnp.eye(2))), bool(least_damping(jnp.ones((2, 2))) > 0)
    (0.0, True)
  """
  k = hessian.shape[-1]
  dead, diagonal = dead_channels(hessian), jnp.diagonal(hessian)
  mean = diagonal.sum() / jnp.maximum(k - dead.sum(), 1)
  h = jnp.where(jnp.eye(k, dtype=bool) & dead, 1, hessian / mean)
  floor = np.sqrt(k) * np.finfo(np.float32).eps * jnp.diagonal(h)

  def usable(damp: jax.Array) -> jax.Array:
    return (pivots(h + damp * jnp.eye(k)) ** 2 > floor).all()  # false for NaN

  def step(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    damp = jnp.where(state[0] == 0, LEAST, state[0] * 10)
    return damp, usable(damp)

  again = lambda state: ~state[1] & (state[0] < MOST)
  damp, good = jax.lax.while_loop(again, step, (jnp.float32(0), usable(jnp.float32(0))))
  return jnp.where(good, damp, jnp.inf)


_least_damping = jax.jit(functools.partial(jax.lax.map, least_damping))


def finite(tree: object) -> bool:
  """Whether all float arrays are finite; abstract values (`jax.eval_shape`) count as finite."""
  arrays = [a for a in jax.tree.leaves(tree) if jnp.issubdtype(a.dtype, jnp.floating)]
  return all(is_abstract(a) or bool(_all_finite(a)) for a in arrays)


@jax.jit
def _all_finite(array: jax.Array) -> jax.Array:
  return jnp.isfinite(array).all()


def is_abstract(array: object) -> bool:
  """Whether it has a shape and no values."""
  return isinstance(array, (jax.core.Tracer, jax.ShapeDtypeStruct))


def _plain(site: Site, statistic: Statistic) -> Tree:
  """The statistic of the identity matrix."""
  return statistic(jnp.eye(site.shape[-2]))


def _spread(value: Tree, site: Site) -> Tree:
  lead = (*site.stack, *site.shape[:-2])
  return jax.tree.map(lambda a: jnp.broadcast_to(a, (*lead, *a.shape)), value)


def _where(mask: np.ndarray, plain: Tree, value: Tree) -> Tree:
  pick = lambda a, b: jnp.where(mask.reshape(*mask.shape, *[1] * a.ndim), a, b)
  return jax.tree.map(pick, plain, value)


def _warn(site: Site, text: str) -> None:
  warnings.warn(f"{site.path}: {text}.", CalibrationWarning, stacklevel=2)


def _at(site: Site, mask: np.ndarray) -> str:
  """Where a mask over layers and experts is true; empty for a site of one kernel."""
  if mask.ndim == 0:
    return ""
  both = site.stack and mask.ndim > len(site.stack)
  what = "layer, expert" if both else "layer" if site.stack else "expert"
  return f" in {what} {_few([at[0] if len(at) == 1 else at for at in np.argwhere(mask).tolist()])}"


def _few(items: Sequence) -> str:
  shown = ", ".join(str(item) for item in items[:4])
  return shown + (f" and {len(items) - 4} more" if len(items) > 4 else "")


def _damp(recipe: Recipe) -> str:
  """The solver's damping in words, if it has one."""
  found = inspect.signature(recipe.solve).parameters.get("damp")
  return (
    "" if found is None or found.default is found.empty else f" ({found.default:g} of the mean)"
  )
