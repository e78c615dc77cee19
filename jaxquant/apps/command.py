"""What the command lines share: their own flags, help that exits with 0, plain errors, models."""

from __future__ import annotations

import contextlib
import pathlib
import sys
import textwrap
from collections.abc import Iterator, Sequence

from absl import flags, logging

from jaxquant.models import shipped
from jaxquant.models.stored import Stored, read, trained
from jaxquant.recipe import Recipe
from jaxquant.recipes import RECIPES, by_name

MODEL_HELP = "'shipped', the workdir of a training run, or a folder that an app wrote."


def parse(values: flags.FlagValues, doc: str, argv: Sequence[str]) -> None:
  """Reads the command line into an app's own flags; all others get their defaults.

  Flags are per app, not absl's global ones: apps import each other, and share flag names.

  Raises:
    SystemExit: with 0 after --help; with a message for anything that is not understood.
  """
  logging.set_verbosity(logging.ERROR)  # orbax warns of what it always does
  if {"--help", "-h", "-help"} & set(argv[1:]):
    print(f"{doc.strip()}\n\nFlags:\n{_described(values)}")
    sys.exit(0)
  values.unparse_flags()
  for name in values:
    values[name].unparse()
  try:
    rest = values(list(argv), known_only=False)[1:]
  except flags.Error as error:
    sys.exit(f"{error}\nSee --help.")
  if rest:
    sys.exit(f"Not understood: {' '.join(rest)}\nSee --help.")


def _described(values: flags.FlagValues) -> str:
  lines = []
  for name in sorted(set(values) - {"flagfile", "undefok"}):  # absl's own
    flag = values[name]
    default = "" if flag.default in (None, []) else f" Default: {flag.default}."
    text = textwrap.wrap(f"{flag.help}{default}", 90)
    lines += [f"  --{name}", *(f"      {line}" for line in text)]
  return "\n".join(lines)


@contextlib.contextmanager
def said_plainly() -> Iterator[None]:
  """Ends the program with the message of an error that the command line caused."""
  try:
    yield
  except (ValueError, OSError) as error:
    sys.exit(str(error))


def open_model(name: str) -> Stored:
  """The model that a --model flag means.

  Raises:
    ValueError: nothing of ours is there.
  """
  if name == "shipped":
    return shipped.fresh()  # its variables may be donated
  path = pathlib.Path(name)
  if (path / "checkpoints").is_dir():
    return trained(path)
  found = read(path)
  return found if "recipe" in found.about else shipped.widened(found)


def open_float(name: str) -> Stored:
  """The same, for what quantizes.

  Raises:
    ValueError: its weights are packed already.
  """
  found = open_model(name)
  if "recipe" in found.about:
    raise ValueError(f"{name} is packed already ({found.about['recipe']}); name a float model.")
  return found


def recipe_of(stored: Stored) -> Recipe | None:
  """The recipe that packed weights run with, None for float ones.

  Raises:
    ValueError: the recipe of this name is not the one that packed them.
  """
  name = stored.about.get("recipe")
  if name is None:
    return None
  recipe = by_name(name)
  if str(recipe) != stored.about["recipe_text"]:
    raise ValueError(
      f"recipe {name!r} has changed since these weights were packed. Quantize again, or use "
      f"jaxquant {stored.about['jaxquant']}.\nThen:\n{stored.about['recipe_text']}\nNow:\n{recipe}"
    )
  return recipe


def recipe_names(text: str) -> list[str]:
  """`a,b,c` or `all` -> names; all but those that only training can give their parameters.

  Raises:
    ValueError: for an unknown one.
  """
  if text == "all":
    learns = lambda name: any(rule.learned is not None for _, rule in by_name(name).rules)
    return [name for name in RECIPES if not learns(name)]
  names = [n.strip() for n in text.split(",") if n.strip()]
  for name in names:
    by_name(name)
  return names
