"""Trains a small language model on the source text of the Python standard library.

  python -m jaxquant.apps.train --config configs/stdlib_lm.py --workdir out/stdlib_lm
  python -m jaxquant.apps.train --config configs/lowprec.py:nvfp4 --workdir out/nvfp4

--config names a Python file whose get_config() returns the run; --config.<field> overrides one
field of it (--config.steps 100, --config.model.d_ff 512). --workdir receives

  checkpoints/<step>/   parameters, optimizer and recipe state, config; written in the background
  metrics.jsonl         one JSON object per logged step
  taps/<step>.npz       what the watch measured, if the config has one
  events.out.tfevents*  the metrics for TensorBoard

The same command continues a run that was interrupted, by Ctrl-C or by kill -9, and ends with the
same parameters, bit for bit, as if it had not been.

config.optimizer holds the arguments of jaxquant.training.optimizer: its `method` is "adamw" (the
default) or another name of jaxquant.optimizers. Optional fields of a config:

  architecture  "transformer" (default) or another of jaxquant.models.architectures
  recipe        () -> Recipe; None: in float
  accumulate    microbatches per update
  devices       data parallel over so many; the batch is sharded, the parameters are everywhere
  switch        {"step": n, "recipe": ..., "keep": True}: another recipe after n updates; `keep`
                takes over the recipe state that has the same form in both
  twin          {"window": n}: the float model trains on the same batches, step by step; logged are
                its loss and the gap over the last n steps, with a 95 % interval of batch means
  spike         {"window": n, "threshold": k, "skip": False}: see jaxquant.spikes
  watch         {"every": n, "rules": ...}: see jaxquant.diagnostics.Watch
"""

import contextlib
import functools
import json
import pathlib
import re
import sys
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from ml_collections import ConfigDict, config_flags

from jaxquant import data, training
from jaxquant.apps.run_loop import (
  Outputs,
  Phase,
  Run,
  entered,
  loop,
  make_run_step,
  phase_of_checkpoint,
)
from jaxquant.apps.workdir import Checkpoints, Metrics, OtherRunError, interruptible
from jaxquant.models.architectures import build
from jaxquant.recipe import Recipe
from jaxquant.spikes import Spikes

__all__ = ["OtherRunError", "interruptible", "run"]

_CONFIG = config_flags.DEFINE_config_file("config", None, "Python file with get_config().")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints and metrics.")

# What may differ between the runs that share a workdir: it changes no parameter.
_BOOKKEEPING = ("log_every", "eval_every", "eval_batches", "checkpoint_every", "keep", "watch")


def recipes(config: ConfigDict) -> list[tuple[int, Recipe | None]]:
  """(updates done when it begins, recipe) of each phase of the run.

  Raises:
    ValueError: for a switch before the first update.
  """
  switch = config.get("switch")
  found = [(0, config.recipe and config.recipe())]
  if switch is not None:
    if switch.step < 1:
      raise ValueError(f"config.switch.step is {switch.step}; a switch comes after 1 or more steps")
    found.append((switch.step, switch.recipe and switch.recipe()))
  return found


def describe(config: ConfigDict, corpus: data.Corpus) -> dict:
  """What determines the parameters, as JSON: the config without bookkeeping, and the corpus."""
  fields = {k: v for k, v in config.to_dict().items() if k not in _BOOKKEEPING}
  # Recipes by their value, without the addresses of the functions in it.
  texts = [r and re.sub(r" at 0x[0-9a-f]+", "", repr(r)) for _, r in recipes(config)]
  fields["recipe"] = texts[0]
  if fields.get("switch") is not None:
    fields["switch"] = fields["switch"] | {"recipe": texts[1]}
  return json.loads(json.dumps(fields | {"corpus": data.fingerprint(corpus)}))


class Sharding:
  """Data parallelism: batches in shards along B, everything else on every device."""

  def __init__(self, config: ConfigDict):
    """Raises ValueError for devices that are not there, or rows that they cannot share."""
    count, rows = config.get("devices", 1), config.batch_size // config.get("accumulate", 1)
    if count > jax.device_count():
      raise ValueError(f"config.devices is {count}; this host has {jax.device_count()}")
    if rows % count:
      raise ValueError(
        f"{rows} rows of a (micro)batch do not divide among config.devices = {count}"
      )
    axes = {"axis_types": (AxisType.Auto,), "devices": jax.devices()[:count]}
    mesh = jax.make_mesh((count,), ("data",), **axes)
    place = lambda spec: NamedSharding(mesh, spec) if count > 1 else None
    self.rows, self.everywhere = place(PartitionSpec("data")), place(PartitionSpec())

  def batch(self, tokens) -> jax.Array:
    """Tokens [B, T+1] in shards."""
    return tokens if self.rows is None else jax.device_put(tokens, self.rows)

  def copied(self, tree):
    """A tree on every device."""
    return tree if self.everywhere is None else jax.device_put(tree, self.everywhere)


class Training:
  """The parts of a run, as its config says."""

  def __init__(self, config: ConfigDict, corpus: data.Corpus):
    """Builds the model and everything that will be compiled; compiles nothing."""
    self.config, self.corpus, self.sharding = config, corpus, Sharding(config)
    self.model = build(config.get("architecture", "transformer"), config.model)
    self.tx = training.optimizer(config.steps, **config.optimizer)
    self._size = {"batch_size": config.batch_size, "seq_len": config.seq_len}
    self.spikes = Spikes(**config.spike) if config.get("spike") else None
    held_out = data.eval_batches(corpus, n=config.eval_batches, **self._size)
    self._held_out = [self.sharding.batch(tokens) for tokens in held_out]
    self.twin_step = self._update(self.apply(None), None) if config.get("twin") else None
    self.phases = [self._phase(start, recipe) for start, recipe in recipes(config)]

  def batch(self, step: int) -> jax.Array:
    """Of the update after `step` updates, int32 [B, T+1]."""
    tokens = data.batch(self.corpus, self.config.seed, step=step, **self._size)
    return self.sharding.batch(tokens)

  def apply(self, recipe: Recipe | None) -> training.Apply:
    """The float model, or the same model under a recipe."""
    if recipe is None:
      return cast(training.Apply, self.model.apply)  # Flax says that it may also return a tuple
    import jaxquant  # only here, so that a float run does not load what it does not use

    return jaxquant.quantized(self.model, recipe)

  def validate(self, recipe: Recipe | None) -> Callable[[dict], float]:
    """Variables -> loss on held-out text."""
    evaluate = training.make_evaluate(self.apply(recipe))
    return lambda variables: evaluate(variables, self._held_out)

  def fresh(self, step: int) -> dict:
    """The trees of a new run, or such as a checkpoint after `step` updates holds."""
    recipe, config = phase_of_checkpoint(self.phases, step).recipe, self.config
    start = functools.partial(training.init_state, self.model, self.tx, self.batch(0)[:, :-1])
    twin = start(config.seed) if config.get("twin") else None
    run = Run(
      start(config.seed, recipe),
      twin,
      None if twin is None else jnp.zeros(config.twin.window, jnp.float32),
      None if self.spikes is None else self.spikes.init(),
    )
    return self.sharding.copied(run.trees())

  def enter(self, run: Run, phase: Phase) -> Run:
    """The run as it goes on in the next phase."""
    tokens = self.batch(phase.start)[:, :-1]
    keep = self.config.switch.get("keep", True)
    return self.sharding.copied(entered(run, self.model, phase.recipe, tokens, keep=keep))

  def _update(self, apply: training.Apply, recipe: Recipe | None):
    config, everywhere = self.config, self.sharding.everywhere
    options = {"recipe": recipe, "accumulate": config.get("accumulate", 1)}
    return training.make_step(apply, self.tx, config.seed, out_shardings=everywhere, **options)

  def _phase(self, start: int, recipe: Recipe | None) -> Phase:
    step = self._update(self.apply(recipe), recipe)
    step = make_run_step(step, self.twin_step, self.spikes, self.sharding.everywhere)
    return Phase(start, recipe, step, self.validate(recipe), self._watch(recipe))

  def _watch(self, recipe: Recipe | None) -> Callable | None:
    if not self.config.get("watch"):
      return None
    from jaxquant.diagnostics import Watch  # only here, as above

    return Watch(self.model, recipe, **self.config.watch)


def run(config: ConfigDict, workdir: pathlib.Path) -> training.TrainState:
  """Trains to config.steps, or to the first signal; continues what `workdir` holds."""
  workdir = workdir.absolute()  # orbax asks for it
  workdir.mkdir(parents=True, exist_ok=True)
  corpus = data.load()
  parts = Training(config, corpus)
  described = describe(config, corpus)
  with (
    contextlib.closing(Checkpoints(workdir, config.keep, described)) as checkpoints,
    interruptible() as signals,
  ):
    restored = Run.of(checkpoints.restore(parts.fresh))
    step = int(restored.state.step)
    if step:
      print(f"Continuing {workdir} at step {step}.")
    with contextlib.closing(Metrics(workdir, step)) as metrics:
      outputs = Outputs(metrics.write, checkpoints.save, taps_of(config, workdir, step))
      end = loop(
        config,
        restored,
        phases=parts.phases,
        enter=parts.enter,
        batch=parts.batch,
        twin_validate=parts.validate(None) if config.get("twin") else None,
        outputs=outputs,
        signals=signals,
      )
  print(f"Step {end.state.step} of {config.steps}; checkpoints in {workdir}.")
  return end.state


def taps_of(config: ConfigDict, workdir: pathlib.Path, start: int) -> Callable[[object], None]:
  """What takes the rows of a watch."""
  if not config.get("watch"):
    return lambda row: None
  from jaxquant.diagnostics import History

  history = History(workdir, start)
  return lambda row: None if row is None else history.append(row)


def main(argv):
  """Runs the config of the command line."""
  if len(argv) > 1:
    raise app.UsageError(f"Unknown arguments: {argv[1:]}")
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # orbax logs 25 lines per checkpoint
  try:
    run(_CONFIG.value, pathlib.Path(_WORKDIR.value))
  except OtherRunError as error:
    sys.exit(str(error))


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main)
