"""The loop of a training run: phases, a high-precision twin, spikes; what is logged and saved."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from jaxquant import state as quant_state
from jaxquant.paired import paired_gap
from jaxquant.recipe import Recipe
from jaxquant.spikes import Spikes, guarded
from jaxquant.training import TrainState

Scalars = dict[str, jax.Array]
Step = Callable[[TrainState, jax.Array], tuple[TrainState, Scalars]]


@flax.struct.dataclass
class Run:
  """All that a checkpoint holds.

  Attributes:
    state: the model that is trained.
    twin: the same model in high precision, on the same batches; None: there is none.
    gaps: float32 [window], the loss minus the twin's, newest first; None without a twin.
    spikes: the state of `Spikes`; None: nobody watches.
  """

  state: TrainState
  twin: TrainState | None = None
  gaps: jax.Array | None = None
  spikes: dict | None = None

  def trees(self) -> dict:
    """As items of a checkpoint: "state", and "beside" if there is more than the state."""
    beside = {"twin": self.twin, "gaps": self.gaps, "spikes": self.spikes}
    beside = {name: tree for name, tree in beside.items() if tree is not None}
    return {"state": self.state} | ({"beside": beside} if beside else {})

  @classmethod
  def of(cls, trees: dict) -> Run:
    """The inverse of `trees`."""
    return cls(trees["state"], **trees.get("beside", {}))


@dataclasses.dataclass(frozen=True)
class Phase:
  """A stretch of a run under one recipe.

  Attributes:
    start: updates done when it begins.
    recipe: None: in float.
    step: one update.
    validate: variables -> loss on held-out text.
    watch: `diagnostics.Watch`, or None.
  """

  start: int
  recipe: Recipe | None
  step: Callable[[Run, jax.Array], tuple[Run, Scalars]]
  validate: Callable[[dict], float]
  watch: Callable | None = None


def phase_at(phases: Sequence[Phase], step: int) -> Phase:
  """That in which the update after `step` updates happens."""
  return [p for p in phases if p.start <= step][-1]


def phase_of_checkpoint(phases: Sequence[Phase], step: int) -> Phase:
  """That whose state a checkpoint after `step` updates holds: a phase is entered after saving."""
  return phase_at(phases, max(0, step - 1))


def entered(
  run: Run, model: nn.Module, recipe: Recipe | None, tokens: jax.Array, *, keep: bool
) -> Run:
  """The run as it goes on under another recipe; parameters and optimizer stay.

  Args:
    run: at the end of the phase before.
    model: the Linen module.
    recipe: the next one.
    tokens: int32 [B, T], from which state may be initialized.
    keep: take over what both recipes remember in the same form, such as delayed scales.

  Raises:
    ValueError: one of the recipes learns parameters: the optimizer's state has no place for them.
  """
  state = run.state
  fresh = {}
  if recipe is not None:
    fresh = quant_state.init_quant(model, {"params": state.params}, recipe, tokens)
  for quant in (state.quant, fresh):
    if quant_state.learned(quant):
      raise ValueError(
        "config.switch: a recipe with learned parameters can neither be entered nor left, because "
        "they are in the optimizer's state. Train with one recipe from the start."
      )
  quant = quant_state.carried(state.quant, fresh) if keep else fresh
  return run.replace(state=state.replace(quant=quant))


def make_run_step(
  step: Step, twin_step: Step | None, spikes: Spikes | None, out_shardings: object = None
) -> Callable[[Run, jax.Array], tuple[Run, Scalars]]:
  """One update of everything in a `Run`.

  The twin's is a program of its own, so that it computes what a run of its own would.
  """
  watched = None if spikes is None else guarded(step, spikes, out_shardings=out_shardings)

  def update(run: Run, batch: jax.Array) -> tuple[Run, Scalars]:
    if watched is None:
      state, scalars = step(run.state, batch)
      run = run.replace(state=state)
    else:
      state, seen, scalars = watched(run.state, run.spikes, batch)
      run = run.replace(state=state, spikes=seen)
    if twin_step is not None:
      twin, theirs = twin_step(run.twin, batch)
      gaps = _pushed(run.gaps, scalars["loss"], theirs["loss"])
      run, scalars = run.replace(twin=twin, gaps=gaps), scalars | {"twin_loss": theirs["loss"]}
    return run, scalars

  return update


@jax.jit
def _pushed(gaps: jax.Array, loss: jax.Array, other: jax.Array) -> jax.Array:
  return jnp.roll(gaps, 1).at[0].set(loss - other)


def row_of(run: Run, scalars: Scalars) -> dict[str, float]:
  """The numbers of a step, as logged; waits for the device."""
  row = {name: float(value) for name, value in scalars.items()}
  if run.gaps is not None:
    newest_first = np.asarray(run.gaps)[: int(run.state.step)]
    gap = paired_gap(newest_first[::-1])
    row["gap"] = gap.mean
    if not np.isnan(gap.half_width):
      row |= {"gap_low": gap.mean - gap.half_width, "gap_high": gap.mean + gap.half_width}
  return row


HEADER = "    step      loss      twin  gap, 95 % interval             validation      twin"


def table_row(step: int, row: dict[str, float]) -> str:
  """A line below `HEADER`."""
  low, high = row.get("gap_low"), row.get("gap_high")
  interval = "[too few steps]  " if low is None else f"[{low:+.4f}, {high:+.4f}]"
  validation = (row["validation_loss"], row["twin_validation_loss"])
  return (
    f"{step:8d}{row['loss']:10.4f}{row['twin_loss']:10.4f}  {row['gap']:+.4f} {interval}"
    f"{validation[0]:13.4f}{validation[1]:10.4f}"
  )


@dataclasses.dataclass(frozen=True)
class Outputs:
  """Where a run writes.

  Attributes:
    write: (step, row).
    save: (step, trees).
    append: takes what a watch returns: a row of taps, or None where none is due.
  """

  write: Callable[[int, dict[str, float]], None]
  save: Callable[[int, dict], None]
  append: Callable[[object], None] = lambda found: None


class Progress:
  """The bar, the table of the twin and the notes of spikes."""

  def __init__(self, config, start: int, spikes: int):
    """At step `start`, with `spikes` seen."""
    interval = 0.2 if sys.stderr.isatty() else 30.0  # seconds; a file needs few progress lines
    options = {"initial": start, "unit": "step", "mininterval": interval}
    self._bar = tqdm.tqdm(total=config.steps, **options)
    self._tokens = config.batch_size * config.seq_len
    self._at, self._clock, self._spikes, self._headed = start, time.perf_counter(), spikes, False

  def speed(self, step: int) -> float:
    """Tokens per second since the last row."""
    return (step - self._at) * self._tokens / (time.perf_counter() - self._clock)

  def show(self, step: int, row: dict[str, float]) -> None:
    """A logged row."""
    hidden = ("grad_norm", "gap_low", "gap_high", "spike_at")
    said = {k: f"{v:.4g}" for k, v in row.items() if k not in hidden}
    if "gap_low" in row:
      said["gap"] = f"{row['gap']:+.4f}±{row['gap_high'] - row['gap']:.4f}"
    self._bar.set_postfix(said, refresh=False)
    if row.get("spikes", 0) > self._spikes:
      new, self._spikes = int(row["spikes"] - self._spikes), int(row["spikes"])
      self._bar.write(
        f"Loss spikes: {new} since step {self._at}, the last at {row['spike_at']:.0f}."
      )
    if "twin_validation_loss" in row:
      self._bar.write(("" if self._headed else HEADER + "\n") + table_row(step, row))
      self._headed = True
    self._at, self._clock = step, time.perf_counter()

  def update(self) -> None:
    """One step more."""
    self._bar.update()

  def close(self) -> None:
    """Ends the line."""
    self._bar.close()


def loop(
  config,
  run: Run,
  *,
  phases: Sequence[Phase],
  enter: Callable[[Run, Phase], Run],
  batch: Callable[[int], jax.Array],
  twin_validate: Callable[[dict], float] | None,
  outputs: Outputs,
  signals: Sequence[int],
) -> Run:
  """Steps until config.steps or a signal; saves at both, and every checkpoint_every steps."""
  start = int(run.state.step)
  progress = Progress(config, start, 0 if run.spikes is None else int(run.spikes["spikes"]))
  with contextlib.closing(progress):
    for done in range(start + 1, config.steps + 1):
      phase = phase_at(phases, done - 1)
      if phase.start == done - 1 > 0:
        run = enter(run, phase)
      tokens = batch(done - 1)
      run, scalars = phase.step(run, tokens)
      run = renewed(run, phase, done)
      last = done == config.steps or bool(signals)
      evaluated = done % config.eval_every == 0 or done == config.steps
      if evaluated or last or done % config.log_every == 0:
        row = row_of(run, scalars) | {"tokens_per_s": progress.speed(done)}
        if evaluated:
          row |= validation(run, phase, twin_validate)
        outputs.write(done, row)
        progress.show(done, row)
      if phase.watch is not None:
        rngs = {"sr": jax.random.fold_in(jax.random.key(config.seed), done)}
        outputs.append(phase.watch(done, run.state.variables, tokens, rngs))
      progress.update()
      if last or done % config.checkpoint_every == 0:
        outputs.save(done, run.trees())
      if last:
        break
  return run


def renewed(run: Run, phase: Phase, done: int) -> Run:
  """With what the recipe renews between steps."""
  quant = quant_state.between_steps(phase.recipe, run.state.quant, done)
  return run.replace(state=run.state.replace(quant=quant))


def validation(run: Run, phase: Phase, twin_validate: Callable | None) -> dict[str, float]:
  """Losses on held-out text, as they enter a row."""
  row = {"validation_loss": phase.validate(run.state.variables)}
  if twin_validate is not None:
    row["twin_validation_loss"] = twin_validate(run.twin.variables)
  return row
