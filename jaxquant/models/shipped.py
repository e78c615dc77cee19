"""The model that comes with the package: a byte-level decoder of Python source, 4.9 M parameters.

Stored in bf16 (below 10 MB), used in f32. The asset is made from a training run by

  python -m jaxquant.models.shipped --workdir out/stdlib_lm

which also measures its loss on the held-out files and writes down where it comes from.
"""

import argparse
import datetime
import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp

from jaxquant import __version__, data
from jaxquant.evaluation import Candidate, evaluate
from jaxquant.models.stored import Stored, digest, read, trained, write
from jaxquant.models.transformer import Transformer

ASSET = pathlib.Path(__file__).parents[1] / "assets" / "stdlib_lm"
LARGEST = 10_000_000  # bytes: what a source repository can bear


@functools.cache
def stored() -> Stored:
  """The shipped model with its provenance; do not donate its variables.

  Raises:
    CheckpointError: the asset is missing or damaged.
  """
  return fresh()


def fresh() -> Stored:
  """The same, in arrays that nobody else holds."""
  return widened(read(ASSET))


def load() -> tuple[Transformer, dict]:
  """The shipped model and its float32 variables."""
  return stored()[:2]


def widened(found: Stored) -> Stored:
  """A float model with its bf16 parameters in float32."""
  widen = lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a
  return found._replace(variables=jax.tree.map(widen, found.variables))


def held_out_loss(model: Transformer, variables: dict) -> dict:
  """Nats per byte over all windows of the validation and test files."""
  candidate = Candidate(model.apply, variables)
  losses = {}
  for split in ("validation", "test"):
    batches = data.eval_batches(data.load(), 8, model.shape.max_len, split=split)
    scores = evaluate(candidate, {"float": candidate}, batches)["float"]
    losses[split] = {"loss": round(scores.loss, 4), "tokens": scores.tokens}
  return losses


def export(workdir: pathlib.Path, path: pathlib.Path, date: str) -> dict:
  """Makes the asset from the newest parameters of a training run.

  Args:
    workdir: of `jaxquant.apps.train`.
    path: the folder to make; a JSON of the same name beside it repeats the provenance for people.
    date: of the training.

  Returns:
    The provenance.

  Raises:
    ValueError: the parameters take more than `LARGEST` bytes.
  """
  found = trained(workdir)
  narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), found.variables)
  size = sum(a.nbytes for a in jax.tree.leaves(narrow))
  if size > LARGEST:
    raise ValueError(f"{workdir}: {size} bytes in bf16; an asset has at most {LARGEST}.")
  wide = jax.tree.map(lambda a: a.astype(jnp.float32), narrow)
  config = dict(found.about["config"])
  about = {
    "name": path.name,
    "parameters": sum(a.size for a in jax.tree.leaves(narrow)),
    "held_out": held_out_loss(found.model, wide),
    "steps": found.about["step"],
    "corpus": config.pop("corpus"),
    "config": config,
    "command": f"python -m jaxquant.apps.train --config configs/{path.name}.py --workdir {workdir}",
    "digest": digest(wide),
    "date": date,
    "python": sys.version.split()[0],
    "jax": jax.__version__,
    "jaxquant": __version__,
  }
  write(path, Stored(found.model, narrow, about))
  path.with_suffix(".json").write_text(json.dumps(about, indent=2) + "\n")
  return about


def main() -> None:
  """Exports a run from the command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", type=pathlib.Path, required=True, help="of the training app")
  parser.add_argument("--path", type=pathlib.Path, default=ASSET, help="folder to make")
  today = datetime.date.today().isoformat()
  parser.add_argument("--date", default=today, help="of the training; default: today")
  flags = parser.parse_args()
  print(json.dumps(export(flags.workdir, flags.path, flags.date), indent=2))


if __name__ == "__main__":
  main()
