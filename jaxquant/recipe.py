"""Recipe: what happens to each site of a model, as a value."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import jax

from jaxquant.formats import Format
from jaxquant.ops.qdot import FLOAT, Rule
from jaxquant.solvers.by_site import BySite
from jaxquant.solvers.rtn import rtn
from jaxquant.statistics import Statistic

if TYPE_CHECKING:
  from jaxquant.prepare import Step

Solve = Callable[[jax.Array, jax.Array | None, Format], object]


@dataclasses.dataclass(frozen=True)
class Recipe:
  """A published system as a value: which rule each site gets, and how its weight is solved.

  Frozen and hashable, so that it keys jit caches; edit it with `.replace`.

  Attributes:
    rules: (pattern, Rule) pairs. A site gets the first rule whose pattern matches its whole module
      path ("layers/attn/q"); a site that none matches stays in float.
    solve: (w [K, N], statistic, Format) -> kernel, for post-training quantization; a
      `jaxquant.solvers.BySite` has one for each kind of site.
    statistic: what the solver needs of the site's inputs x [M, K]; None for data-free solvers.
    name: for tables.
    inputs: what statistics are taken of: "float" inputs, those of the float model, or "quantized"
      ones, which the already quantized blocks before give (`jaxquant.sequential`).
    prepare: steps that change the float weights first and keep the function (`jaxquant.prepare`).

  Example:
    >>> from jaxquant.formats import INT4_G128
    >>> from jaxquant.ops.qdot import FLOAT, weight_only
    >>> recipe = Recipe(rules=(("head", FLOAT), (".*", weight_only(INT4_G128))))
    >>> str(recipe.rule("layers/mlp/up")), str(recipe.rule("head"))
    ('w int4_g128', 'float')
  """

  rules: tuple[tuple[str, Rule], ...] = ()
  solve: Solve = rtn
  statistic: Statistic | None = None
  name: str = "recipe"
  prepare: tuple[Step, ...] = ()
  inputs: Literal["float", "quantized"] = "float"

  def __post_init__(self) -> None:
    """Raises ValueError for wrong rules or steps, TypeError if not hashable."""
    for entry in self.rules:
      if not (isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[1], Rule)):
        raise ValueError(f"Recipe.rules holds (pattern, Rule) pairs, got {entry!r}")
      try:
        re.compile(entry[0])
      except re.error as error:
        raise ValueError(f"Recipe: {entry[0]!r} is not a regular expression: {error}") from error
    for step in self.prepare:
      if not (hasattr(step, "apply") and hasattr(step, "sites") and hasattr(step, "statistic")):
        raise ValueError(f"Recipe.prepare holds steps (jaxquant.prepare.Step), got {step!r}")
    if self.inputs not in ("float", "quantized"):
      raise ValueError(f"Recipe.inputs is 'float' or 'quantized', got {self.inputs!r}")
    hash(self)

  @property
  def calibrates(self) -> bool:
    """Whether its solver, one of its steps or a static range needs calibration batches."""
    reads = lambda step: step.statistic is not None or getattr(step, "reads_batches", False)
    static = any(rule.is_static for _, rule in self.rules)
    return self.statistic is not None or static or any(map(reads, self.prepare))

  def match(self, path: str) -> int | None:
    """Index of the first rule that matches the whole path, or None."""
    for i, (pattern, _) in enumerate(self.rules):
      if re.fullmatch(pattern, path):
        return i
    return None

  def rule(self, path: str) -> Rule:
    """The rule of a site; FLOAT if none matches."""
    index = self.match(path)
    return FLOAT if index is None else self.rules[index][1]

  def at(self, path: str) -> Recipe:
    """The recipe as one site sees it: with its solver."""
    by_site = isinstance(self.solve, BySite)
    return self.replace(solve=self.solve.at(path)) if by_site else self

  def replace(self, **changes: object) -> Recipe:
    """A copy with some fields changed."""
    return dataclasses.replace(self, **changes)

  def __str__(self) -> str:
    """The rules in order, one a line."""
    width = max((len(p) for p, _ in self.rules), default=0)
    lines = [f"{p:{width}}  {rule}" for p, rule in self.rules]
    of = None if self.statistic is None else self.statistic.of
    statistic = "" if of is None else f", statistic {getattr(of, '__name__', of)}"
    statistic += " of quantized inputs" if of is not None and self.inputs == "quantized" else ""
    solver = getattr(self.solve, "__name__", str(self.solve))
    steps = [f"first {step}" for step in self.prepare]
    return "\n".join([f"{self.name}: solver {solver}{statistic}", *steps, *lines])
