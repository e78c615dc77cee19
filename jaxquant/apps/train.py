"""Trains a small language model on the source text of the Python standard library.

  python -m jaxquant.apps.train --config configs/stdlib_lm.py --workdir out/stdlib_lm

--config names a Python file whose get_config() returns the run; --config.<field> overrides one
field of it (--config.steps 100, --config.model.d_ff 512). --workdir receives

  checkpoints/<step>/   parameters, optimizer state and config, written in the background
  metrics.jsonl         one JSON object per logged step
  events.out.tfevents*  the same for TensorBoard

The same command continues a run that was interrupted, by Ctrl-C or by kill -9, and ends with the
same parameters, bit for bit, as if it had not been.
"""

import contextlib
import functools
import json
import pathlib
import re
import signal
import sys
import time
from typing import cast

import flax.linen as nn
import jax
import orbax.checkpoint as ocp
import tensorboardX
import tqdm
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from jaxquant import data, training
from jaxquant.models.architectures import build

_CONFIG = config_flags.DEFINE_config_file("config", None, "Python file with get_config().")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints and metrics.")

# What may differ between the runs that share a workdir: it changes no parameter.
_BOOKKEEPING = ("log_every", "eval_every", "eval_batches", "checkpoint_every", "keep")


class OtherRunError(ValueError):
  """The workdir holds a checkpoint of another run."""


def describe(config: ConfigDict, recipe, corpus: data.Corpus) -> dict:
  """What determines the parameters, as JSON: the config without bookkeeping, and the corpus."""
  fields = {k: v for k, v in config.to_dict().items() if k not in _BOOKKEEPING}
  # The recipe by its value, without the addresses of the functions in it.
  fields["recipe"] = recipe and re.sub(r" at 0x[0-9a-f]+", "", repr(recipe))
  return json.loads(json.dumps(fields | {"corpus": data.fingerprint(corpus)}))


def check_same_run(saved: dict, wanted: dict, workdir: pathlib.Path):
  """Raises OtherRunError, naming the fields, if `saved` describes another run than `wanted`."""
  saved, wanted = _flat(saved), _flat(wanted)
  keys = sorted(k for k in saved | wanted if saved.get(k) != wanted.get(k))
  if keys:
    lines = [f"  {k}: checkpoint {saved.get(k)!r}, this run {wanted.get(k)!r}" for k in keys]
    raise OtherRunError(
      f"{workdir} holds a checkpoint of another run. Different:\n"
      + "\n".join(lines)
      + "\nChoose another --workdir, delete this one, or set these fields back."
    )


def _flat(tree: dict, prefix: str = "") -> dict:
  """Nested dicts -> one dict with dotted keys, as the flags are written."""
  leaves = {prefix + k: v for k, v in tree.items() if not isinstance(v, dict)}
  for k, v in tree.items():
    leaves |= _flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {}
  return leaves


class Metrics:
  """Scalars of each logged step, to JSON lines and TensorBoard; each step appears once."""

  def __init__(self, workdir: pathlib.Path, start: int):
    """Drops what a killed run logged after step `start`, where this one continues."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = path.with_suffix(".tmp")  # then renamed: a kill in between must not lose the log
    kept.write_text("".join(line for line in lines if _logged_step(line) <= start))
    kept.replace(path)
    self._file = path.open("a")
    self._board = tensorboardX.SummaryWriter(str(workdir), purge_step=start + 1)

  def write(self, step: int, scalars: dict[str, float]):
    """One line of the file and one point per scalar on the board, at once."""
    self._file.write(json.dumps({"step": step, **scalars}) + "\n")
    self._file.flush()
    for name, value in scalars.items():
      self._board.add_scalar(name, value, step)

  def close(self):
    """Closes both."""
    self._file.close()
    self._board.close()


def _logged_step(line: str) -> float:
  """The step of one line; a line cut off by a kill counts as never logged."""
  try:
    return json.loads(line)["step"]
  except ValueError:
    return float("inf")


@contextlib.contextmanager
def interruptible():
  """Yields a list that is non-empty after SIGINT or SIGTERM; a second signal acts as usual."""
  received: list[int] = []
  previous = {}

  def handle(number, frame):
    del frame
    received.append(number)
    signal.signal(number, previous[number] or signal.SIG_DFL)

  for number in (signal.SIGINT, signal.SIGTERM):
    previous[number] = signal.signal(number, handle)
  try:
    yield received
  finally:
    for number, old in previous.items():
      signal.signal(number, old or signal.SIG_DFL)


class Checkpoints:
  """The state and what determines it, written in the background; the newest `keep` stay.

  A checkpoint gets its name when all of it is on disk, so a half-written one is never read; the
  next run deletes it.
  """

  def __init__(self, workdir: pathlib.Path, keep: int, described: dict):
    """Opens `workdir`/checkpoints for the run that `described` determines."""
    self._workdir, self._described = workdir, described
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
    self._manager = ocp.CheckpointManager(workdir / "checkpoints", options=options)

  def save(self, step: int, state: training.TrainState):
    """Starts writing; returns once the state is copied and may be donated."""
    items = ocp.args.Composite(
      state=ocp.args.StandardSave(state), config=ocp.args.JsonSave(self._described)
    )
    self._manager.save(step, args=items, force=True)

  def restore(self, fresh: training.TrainState) -> training.TrainState:
    """The newest checkpoint, or `fresh` if there is none.

    Raises:
      OtherRunError: it belongs to another run.
    """
    latest = self._manager.latest_step()
    if latest is None:
      return fresh
    saved = self._manager.restore(latest, args=ocp.args.Composite(config=ocp.args.JsonRestore()))
    check_same_run(saved["config"], self._described, self._workdir)
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, fresh)
    args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
    return self._manager.restore(latest, args=args)["state"]

  def close(self):
    """Waits until what was saved is on disk."""
    self._manager.close()


def loop(config, state, *, step, validate, batch, metrics, save, signals) -> training.TrainState:
  """Steps until config.steps or a signal; saves at both, and every checkpoint_every steps."""
  start = logged = int(state.step)
  clock = time.perf_counter()
  interval = 0.2 if sys.stderr.isatty() else 30.0  # seconds; a file needs few progress lines
  bar = tqdm.tqdm(total=config.steps, initial=start, unit="step", mininterval=interval)
  for done in range(start + 1, config.steps + 1):
    state, scalars = step(state, batch(step=done - 1))
    last = done == config.steps or bool(signals)
    evaluated = done % config.eval_every == 0 or done == config.steps
    if evaluated or last or done % config.log_every == 0:
      row = {k: float(v) for k, v in scalars.items()}  # waits for the device
      seconds = time.perf_counter() - clock
      row["tokens_per_s"] = (done - logged) * config.batch_size * config.seq_len / seconds
      if evaluated:
        row["validation_loss"] = validate(state.variables)
      metrics.write(done, row)
      bar.set_postfix({k: f"{v:.4g}" for k, v in row.items() if k != "grad_norm"}, refresh=False)
      logged, clock = done, time.perf_counter()
    bar.update()
    if last or done % config.checkpoint_every == 0:
      save(done, state)
    if last:
      break
  bar.close()
  return state


def run(config: ConfigDict, workdir: pathlib.Path) -> training.TrainState:
  """Trains to config.steps, or to the first signal; continues what `workdir` holds."""
  workdir = workdir.absolute()  # orbax asks for it
  workdir.mkdir(parents=True, exist_ok=True)
  corpus = data.load()
  recipe = config.recipe and config.recipe()
  model = build(config.get("architecture", "transformer"), config.model)
  apply = apply_function(model, recipe)
  tx = training.optimizer(config.steps, **config.optimizer)
  size = {"batch_size": config.batch_size, "seq_len": config.seq_len}
  batch = functools.partial(data.batch, corpus, config.seed, **size)
  evaluate = training.make_evaluate(apply)
  held_out = list(data.eval_batches(corpus, n=config.eval_batches, **size))
  described = describe(config, recipe, corpus)
  with (
    contextlib.closing(Checkpoints(workdir, config.keep, described)) as checkpoints,
    interruptible() as signals,
  ):
    fresh = training.init_state(model, tx, batch(step=0)[:, :-1], config.seed)
    state = checkpoints.restore(fresh)
    if state.step:
      print(f"Continuing {workdir} at step {state.step}.")
    with contextlib.closing(Metrics(workdir, int(state.step))) as metrics:
      state = loop(
        config,
        state,
        step=training.make_step(apply, tx, config.seed),
        validate=lambda variables: evaluate(variables, held_out),
        batch=batch,
        metrics=metrics,
        save=checkpoints.save,
        signals=signals,
      )
  print(f"Step {state.step} of {config.steps}; checkpoints in {workdir}.")
  return state


def apply_function(model: nn.Module, recipe) -> training.Apply:
  """The float model, or the same model under a recipe."""
  if recipe is None:
    return cast(training.Apply, model.apply)  # Flax says that it may also return a tuple
  import jaxquant  # only here, so that a float run does not load what it does not use

  return jaxquant.quantized(model, recipe)


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
