"""Compiles a training step and a decode step for a TPU slice that is not here.

  python -m jaxquant.apps.pod --config configs/pod_llama8b_nvfp4.py --topology v5e:16x16

From shapes alone, on any x86 Linux machine: no TPU, no weights. Prints memory per device against
what XLA may use of its HBM, and the collectives of each program. Ends with status 1 if one does not
fit. --config.<field> overrides one field (--config.batch_size 512, --config.tp 8).

  train         the training step under config.recipe
  train_float   its float twin
  decode        the decode step, weights packed by config.decode.recipe
  decode_float  its float twin, weights in the model's dtype
"""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Sequence
from importlib import metadata

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from jaxquant import aot, pod
from jaxquant.aot import GIB, Compiled
from jaxquant.apps import command
from jaxquant.apps.results import commit, made_with
from jaxquant.diagnostics import Table

WHAT = ("train", "train_float", "decode", "decode_float")
COLUMNS = (
  *("step", "topology", "mesh", "lower s", "compile s", "arguments GiB", "temporary GiB"),
  *("peak GiB", "limit GiB", "fits", "collectives"),
)
TRAFFIC = ("step", "topology", "collective", "type", "outside MiB", "in loops", "in loops MiB")
NOTE = (
  "Per device. Peak: arguments, outputs that reuse none of them, temporaries and code. Limit: what "
  "XLA may use of the HBM."
)
TRAFFIC_NOTE = (
  "Collectives by what they move, as bytes of their results: outside of loops, and in the bodies "
  "of loops (layers forward, layers backward, chunks of the loss), each body once."
)

FLAGS = flags.FlagValues()
_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Python file with get_config().", flag_values=FLAGS
)
_TOPOLOGY = flags.DEFINE_list(
  "topology", ["v5e:16x16"], "TPU slices, separated by commas.", flag_values=FLAGS
)
_WHAT = flags.DEFINE_list("what", list(WHAT), f"Which of {', '.join(WHAT)}.", flag_values=FLAGS)
_RESULTS = flags.DEFINE_string("results", None, "Markdown file for the table.", flag_values=FLAGS)


def program(config: ConfigDict, what: str, devices: Sequence[jax.Device]) -> pod.Program:
  """The step that a name of WHAT means, for these devices."""
  build, recipe = {
    "train": (pod.train_program, config.recipe),
    "decode": (pod.decode_program, config.decode.recipe),
  }[what.removesuffix("_float")]
  wanted = None if what.endswith("_float") or recipe is None else recipe()
  return build(config, wanted, pod.pod_mesh(devices, config.tp))


def row(topology: str, mesh: jax.sharding.Mesh, found: Compiled) -> tuple[str, ...]:
  """One line of the table."""
  shape = " x ".join(f"{size} {axis}" for axis, size in mesh.shape.items())
  seconds = f"{found.lower_s:.1f}", f"{found.compile_s:.0f}"
  limit = f"{found.limit / GIB:.2f}"
  if found.refusal:
    return found.name, topology, shape, *seconds, "-", "-", "-", limit, "no", "-"
  sizes = (f"{n / GIB:.3f}" for n in (found.arguments, found.temporaries, found.peak))
  return found.name, topology, shape, *seconds, *sizes, limit, "yes", aot.summary(found.collectives)


def traffic(topology: str, found: Compiled) -> list[tuple[str, ...]]:
  """A line per kind and type of collective, without those below a MiB in all."""
  lines = []
  for kind, dtype in sorted({(c.kind, c.dtype) for c in found.collectives}):
    same = [c for c in found.collectives if (c.kind, c.dtype) == (kind, dtype)]
    looped = [c.bytes / 2**20 for c in same if c.looped]
    outside = sum(c.bytes for c in same if not c.looped) / 2**20
    if outside + sum(looped) >= 1:
      moved = (f"{outside:.0f}", f"{len(looped)}", f"{sum(looped):.0f}")
      lines.append((found.name, topology, kind, dtype, *moved))
  return lines


def provenance(argv: Sequence[str], of: str) -> str:
  """Command, commit, date and versions."""
  return (
    f"Command: `python -m jaxquant.apps.pod {' '.join(argv[1:])}`. Commit {of}, {made_with()}, "
    f"libtpu {metadata.version('libtpu')}, load {os.getloadavg()[0]:.1f} at the end."
  )


def markdown(tables: Sequence[Table], made_by: str) -> str:
  """The results file."""
  parts = ["# Steps compiled for TPU slices", made_by]
  for table in tables:
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    parts += [table.note, "\n".join("| " + " | ".join(line) + " |" for line in lines)]
  return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str]) -> None:
  """Compiles what the command line names."""
  command.parse(FLAGS, __doc__, argv)
  unknown = [what for what in _WHAT.value if what not in WHAT]
  if unknown:
    sys.exit(f"--what {unknown[0]}: it is one of {', '.join(WHAT)}.")
  if _CONFIG.value is None:
    sys.exit("--config is missing, for instance configs/pod_llama8b_nvfp4.py.\nSee --help.")
  if not aot.ready():  # libtpu reads it when it is loaded
    again = [sys.executable, "-m", "jaxquant.apps.pod", *argv[1:]]
    os.execve(sys.executable, again, {**os.environ, **aot.ENVIRONMENT})
  started_at = commit()
  rows, moved, refused = [], [], []
  for topology in _TOPOLOGY.value:
    for what in _WHAT.value:
      with command.said_plainly():
        step = program(_CONFIG.value, what, aot.devices(topology))
        found = aot.compile_program(step)
      rows.append(row(topology, step.mesh, found))
      moved += traffic(topology, found)
      print(f"{topology} {found.name}: compiled in {found.compile_s:.0f} s", file=sys.stderr)
      if found.refusal:
        refused.append(f"{found.name} does not fit {topology}: {found.refusal}.")
  tables = (
    Table(COLUMNS, rows, left=3, note=NOTE),
    Table(TRAFFIC, moved, left=4, note=TRAFFIC_NOTE),
  )
  print(*tables[: 2 if moved else 1], sep="\n\n")
  if _RESULTS.value:
    pathlib.Path(_RESULTS.value).write_text(markdown(tables, provenance(argv, started_at)))
  if refused:
    hint = "Take more devices, a larger --config.tp, or a smaller batch."
    sys.exit("\n".join([*refused, hint]))


if __name__ == "__main__":
  main(sys.argv)
