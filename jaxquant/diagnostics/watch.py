"""Watching a training run: what `taps` measures every n steps, kept on disk beside the metrics.

    watch = Watch(model, recipe, every=100, rules=SPECTRA + OUTLIERS)
    history = History(workdir, start=int(state.step))  # drops what a killed run logged after it
    ...
    row = watch(step, {"params": state.params}, batch, {"sr": key})
    if row is not None:
      history.append(row)

A row is measured by a program of its own on the current batch; other steps pay nothing, and the
step's own program is the same with or without a watch.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping

import flax.linen as nn
import jax
import numpy as np

from jaxquant.diagnostics.taps import OUTLIERS, Loss, Rules, next_token_loss, taps
from jaxquant.recipe import Recipe

FOLDER = "taps"  # below the workdir


@dataclasses.dataclass(frozen=True)
class Row:
  """What was measured at one step.

  Attributes:
    step: updates done.
    values: {point: {measure: float32 [L, ...]}}, as `taps` returns.
  """

  step: int
  values: Mapping[str, Mapping[str, np.ndarray]]


class Watch:
  """Measures every n-th step; one compilation for the whole run."""

  def __init__(
    self,
    model: nn.Module,
    recipe: Recipe | None,
    *,
    every: int = 100,
    rules: Rules = OUTLIERS,
    loss_of: Callable[[Callable], Loss] = next_token_loss,
  ):
    """What to measure; nothing is compiled before the first row.

    Args:
      model: the Linen module.
      recipe: that it trains under; None: in float.
      every: steps between rows.
      rules: of `taps`.
      loss_of: apply -> loss, for gradients.

    Raises:
      ValueError: for `every` below 1.
    """
    if every < 1:
      raise ValueError(f"Watch: every must be at least 1 step, got {every}")
    self.every = every
    measure = taps(model, Recipe(name="float") if recipe is None else recipe, rules, loss_of)
    self._measure = jax.jit(measure)

  def __call__(self, step: int, variables: dict, batch: jax.Array, rngs: dict) -> Row | None:
    """The row of a step, or None where none is due.

    Args:
      step: updates done.
      variables: `{"params": ...}` and other collections of the model.
      batch: of the loss; int32 [B, T+1] for language models.
      rngs: of apply, `{"sr": key}`.

    Raises:
      ValueError: as `taps`, at the first row.
    """
    if step % self.every:
      return None
    return Row(step, jax.device_get(self._measure(variables, batch, rngs)))


class History:
  """The rows of a run: one file for each, `taps/<step>.npz` below the workdir.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as workdir:
    ...   history = History(pathlib.Path(workdir), start=0)
    ...   history.append(Row(100, {"head/x": {"kurtosis": np.ones(1, np.float32)}}))
    ...   history.steps, history.series("head/x", "kurtosis").tolist()
    ([100], [[1.0]])
  """

  def __init__(self, workdir: pathlib.Path, start: int | None = None):
    """Opens the rows below a workdir.

    Args:
      workdir: of the run.
      start: the step that the run continues from: later rows are dropped. None: to read.
    """
    self._folder = pathlib.Path(workdir) / FOLDER
    if start is not None:
      self._folder.mkdir(parents=True, exist_ok=True)
      for step in self.steps:
        if step > start:
          self._path(step).unlink()
      for half in self._folder.glob("*.tmp"):  # of a killed run
        half.unlink()

  @property
  def steps(self) -> list[int]:
    """Of the rows, rising."""
    return sorted(int(path.stem) for path in self._folder.glob("*.npz"))

  def append(self, row: Row) -> None:
    """Writes a row, whole or not at all; one of the same step is replaced."""
    path = self._path(row.step)
    half = path.with_suffix(".tmp")
    flat = {f"{p}:{m}": a for p, found in row.values.items() for m, a in found.items()}
    with half.open("wb") as file:
      np.savez(file, **flat)
    half.replace(path)

  def __len__(self) -> int:
    """How many rows."""
    return len(self.steps)

  def __iter__(self) -> Iterator[Row]:
    """The rows by rising step."""
    for step in self.steps:
      values: dict[str, dict[str, np.ndarray]] = {}
      with np.load(self._path(step)) as stored:
        for key in stored.files:
          point, _, measure = key.rpartition(":")
          values.setdefault(point, {})[measure] = stored[key]
      yield Row(step, values)

  def series(self, point: str, measure: str) -> np.ndarray:
    """One measure over time, [rows, L, ...].

    Raises:
      ValueError: if a row lacks it, naming what that row has.
    """
    found = []
    for row in self:
      if measure not in row.values.get(point, {}):
        there = sorted(row.values.get(point, row.values))
        raise ValueError(f"{point}:{measure} is not in the row of step {row.step}; it has {there}")
      found.append(row.values[point][measure])
    return np.stack(found)

  def _path(self, step: int) -> pathlib.Path:
    return self._folder / f"{step:08d}.npz"
