"""What a training run keeps on disk: checkpoints, metrics, and which run they belong to."""

from __future__ import annotations

import contextlib
import json
import pathlib
import signal
from collections.abc import Callable, Iterator

import jax
import orbax.checkpoint as ocp
import tensorboardX

Tree = dict  # of arrays


class OtherRunError(ValueError):
  """The workdir holds a checkpoint of another run."""


def check_same_run(saved: dict, wanted: dict, workdir: pathlib.Path) -> None:
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

  def write(self, step: int, scalars: dict[str, float]) -> None:
    """One line of the file and one point per scalar on the board, at once."""
    self._file.write(json.dumps({"step": step, **scalars}) + "\n")
    self._file.flush()
    for name, value in scalars.items():
      self._board.add_scalar(name, value, step)

  def close(self) -> None:
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
def interruptible() -> Iterator[list[int]]:
  """Yields a list that is non-empty after SIGINT or SIGTERM; a second signal acts as usual."""
  received: list[int] = []
  previous = {}

  def handle(number: int, frame: object) -> None:
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
  """Named trees and what determines them, written in the background; the newest `keep` stay.

  A checkpoint gets its name when all of it is on disk, so a half-written one is never read; the
  next run deletes it.
  """

  def __init__(self, workdir: pathlib.Path, keep: int, described: dict):
    """Opens `workdir`/checkpoints for the run that `described` determines."""
    self._workdir, self._described = workdir, described
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
    self._manager = ocp.CheckpointManager(workdir / "checkpoints", options=options)

  def save(self, step: int, trees: dict[str, Tree]) -> None:
    """Starts writing; returns once the trees are copied and may be donated."""
    items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
    config = ocp.args.JsonSave(self._described)
    self._manager.save(step, args=ocp.args.Composite(config=config, **items), force=True)

  def restore(self, like: Callable[[int], dict[str, Tree]]) -> dict[str, Tree]:
    """The newest checkpoint, or `like(0)` if there is none.

    Args:
      like: the step of a checkpoint -> trees that look like what it holds.

    Raises:
      OtherRunError: it belongs to another run.
    """
    latest = self._manager.latest_step()
    if latest is None:
      return like(0)
    saved = self._manager.restore(latest, args=ocp.args.Composite(config=ocp.args.JsonRestore()))
    check_same_run(saved["config"], self._described, self._workdir)
    targets = jax.tree.map(ocp.utils.to_shape_dtype_struct, like(latest))
    items = {name: ocp.args.StandardRestore(target) for name, target in targets.items()}
    return dict(self._manager.restore(latest, args=ocp.args.Composite(**items)).items())

  def close(self) -> None:
    """Waits until what was saved is on disk."""
    self._manager.close()
