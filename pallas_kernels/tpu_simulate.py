"""Runs the scalar program of a compiled TPU kernel: cycles, HBM traffic and their overlap.

Each basic block of a listing becomes a Python function that moves the clock, the scalar registers
and the DMAs, so trip counts and bytes are those of the compiled program. Timing model:
  * a bundle is one cycle;
  * an HBM transfer takes bytes / (HBM_EFFICIENCY x bandwidth) in first-in first-out order and
    completes DMA_LATENCY later; a wait stalls until then.
Not modelled: strides, banks and ports, the interconnect, SparseCore, throttling.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import re
import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pallas_kernels.tpu_generations import Generation
from pallas_kernels.tpu_listing import (
  Assign,
  Branch,
  Call,
  Instruction,
  Listing,
  Store,
  Transfer,
  Translator,
  Wait,
  wrap,
)

DMA_LATENCY = 0.45e-6  # s; fitted to a published v5e timing of a 1024^3 matmul in 128-tiles
HBM_EFFICIENCY = 0.85  # reached / nominal bandwidth; fitted to published v5e and v6e timings
TOP = "TLP"  # the listing of the program that calls the kernels
STEPS = 5_000_000  # basic blocks after which a simulation is cut short
# SMEM words that the runtime writes: the core's index, and the run's number, a multiple of 1024 of
# which libtpu 0.0.51 reports to the host. The model is core 0 in run 0.
_RUNTIME = {0x4 // 4: 0, 0xFFFE8 // 4: 0}
_OWN = 1 << 60  # buffers of the n-th listing lie n times this far up, above all other addresses
_MARKS = 4096  # visits of a block that are remembered, for the median of a loop's step


def _select(condition, yes, no):
  # An unknown condition takes the guarded value: the path that does the work.
  return yes() if condition or condition is None else no()


def _negate(x):
  return None if x is None else not x


def _either(a, b):
  return True if a or b else (None if a is None or b is None else False)


def _both(a, b):
  unknown = (a is None and b is not False) or (b is None and a is not False)
  return None if unknown else a and b


ALGEBRA = {"select": _select, "negate": _negate, "either": _either, "both": _both, "wrap": wrap}


def _known(expression: Callable):
  """The value of an expression; None if an operand is unknown (arithmetic with None raises)."""
  try:
    return expression()
  except TypeError:
    return None


@dataclasses.dataclass(frozen=True)
class KernelRun:
  """What one call of one kernel did.

  Attributes:
    name: as in the compiled program.
    cycles: from the first bundle to the last, stalls included.
    executed, static: bundles run, and in the listing.
    steps, step_cycles: repeats of the outermost loop's first block (the first trip may belong to
      the block before it) and the median cycles from one to the next.
    mxu_busy: share of the matrix units' cycles taken by products.
    slots: unit -> share of its slots used over the executed bundles.
    spills, fills: instructions in the listing; loop_spills, loop_fills: those that run repeatedly.
    vmem_bytes: all VMEM allocations.
    unmodelled: scalar instructions taken as unknown.
  """

  name: str
  cycles: float
  executed: int
  static: int
  steps: int
  step_cycles: float
  mxu_busy: float
  slots: Mapping[str, float]
  spills: int
  fills: int
  loop_spills: int
  loop_fills: int
  vmem_bytes: int
  unmodelled: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Run:
  """What a program did: its clock, its kernels, its HBM bytes."""

  cycles: float
  kernels: tuple[KernelRun, ...]
  read_bytes: int
  written_bytes: int
  unknown_branches: int
  truncated: bool


@dataclasses.dataclass(frozen=True)
class _Block:
  run: Callable[[float, _Frame], tuple[float, int]]
  start: int
  stop: int


class _Kernel:
  """The translation of one listing, shared by all its calls."""

  def __init__(self, listing: Listing, generation: Generation, number: int):
    self.listing, self.generation, self.number = listing, generation, number
    self.translator = Translator(listing.bundles, listing.fixed, number * _OWN)
    self._blocks: dict[int, _Block] = {}

  @functools.cached_property
  def matmul_cycles(self) -> np.ndarray:
    """Cycles for which the products that each bundle starts hold a matrix unit."""
    return np.array([sum(map(self._holds, bundle)) for bundle in self.listing.bundles], np.int64)

  def _holds(self, text: str) -> int:
    if not (match := re.search(r"= vmatmul\.?([\w.]*)", text)):
      return 0
    packed = self.generation.matmul_cycles
    return packed // 2 if "f32" in match[1] else packed

  def block(self, start: int) -> _Block:
    if start not in self._blocks:
      self._blocks[start] = self._translate(start)
    return self._blocks[start]

  def _translate(self, start: int) -> _Block:
    """From `start` to the first branch and its delay slots."""
    bundles, last = self.listing.bundles, len(self.listing.bundles) - 1
    lines, branch, stop, i = [], None, last + 1, start
    while i < stop:
      instructions = [x for text in bundles[i] if (x := self.translator.translate(text))]
      taken = [x for x in instructions if isinstance(x, Branch)]
      if taken and branch is None:
        branch, stop = taken[0], min(i + self.generation.delay_slots, last) + 1
        instructions[instructions.index(branch)] = Assign("T[0]", branch.guard)
        skip = self._skips(i, branch.bundle)
      lines += _bundle_source(instructions, i - start)
      i += 1
    following = f"({branch.bundle} if m.taken(T[0],{skip}) else {i})" if branch else str(last + 1)
    source = ["def block(t, m):", "  S, P, T = m.scalars, m.predicates, m.branch"]
    source += [f"  {line}" for line in [*lines, f"return t+{i - start}, {following}"]]
    space = dict(ALGEBRA)
    exec("\n".join(source), space)
    return _Block(space["block"], start, i)

  def _skips(self, start: int, stop: int) -> bool:
    """Whether an unknown branch is taken: forward, over anything but a kernel.

    The top level tests the runtime's state. Such a test must not skip a kernel, but it does skip
    the conditional copy that XLA emits for an output that may alias a donated buffer. Inside a
    kernel a branch that depends on data guards what is rare (NaN in a tile): it is not run.
    """
    if stop <= start:
      return False
    return not any("inlined_call" in x for b in self.listing.bundles[start:stop] for x in b)


def _bundle_source(instructions: Sequence[Instruction], k: int) -> list[str]:
  """Python lines of one bundle, k cycles after its block's start: all reads precede all writes."""
  effects, assigned = [], []
  for x in instructions:
    match x:
      case Assign():
        assigned.append(x)
      case Transfer():
        spaces = f"{x.source!r},{x.target!r}"
        effects.append(f"m.transfer(t+{k},{x.guard},{spaces},lambda:[{','.join(x.operands)}])")
      case Wait():
        effects.append(f"t=m.wait(t+{k},{x.guard},lambda:[{','.join(x.operands)}])-{k}")
      case Store():
        effects.append(f"m.store({x.guard},lambda:({x.address},{x.value}))")
      case Call():
        effects.append(f"t=m.call(t+{k},{x.kernel!r})-{k}")
  if assigned:
    targets, values = ",".join(x.target for x in assigned), ",".join(x.value for x in assigned)
    one_by_one = ",".join(f"lambda:{x.value}" for x in assigned)
    effects += [
      f"try: {targets} = {values}",
      f"except TypeError: {targets}, = m.each({one_by_one})",
    ]
  return effects


class _Frame:
  """The machine's state during one call of a kernel: registers, semaphores, counters; its SMEM."""

  def __init__(self, machine: Machine, kernel: _Kernel):
    self.machine, self.kernel = machine, kernel
    self.scalars, self.predicates, self.branch = [None] * 64, [None] * 32, [False]
    self.memory = machine.memory
    self.semaphores = collections.defaultdict(collections.deque)
    self.tags = {self.operand(i) << shift: i for i in range(64) for shift in (0, 4)}
    self.count = collections.Counter()
    self.marks = collections.defaultdict(list)

  @staticmethod
  def operand(i: int) -> int:
    """The address of the kernel's i-th operand: above all addresses that a program computes."""
    return (1 << 50) + (i << 40)

  def value(self, i: int) -> int:
    """The value of a scalar operand."""
    values = self.machine.scalars.get(i)
    return int(values.flat[0]) if values is not None and values.size else 0

  def each(self, *expressions: Callable) -> list:
    return [_known(e) for e in expressions]

  def taken(self, condition: bool | None, skip: bool) -> bool:
    if condition is None:
      self.machine.unknown_branches += 1
      return skip
    return condition

  def store(self, guard, operands: Callable) -> None:
    if guard is not False and (pair := _known(operands)) and pair[0] is not None:
      self.memory[pair[0]] = pair[1]

  def call(self, t: float, name: str) -> float:
    return self.machine.call(t, name)

  def transfer(self, t: float, guard, source: str, target: str, operands: Callable) -> None:
    if guard is False or not (a := _known(operands)) or "host" in source + target:
      return
    granules = a[1] or 0
    done = self.machine.transfer(t, granules, source, target)
    if len(a) > 3 and a[3] is not None:
      self.semaphores[a[3]].append([done, granules])
    if target == "smem" and a[0] in self.tags and a[2] is not None:
      self._prefetch(self.tags[a[0]], a[2])

  def _prefetch(self, operand: int, address: int) -> None:
    """Scalar-prefetch values into SMEM; rows of a 2-D array are padded to 128 words."""
    values = self.machine.scalars.get(operand, np.zeros(0, np.int32))
    length = values.shape[-1] if values.ndim > 1 else values.size or 1
    pitch = -(-length // 128) * 128 if values.ndim > 1 else length
    for n, value in enumerate(values.ravel().tolist()):
      self.memory[address + n // length * pitch + n % length] = value

  def wait(self, t: float, guard, operands: Callable) -> float:
    if guard is False or not (a := _known(operands)):
      return t
    queue, needed = self.semaphores[a[0]], a[1] or 0
    while queue and needed > 0:
      done, granules = queue[0]
      t = max(t, done)
      if granules > needed:
        queue[0][1] -= needed
      else:
        queue.popleft()
      needed = max(0, needed - granules)
    return t


class Machine:
  """One TensorCore with its share of HBM; runs each listing that the program calls."""

  def __init__(
    self, listings: Mapping[str, Listing], generation: Generation, scalars: Mapping[int, np.ndarray]
  ):
    self.generation = generation
    self.scalars = {i: np.asarray(v) for i, v in scalars.items()}
    self.kernels = {
      name: _Kernel(listing, generation, n) for n, (name, listing) in enumerate(listings.items(), 1)
    }

  def run(self, latency: float = DMA_LATENCY, bandwidth: float | None = None) -> Run:
    """Args: seconds and bytes/s of a DMA; 0 and infinity leave the compute time alone."""
    generation = self.generation
    bandwidth = bandwidth or generation.hbm * HBM_EFFICIENCY
    self.bytes_per_cycle = bandwidth / generation.clock
    self.latency = latency * generation.clock
    self.hbm_free, self.executed, self.steps, self.unknown_branches = 0.0, 0, 0, 0
    self.truncated, self.traffic, self.runs = False, collections.Counter(), []
    self.memory = dict(_RUNTIME)
    cycles = self.call(0.0, TOP)
    return Run(
      cycles=cycles,
      kernels=tuple(k for k in self.runs if k.name != TOP and not k.name.startswith("<late")),
      read_bytes=self.traffic["read"],
      written_bytes=self.traffic["written"],
      unknown_branches=self.unknown_branches,
      truncated=self.truncated,
    )

  def transfer(self, t: float, granules: int, source: str, target: str) -> float:
    """-> the time at which a DMA that starts at t is complete."""
    if "hbm" not in (source, target):
      return t + self.latency
    size = granules * self.generation.granule
    self.hbm_free = max(t, self.hbm_free) + size / self.bytes_per_cycle
    self.traffic["read" if source == "hbm" else "written"] += size
    return self.hbm_free + self.latency

  def call(self, t: float, name: str) -> float:
    """Run a listing from time t; -> the time at its end. Callees without a listing are free."""
    if name not in self.kernels:
      return t
    kernel = self.kernels[name]
    self._forget(kernel)
    frame, begin, executed = _Frame(self, kernel), t, self.executed
    at, end = 0, len(kernel.listing.bundles)
    while at < end and not self.truncated:
      block = kernel.block(at)
      frame.count[at] += 1
      if len(frame.marks[at]) < _MARKS:
        frame.marks[at].append(t)
      self.executed += block.stop - block.start
      self.steps += 1
      t, at = block.run(t, frame)
      self.truncated |= self.steps > STEPS
    self.runs.append(_summary(kernel, frame, t - begin, self.executed - executed))
    return t

  def _forget(self, kernel: _Kernel) -> None:
    """Empties a kernel's own SMEM; that of its callers and the runtime's keeps what is in it."""
    for address in [a for a in self.memory if a // _OWN == kernel.number]:
      del self.memory[address]


def _summary(kernel: _Kernel, frame: _Frame, cycles: float, executed: int) -> KernelRun:
  listing, slots = kernel.listing, kernel.listing.slots
  times = np.zeros(len(listing.bundles), np.int64)
  for start, count in frame.count.items():
    block = kernel.block(start)
    times[block.start : block.stop] += count
  rows = np.zeros((len(times), len(slots.units)), np.int64)
  known = slots.rows[: len(times)]
  rows[: len(known)] = np.reshape(known, (len(known), len(slots.units)))
  static = dict(zip(slots.units, rows.sum(0).tolist()))
  looped = dict(zip(slots.units, rows[times > 1].sum(0).tolist()))
  used = (times @ rows).tolist()
  busy = int(times @ kernel.matmul_cycles)
  loops = [start for start, marks in frame.marks.items() if len(marks) > 2]
  steps, step_cycles = 1, cycles
  if loops:  # the outermost loop's header is the earliest block that repeats
    marks = frame.marks[min(loops)]
    steps = frame.count[min(loops)]
    step_cycles = statistics.median(b - a for a, b in itertools.pairwise(marks))
  return KernelRun(
    name=listing.name,
    cycles=cycles,
    executed=executed,
    static=len(listing.bundles),
    steps=steps,
    step_cycles=step_cycles,
    mxu_busy=busy / max(1, executed * (slots.capacity or (1,))[0]),
    slots={u: d / max(1, executed * c) for u, d, c in zip(slots.units, used, slots.capacity)},
    spills=static.get("VSTORE:SPILL", 0),
    fills=static.get("VLOAD:FILL", 0),
    loop_spills=looped.get("VSTORE:SPILL", 0),
    loop_fills=looped.get("VLOAD:FILL", 0),
    vmem_bytes=listing.vmem_bytes,
    unmodelled=tuple(sorted(kernel.translator.unmodelled)),
  )
