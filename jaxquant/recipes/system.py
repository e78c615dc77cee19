"""What the systems table says of one system."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jaxquant.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class System:
  """A row of the systems table.

  Attributes:
    make: () -> Recipe; keywords are the paper's knobs.
    number: of the systems list (T training, W weights and activations ...).
    source: where it is described.
    what: in a few words.
    checked: what else was measured in this repository, and by which command or test.
    gates: of docs/results/ptq.md, whose figures the table quotes.
  """

  make: Callable[..., Recipe]
  number: str
  source: str
  what: str
  checked: str = ""
  gates: tuple[str, ...] = ()
