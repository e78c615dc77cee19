"""Other solvers for some sites of a recipe."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

Solve = Callable[..., object]  # (w [K, N], statistic, Format) -> kernel


@dataclasses.dataclass(frozen=True)
class BySite:
  """A `Recipe.solve` that is a solver per site: the first whose pattern matches, else the default.

  All get the recipe's statistic; one that needs less ignores it. `Recipe.at` picks the solver, so
  solvers stay functions of one weight that know no paths.

  Attributes:
    solvers: (pattern, solver) pairs; a pattern matches the whole module path, as in `Recipe.rules`.
    default: the solver of all other sites.

  Example:
    >>> from jaxquant.solvers import gptq, rtn
    >>> solve = BySite(((".*/(q|k)", rtn),), gptq)
    >>> solve.at("layers/attn/q") is rtn, solve.at("layers/mlp/up") is gptq
    (True, True)
  """

  solvers: tuple[tuple[str, Solve], ...]
  default: Solve

  def __post_init__(self) -> None:
    """Raises ValueError for wrong pairs."""
    for entry in (*self.solvers, ("", self.default)):
      if not (isinstance(entry, tuple) and len(entry) == 2 and callable(entry[1])):
        raise ValueError(f"BySite.solvers holds (pattern, solver) pairs, got {entry!r}")
      try:
        re.compile(entry[0])
      except re.error as error:
        raise ValueError(f"BySite: {entry[0]!r} is not a regular expression: {error}") from error
      if hasattr(entry[1], "quantize_params"):
        raise ValueError(f"BySite: {entry[1].__name__} learns several sites together, not one")

  def at(self, path: str) -> Solve:
    """The solver of a site."""
    return next((s for pattern, s in self.solvers if re.fullmatch(pattern, path)), self.default)

  @property
  def __name__(self) -> str:
    """For tables."""
    name = lambda solve: getattr(solve, "__name__", str(solve))
    some = "".join(f"{name(solve)} for {pattern}, " for pattern, solve in self.solvers)
    return f"{some}else {name(self.default)}"

  def __call__(self, *args: object, **kwargs: object) -> object:
    """Raises ValueError: a weight does not say which site it is."""
    raise ValueError(f"this solver depends on the site ({self.__name__}): take `Recipe.at(path)`")
