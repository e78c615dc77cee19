"""All systems: what they are, where they come from, what was measured in our hands."""

from jaxquant.recipe import Recipe
from jaxquant.recipes.system import System
from jaxquant.recipes.training.systems import SYSTEMS as _TRAINING
from jaxquant.recipes.weight_act.systems import SYSTEMS as _WEIGHT_ACT
from jaxquant.recipes.weight_only.systems import SYSTEMS as _WEIGHT_ONLY
from jaxquant.state import without_state

RECIPES: dict[str, System] = _TRAINING | _WEIGHT_ONLY | _WEIGHT_ACT


def by_name(name: str) -> Recipe:
  """The recipe of a row, with its defaults, as packed weights run under it: without state.

  Training needs the state: `RECIPES[name].make()`.

  Raises:
    ValueError: for an unknown name, listing the known ones.
  """
  if name not in RECIPES:
    raise ValueError(f"no recipe {name!r}; there are {', '.join(sorted(RECIPES))}")
  return without_state(RECIPES[name].make())


def table() -> str:
  """The systems as Markdown: docs/systems.md, made by `python -m jaxquant.recipes.index`."""
  rows = [
    f"| `{name}` | {s.number} | {s.source} | {s.what} | {s.checked} |"
    for name, s in RECIPES.items()
  ]
  head = ["| recipe | system | source | what | measured or checked here |", "|---|---|---|---|---|"]
  return "\n".join(["# Systems", "", *head, *rows, ""])


if __name__ == "__main__":
  print(table(), end="")
