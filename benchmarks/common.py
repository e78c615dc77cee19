"""What the benchmarks share: interleaved timing, the compiled program's cost, committed tables."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax

from jaxquant.apps.results import commit, made_with

RESULTS = Path(__file__).parent.parent / "docs" / "results"


def interleaved(cases: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
  """Seconds of each case, all cases once per round, so that load on the machine hits them alike."""
  for run in cases.values():
    jax.block_until_ready(run())
  times: dict[str, list[float]] = {name: [] for name in cases}
  for _ in range(rounds):
    for name, run in cases.items():
      start = time.perf_counter()
      jax.block_until_ready(run())
      times[name].append(time.perf_counter() - start)
  return times


def ratios(times: dict[str, list[float]], base: str) -> dict[str, tuple[float, float, float]]:
  """Median time in ms, median and quartile spread of the per-round ratio to `base`."""
  out = {}
  for name, t in times.items():
    r = sorted(a / b for a, b in zip(t, times[base]))
    spread = r[3 * len(r) // 4] - r[len(r) // 4]
    out[name] = (statistics.median(t) * 1e3, statistics.median(r), spread)
  return out


def compiled(f: Callable, *args: object) -> tuple[Callable, float, int]:
  """(executable, seconds to lower and compile, bytes of temporary memory)."""
  start = time.perf_counter()
  executable = f.lower(*args).compile()
  seconds = time.perf_counter() - start
  return executable, seconds, executable.memory_analysis().temp_size_in_bytes


def markdown(header: list[str], rows: list[list[str]]) -> str:
  """A table."""
  lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
  return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def provenance() -> str:
  """Command, commit, date, versions and load of the machine."""
  return (
    f"Command: `python {' '.join(sys.argv)}`. Commit {commit()}, {made_with()}, "
    f"load {os.getloadavg()[0]:.1f} at the end."
  )


def write(name: str, title: str, body: str) -> None:
  """docs/results/NAME.md."""
  RESULTS.mkdir(parents=True, exist_ok=True)
  path = RESULTS / f"{name}.md"
  path.write_text(f"# {title}\n\n{provenance()}\n\n{body}\n")
  print(f"wrote {path}")
