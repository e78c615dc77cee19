"""Measurements kept on disk, so that a command that was killed goes on where it stopped.

One JSON line per measurement with the key that determines it: the recipe down to its functions'
code, the digest of the model, the settings.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import json
import os
import pathlib
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from types import FunctionType

import flax
import jax
import numpy as np

RESET = pathlib.Path("/proc/self/clear_refs")
STATUS = pathlib.Path("/proc/self/status")


class Results:
  """Found values by key; appended to a file as they come."""

  def __init__(self, path: pathlib.Path):
    """Reads what is there; a last line that was cut off is measured again."""
    self._path, self._found = path, {}
    if path.exists():
      for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
          row = json.loads(line)
          self._found[_text(row["key"])] = row["found"]

  def __len__(self) -> int:
    """How many values there are."""
    return len(self._found)

  def get(self, key: Mapping) -> dict | None:
    """The value of a key, or None."""
    return self._found.get(_text(key))

  def put(self, key: Mapping, found: Mapping) -> None:
    """Keeps a value; it is on disk when this returns."""
    self._found[_text(key)] = dict(found)
    self._path.parent.mkdir(parents=True, exist_ok=True)
    torn = self._path.exists() and not self._path.read_bytes().endswith(b"\n")
    with self._path.open("a") as out:
      out.write("\n" * torn + json.dumps({"key": key, "found": found}) + "\n")


def _text(key: Mapping) -> str:
  return json.dumps(key, sort_keys=True)


def fingerprint(value: object) -> str:
  """A digest of what a value says and of the code of the functions in it; no addresses.

  A function that those functions call may change without a trace here.

  Example:
    >>> fingerprint((1, len)) == fingerprint((1, len)) != fingerprint((2, len))
    True
  """
  return hashlib.sha256(repr(_described(value)).encode()).hexdigest()[:16]


def _described(value: object) -> object:
  """Nested tuples of strings."""
  if isinstance(value, functools.partial):
    return ("partial", *map(_described, (value.func, value.args, value.keywords)))
  if isinstance(value, FunctionType):
    code = value.__code__
    cells = [c.cell_contents for c in value.__closure__ or () if c.cell_contents is not value]
    inside = [c for c in code.co_consts if not hasattr(c, "co_code")]
    parts = (inside, cells, value.__defaults__, value.__kwdefaults__)
    return (value.__module__, value.__qualname__, code.co_code.hex(), *map(_described, parts))
  if hasattr(value, "__wrapped__"):
    return ("wrapped", _described(value.__wrapped__))
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    told = [f.name for f in dataclasses.fields(value) if not _is_off(f, getattr(value, f.name))]
    return (type(value).__qualname__, *((name, _described(getattr(value, name))) for name in told))
  if isinstance(value, Mapping):
    return tuple((_described(k), _described(v)) for k, v in value.items())
  if isinstance(value, (tuple, list)):
    return tuple(map(_described, value))
  if isinstance(value, (np.ndarray, jax.Array)):
    array = np.asarray(value)
    return (str(array.dtype), array.shape, hashlib.sha256(array.tobytes()).hexdigest())
  return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _is_off(field: dataclasses.Field, value: object) -> bool:
  """None or False by default: a part that a class gains later makes no older measurement new."""
  return value is field.default and (value is None or value is False)


@dataclasses.dataclass
class Cost:
  """What a piece of work took.

  Attributes:
    seconds: wall time, compilation included.
    peak_bytes: largest resident size of the process meanwhile; of its whole life where the system
      cannot tell.
  """

  seconds: float = 0.0
  peak_bytes: int = 0


@contextlib.contextmanager
def cost() -> Iterator[Cost]:
  """Times what runs inside; its peak memory is that of this process alone."""
  found = Cost()
  with contextlib.suppress(OSError):
    RESET.write_text("5")  # the peak starts again from the present size (Linux)
  start = time.perf_counter()
  yield found
  found.seconds = time.perf_counter() - start
  found.peak_bytes = _peak()


def _peak() -> int:
  """The high-water mark of the resident size."""
  if STATUS.exists():
    line = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
    if line:
      return 1024 * int(line[1])
  unit = 1 if sys.platform == "darwin" else 1024
  return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def commit() -> str:
  """The commit that is checked out, or "unknown"; ask before what takes time, in which it moves."""
  git = ["git", "rev-parse", "--short", "HEAD"]
  with contextlib.suppress(OSError):
    found = subprocess.run(git, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"
  return "unknown"


def made_with() -> str:
  """Date, versions and machine, for the head of a table."""
  return (
    f"{datetime.date.today()}, jax {jax.__version__}, flax {flax.__version__}, "
    f"Python {platform.python_version()}, {os.cpu_count()} CPU cores"
  )
