"""The table of sites: what a recipe will do to a model, before it runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import flax.linen as nn
import jax
from flax import core
from flax.core import meta
from flax.traverse_util import flatten_dict

from jaxquant.contraction import Contraction
from jaxquant.intercept import Seen, explain_site, intercepted
from jaxquant.kernels import is_node, to_dense
from jaxquant.ops.qdot import FLOAT, Rule
from jaxquant.recipe import Recipe
from jaxquant.tensor import QTensor


@dataclasses.dataclass(frozen=True)
class Site:
  """One kernel of the model and what it gets.

  Attributes:
    path: module path, "layers/mlp/up".
    param: name of the kernel below the path.
    kinds: how it is used: dense, einsum, conv3x3, lookup, attend ...
    stack: leading axes of the stored parameter (layers under scan).
    shape: canonical [..., K, N] of one layer; axes before K are experts or groups.
    rule: what it gets.
    match: index of the recipe's rule, None if none matched.
    kernel: "float" or what the parameter already is.
    how: which implementation runs, and why; one per kind, separated by "; ".
    call: the contraction, for `canonical`.
  """

  path: str
  param: str
  kinds: tuple[str, ...]
  stack: tuple[int, ...]
  shape: tuple[int, ...]
  rule: Rule
  match: int | None
  kernel: str
  how: str
  call: Contraction = dataclasses.field(repr=False)

  @property
  def keys(self) -> tuple[str, ...]:
    """Where the kernel lies in the params dict."""
    return (*(self.path.split("/") if self.path else ()), self.param)

  @property
  def size(self) -> int:
    """Weights in it, all layers."""
    total = 1
    for n in (*self.stack, *self.shape):
      total *= n
    return total


@dataclasses.dataclass(frozen=True)
class Sites:
  """All sites of a model under a recipe; prints as a table.

  Attributes:
    sites: in the order of their first use.
    left: parameters of two or more axes that no registered module contracts, with their shapes.
    recipe: that was asked about.
  """

  sites: tuple[Site, ...]
  left: tuple[tuple[str, tuple[int, ...]], ...]
  recipe: Recipe

  def __iter__(self) -> Iterator[Site]:
    """Over the sites."""
    return iter(self.sites)

  def __len__(self) -> int:
    """How many sites."""
    return len(self.sites)

  def __getitem__(self, path: str) -> Site:
    """The site of a path.

    Raises:
      KeyError: if there is none, listing those there are.
    """
    for site in self.sites:
      if site.path == path:
        return site
    raise KeyError(f"no site {path!r}; there are {', '.join(s.path for s in self.sites)}")

  def quantized(self) -> tuple[Site, ...]:
    """Sites whose weight gets a format."""
    return tuple(s for s in self.sites if s.rule.w.fmt is not None)

  def __str__(self) -> str:
    """A row per site, then what stays in float and why."""
    rows = [("site", "kind", "layers", "[K, N]", "kernel", "runs as", "rule")]
    for s in self.sites:
      rule = f"{s.rule}" + ("" if s.match is None else f"   <- {self.recipe.rules[s.match][0]!r}")
      layers = "x".join(map(str, s.stack)) or "1"
      how = "+".join(h.split(":")[0] for h in s.how.split("; "))
      rows.append((s.path, "+".join(s.kinds), layers, str(list(s.shape)), s.kernel, how, rule))
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths)).rstrip() for r in rows]
    if self.left:
      lines.append("left float, not inside a registered module (jaxquant.contraction.register):")
      lines += [f"  {path}  {list(shape)}" for path, shape in self.left]
    return "\n".join(lines)


def sites(model: nn.Module, variables: object, *args: object, recipe: Recipe) -> Sites:
  """What every contraction of `model.apply(variables, *args)` will get. Nothing is computed.

  Args:
    model: the Linen module.
    variables: float or packed; arrays or ShapeDtypeStructs.
    *args: of the call.
    recipe: to show.

  Returns:
    A table to print or iterate over.

  Raises:
    ValueError: if a rule of the recipe matches no site; the message lists the paths there are.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxquant as jq
    >>> model, x = nn.Dense(4), jnp.ones((2, 8))
    >>> variables = model.init(jax.random.key(0), x)
    >>> recipe = jq.Recipe(rules=((".*", jq.weight_only(jq.formats.INT8)),))
    >>> [s.shape for s in jq.sites(model, variables, x, recipe=recipe)]
    [(8, 4)]
  """
  seen: dict[str, list[Seen]] = {}

  def visit(module: nn.Module, one: Seen) -> None:
    del module
    uses = seen.setdefault(one.path, [])
    if one.call.kind not in [u.call.kind for u in uses]:
      uses.append(dataclasses.replace(one, rule=recipe.rule(one.path)))

  def trace(variables: object, *args: object) -> object:
    # What is asked before a run has no state yet; shapes do not depend on it.
    with intercepted(recipe.replace(rules=stateless), visit):
      return model.apply(variables, *args, rngs={"sr": jax.random.key(0)})

  stateless = tuple(
    (pattern, dataclasses.replace(rule.without_state(static=False), learned=None))
    for pattern, rule in recipe.rules
  )
  jax.eval_shape(trace, variables, *args)
  flat = flat_params(variables)
  found = tuple(_site(path, uses, flat, recipe) for path, uses in seen.items())
  _check_rules(recipe, found)
  known = {s.keys for s in found}
  left = tuple(
    ("/".join(keys), tuple(leaf.shape))
    for keys, leaf in flat.items()
    if keys not in known
    and hasattr(leaf, "ndim")
    and not is_node(leaf)
    and leaf.ndim - _stacked(keys, found) >= 2
  )
  return Sites(found, left, recipe)


def _stacked(keys: tuple[str, ...], found: tuple[Site, ...]) -> int:
  """Stacked axes of a parameter that is no site: those of its nearest site, by common prefix."""

  def common(site: Site) -> int:
    return next((i for i, (a, b) in enumerate(zip(keys, site.keys)) if a != b), len(keys))

  nearest = max(found, key=common, default=None)
  return len(nearest.stack) if nearest is not None and common(nearest) else 0


def flat_params(variables: object) -> dict[tuple[str, ...], object]:
  """The parameters by path, without boxes; kernel nodes stay whole."""
  params = core.unfreeze(meta.unbox(variables["params"]))
  return flatten_dict(params, keep_empty_nodes=True)


def _site(path: str, uses: list[Seen], flat: dict, recipe: Recipe) -> Site:
  first = uses[0]
  keys = (*(path.split("/") if path else ()), first.call.param)
  stored, inside = flat[keys], first.kernel
  if is_node(inside):
    kernel = str(inside.fmt) if isinstance(inside, QTensor) else type(inside).__name__
    shape = tuple(jax.eval_shape(to_dense, inside).shape)
  else:
    kernel = "float"
    shape = tuple(jax.eval_shape(first.call.canonical, inside).shape)
  stack = _stack(path, jax.tree.leaves(stored)[0].shape, jax.tree.leaves(inside)[0].shape)
  how = "; ".join(dict.fromkeys(explain_site(u) for u in uses))
  kinds = tuple(u.call.kind for u in uses)
  match = recipe.match(path)
  return Site(
    path, first.call.param, kinds, stack, shape, first.rule, match, kernel, how, first.call
  )


def _stack(path: str, stored: tuple[int, ...], inside: tuple[int, ...]) -> tuple[int, ...]:
  """The leading axes that a scan or vmap takes off the stored parameter."""
  lead = len(stored) - len(inside)
  if tuple(stored[lead:]) != tuple(inside):
    raise ValueError(
      f"{path}: stored as {list(stored)}, used as {list(inside)}. Layers must be stacked on the "
      "first axis: nn.scan(..., variable_axes={'params': 0})."
    )
  return tuple(stored[:lead])


def _check_rules(recipe: Recipe, found: tuple[Site, ...]) -> None:
  hit = {s.match for s in found}
  idle = [p for i, (p, _) in enumerate(recipe.rules) if i not in hit]
  if idle:
    paths = "\n  ".join(s.path for s in found)
    raise ValueError(
      f"recipe {recipe.name!r}: {idle} matched no site (first match wins, on the whole path). "
      f"The sites are:\n  {paths}"
    )


def float_sites(table: Sites) -> tuple[str, ...]:
  """Paths that stay in float under the recipe: by rule, by no rule, or not in a site at all."""
  by_rule = tuple(s.path for s in table if s.rule == FLOAT)
  return by_rule + tuple(path for path, _ in table.left)
