"""All systems: what they are, where they come from, what was measured in our hands."""

import json
import pathlib

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


MEASURED = pathlib.Path(__file__).parents[2] / "docs" / "results" / "ptq.json"


def table() -> str:
  """The systems as Markdown: docs/systems.md, made by `python -m jaxquant.recipes.index`.

  Reads the figures that gates have left in docs/results, so it wants a checkout.
  """
  measured = json.loads(MEASURED.read_text())
  rows = []
  for name, s in RECIPES.items():
    shown = [s.checked] * bool(s.checked) + [_quoted(gate, measured[gate]) for gate in s.gates]
    rows.append(f"| `{name}` | {s.number} | {s.source} | {s.what} | {'; '.join(shown)} |")
  head = ["| recipe | system | source | what | measured or checked here |", "|---|---|---|---|---|"]
  return "\n".join(["# Systems", "", QUOTES, "", *head, *rows, ""])


QUOTES = """\
A gate is a claim that is measured on the shipped model: [results/ptq.md](results/ptq.md) has the
claims, spreads, times and how to repeat them. KL is in 1e-3 nats per token."""


def _quoted(name: str, gate: dict) -> str:
  """A gate in one line: "gate `awq` passes, KL: awq = 15.5, nearest = 20.0"."""
  kl = gate["unit"].startswith("KL")
  number = lambda value: f"{value:.0f}" if value >= 100 else f"{value:#.3g}"
  values = (f"{label} = {number(v * (1e3 if kl else 1))}" for label, v in gate["values"].items())
  said = f"gate `{name}` {gate['verdict']}{', KL' if kl and gate['values'] else ''}"
  return (f"{said}: {', '.join(values)}" if gate["values"] else said).replace("|", "\\|")


if __name__ == "__main__":
  print(table(), end="")
