"""The compiler's VLIW listings as data, and their scalar instructions as Python expressions.

libtpu dumps three files for every kernel; the model reads
  *-packed-bundles-post-ra.txt   the schedule: one bundle is one cycle, empty ones are latency;
  *-static-per-bundle-utilization.txt   slots used by each bundle;
  *-00-original.txt              the allocations: the VMEM size, and the SMEM at fixed addresses.
A bundle is `0x12 LB: > { %s3_s1 = sadd.s32 1, %s2_s0  ;;  ... }`: values carry their register
(`_s1` scalar register 1, `_p0` predicate 0), a guard stands in parentheses: `(!%p4_p0, default)`.

Only what steers loops and DMAs is translated: integer scalars, predicates, SMEM, branches, DMA
starts and waits. Vector instructions cost their bundle and have no value. In the expressions S and
P are the register files, None is a value that only hardware knows, and the other names are those
of `tpu_simulate.ALGEBRA`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|\d+)\s+(?:\w\w)?\s*:\s*[> ]*\{(.*)\}", re.S)
_BUNDLE_START = re.compile(r"\n(?=\s*(?:0x[0-9a-f]+|0)\s+(?:\w\w)?\s*:)")
_SCALAR = re.compile(r"%s\w+_s(\d+)")
_GUARD = re.compile(r"\(\s*(!?%p\w+_p\d+)(?:\s*,\s*([^()]*))?\)")
_LOW32 = "4294967295"

_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_BINARY = {
  "sadd": "{}+{}",
  "ssub": "{}-{}",
  "smul": "wrap({}*{})",
  "sand": "{}&{}",
  "sor": "{}|{}",
  "sxor": "{}^{}",
  "sshll": "wrap({}<<{})",
  "sshrl": f"({{}}&{_LOW32})>>{{}}",
  "sshra": "{}>>{}",
  "smin": "min({},{})",
  "smax": "max({},{})",
  "scalar_lea": "{}+{}",
  "por": "either({},{})",
  "pand": "both({},{})",
  "pnor": "negate(either({},{}))",
  "pnand": "negate(both({},{}))",
  "pxor": "{}!={}",
}


def wrap(x: int) -> int:
  """A 32-bit signed integer; operand addresses, which the model puts above 2^48, stay whole."""
  return (x + (1 << 31)) % (1 << 32) - (1 << 31) if -1 << 48 < x < 1 << 48 else x


@dataclasses.dataclass(frozen=True)
class Assign:
  """A register takes the value of an expression."""

  target: str
  value: str


@dataclasses.dataclass(frozen=True)
class Branch:
  """Go to a bundle, after the delay slots, where the guard holds."""

  guard: str
  bundle: int


@dataclasses.dataclass(frozen=True)
class Transfer:
  """A DMA: operands are source, size in granules, target, semaphore, strides."""

  guard: str
  source: str
  target: str
  operands: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Wait:
  """Stall until a semaphore has got so many granules."""

  guard: str
  operands: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Store:
  """A scalar goes to SMEM."""

  guard: str
  address: str
  value: str


@dataclasses.dataclass(frozen=True)
class Call:
  """Another listing runs: a fusion or a Pallas kernel."""

  kernel: str
  operands: tuple[str, ...]


Instruction = Assign | Branch | Transfer | Wait | Store | Call


@dataclasses.dataclass(frozen=True)
class SlotUse:
  """Slots of each unit: how many there are, and how many each bundle takes (`rows[bundle]`)."""

  units: tuple[str, ...] = ()
  capacity: tuple[int, ...] = ()
  rows: tuple[tuple[int, ...], ...] = ()


@dataclasses.dataclass(frozen=True)
class Listing:
  """One kernel: its bundles, each a list of instruction texts without comments.

  `fixed` has the SMEM buffers whose address, in words, is the same in all listings.
  """

  name: str
  bundles: tuple[tuple[str, ...], ...]
  slots: SlotUse
  vmem_bytes: int
  fixed: Mapping[str, int] = dataclasses.field(default_factory=dict)


def parse_bundles(text: str) -> tuple[tuple[str, ...], ...]:
  """The bundles of a listing; comments go, but the callee's name, which stands in one, is kept."""
  if "inlined_call" in text:
    text = re.sub(r"/\* (%?[^ =]+) = .*?\*/", r" @\1", text)
    text = re.sub(r"inlined_call /\* (<[^>]*>) \*/", r"inlined_call @\1", text)
  text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
  matches = (_BUNDLE.match(chunk) for chunk in _BUNDLE_START.split(text))
  return tuple(
    tuple(part.strip() for part in match[1].split(" ;; ") if part.strip())
    for match in matches
    if match
  )


def parse_slots(text: str) -> SlotUse:
  """The utilization file: a title, unit names, capacities, then one row for each bundle."""
  head, body = text.split("== UTILIZATION:\n")
  units, capacity = head.splitlines()[1:3]
  return SlotUse(
    tuple(unit.strip() for unit in units.split(",")),
    tuple(map(int, capacity.split())),
    tuple(tuple(map(int, line.split())) for line in body.splitlines()),
  )


def parse_vmem(text: str) -> int:
  """Bytes of all VMEM allocations of a kernel."""
  return sum(int(size, 16) for size in re.findall(r"space=vmem, size = (0x[0-9a-f]+)", text))


def parse_fixed(text: str) -> dict[str, int]:
  """SMEM buffers at absolute addresses -> their word: the core's index, the runtime's state."""
  pattern = r"(#allocation\d+) \[[^\n]*space=smem, size = \w+, offset = (\w+), fixed_abs"
  return {name: int(offset, 16) // 4 for name, offset in re.findall(pattern, text)}


def _first(folder: Path, pattern: str) -> str | None:
  found = sorted(folder.glob(pattern))
  return found[0].read_text() if found else None


def read_listings(folder: Path) -> dict[str, Listing]:
  """All kernels that were dumped into a folder, by name; "TLP" is the program that calls them."""
  listings = {}
  for path in sorted(folder.glob("*[0-9]-packed-bundles-post-ra.txt")):
    number, name = re.match(r"(\d+)-(.*)-\d+-packed", path.name).groups()
    stem = "".join(f"[{c}]" if c in "[?*" else c for c in f"{number}-{name}")
    slots = _first(folder, f"{stem}-*pre-delay_hlo*")
    original = _first(folder, f"{stem}-0*-original.txt")
    listings[name] = Listing(
      name,
      parse_bundles(path.read_text()),
      parse_slots(slots) if slots else SlotUse(),
      parse_vmem(original) if original else 0,
      parse_fixed(original) if original else {},
    )
  return listings


class Translator:
  """Instruction texts of one kernel -> Instructions.

  Args:
    bundles: those of the listing.
    fixed: as in Listing.
    base: where the model puts the listing's other buffers.

  Attributes:
    allocations: symbolic SMEM and semaphore buffers -> the address that the model gives them.
    unmodelled: scalar instructions whose results are taken as unknown.
  """

  def __init__(
    self, bundles: Iterable[Iterable[str]], fixed: Mapping[str, int] | None = None, base: int = 0
  ):
    self.allocations: dict[str, int] = {}
    self._fixed, self._base = fixed or {}, base
    self.unmodelled: set[str] = set()
    self._spaces = dict(_pointer_spaces(bundles))

  def address(self, buffer: str) -> int:
    """Where a symbolic buffer such as `#allocation3` lies; buffers are 2^20 apart."""
    if buffer in self._fixed:
      return self._fixed[buffer]
    return self.allocations.setdefault(buffer, self._base + ((len(self.allocations) + 1) << 20))

  def translate(self, text: str) -> Instruction | None:
    """One instruction, or None for those without a part in the scalar program."""
    if not (match := re.match(r"(%\S+) = (\S+)\s*(.*)", text, re.S)):
      return None
    result, op, rest = match.groups()
    if op == "inlined_call":
      callee = re.search(r"@(\S+)", rest)
      operands = tuple(f"S[{register}]" for register in _SCALAR.findall(rest))
      return Call(callee[1].lstrip("%") if callee else "?", operands)
    if op.startswith("inlined_call_operand"):
      return self._parameter(result, op, rest)
    guard, default, rest = self._guarded(rest)
    if op == "sbr.rel":
      return Branch(guard or "True", int(re.search(r"bundleno = (\d+)", rest)[1]))
    if op == "sst":
      match = re.match(r"\[smem:(.*)\]\s*,?\s*(\S+)$", rest.strip(), re.S)
      value = match and Store(guard or "True", self._value(f"[{match[1]}]"), self._value(match[2]))
      return value or None
    operands = tuple(
      self._value(token)
      for token in re.split(r",(?![^\[]*\])", rest.strip().lstrip(","))
      if token.strip()
    )
    if op.startswith("dma."):
      return self._dma(op, guard or "True", rest, operands)
    return self._assign(result, op, guard, default, operands)

  def _parameter(self, result: str, op: str, rest: str) -> Assign | None:
    register = re.match(_SCALAR, result)
    # A scalar operand has no memory space: the register holds its value, not its address.
    kind = "value" if "<no" in op else "operand"
    index = re.search(r"index: (\d+)", rest)
    return Assign(f"S[{register[1]}]", f"m.{kind}({index[1]})") if register else None

  def _guarded(self, rest: str) -> tuple[str | None, str | None, str]:
    """-> (guard, value where it does not hold, the rest of the instruction)."""
    rest = re.sub(r"\[(?:thread|resolvable|vst_source)[^\]]*\]", "", rest)
    guard = default = None
    if match := _GUARD.search(rest):
      guard = self._value(match[1])
      default = self._value(match[2]) if match[2] else None
      rest = rest[: match.start()] + rest[match.end() :]
    return guard, default, rest.split(" @")[0]

  def _dma(
    self, op: str, guard: str, rest: str, operands: tuple[str, ...]
  ) -> Transfer | Wait | None:
    if op == "dma.done.wait":
      return Wait(guard, operands)
    if op == "dma.general":  # a strided descriptor: the spaces come from the pointer casts
      pointers = re.findall(r"%s\w+_s\d+", rest)
      if len(pointers) < 3:
        return None
      spaces = [self._spaces.get(pointers[i], "?") for i in (0, 2)]
      return Transfer(guard, *spaces, operands)
    if "_to_" not in op:
      return None
    source, target = op.removeprefix("dma.").split("_to_")
    return Transfer(guard, source, target.split(".")[0], operands)

  def _assign(
    self, result: str, op: str, guard: str | None, default: str | None, operands: tuple[str, ...]
  ) -> Assign | None:
    register = re.match(r"%([sp])\w+_[sp](\d+)$", result)
    if not register or op in ("sphi", "pphi") or op.startswith("int_to_ptr"):
      return None  # phis and casts name a register again, they do not change it
    target = f"{register[1].upper()}[{register[2]}]"
    value = self._expression(op, operands)
    if guard:
      value = f"select({guard},lambda:{value},lambda:{default or target})"
    return Assign(target, value)

  def _expression(self, op: str, a: tuple[str, ...]) -> str:
    root, _, kind = op.partition(".")
    is_float = ".f32" in op
    if root in ("smin", "smax") and ".u32" in op:
      return f"wrap({root[1:]}({a[0]}&{_LOW32},{a[1]}&{_LOW32}))"
    if root in _BINARY and len(a) == 2 and not is_float:
      return _BINARY[root].format(*a)
    if root == "scmp" and not is_float:  # +0 makes an unknown operand raise instead of compare
      cast = f"&{_LOW32}" if ".u32" in op else "+0"
      return f"({a[0]}){cast} {_COMPARE[kind.split('.')[0]]} ({a[1]}){cast}"
    # reloc n: where the linker puts word n of the program's registry, which is an array here
    if root in ("smov", "pmov", "scalar_parameter_address", "reloc"):
      return a[0] if a else "None"
    if root == "pneg":
      return f"negate({a[0]})"
    if root == "scalar_select":
      return f"select({a[0]},lambda:{a[1]},lambda:{a[2]})"
    if root == "sld":
      return f"m.memory.get({a[0]})"
    self.unmodelled.add(op)
    return "None"

  def _value(self, token: str) -> str:
    """The expression of one operand."""
    token = re.sub(r"(\S)\s+\[#.*$", r"\1", token.strip())  # a note about its allocation follows
    if match := _SCALAR.fullmatch(token):
      return f"S[{match[1]}]"
    if match := re.fullmatch(r"(!?)%p\w+_p(\d+)", token):
      return f"negate(P[{match[2]}])" if match[1] else f"P[{match[2]}]"
    if re.fullmatch(r"-?\d+", token):
      return str(wrap(int(token)))
    if match := re.fullmatch(r"\$?(0x[0-9a-f]+)", token):
      return str(int(match[1], 16))
    if token.startswith("["):
      terms = token.replace("smem:", "").strip("[]").split("+")
      return "+".join(
        str(self.address(term.strip())) if "#" in term else self._value(term) for term in terms
      )
    return "None"


def _pointer_spaces(bundles: Iterable[Iterable[str]]) -> Iterator[tuple[str, str]]:
  pointer = re.compile(r"^(%s\w+_s\d+) = (?:int_to_ptr|scalar_lea|inlined_call_operand)\.(\w+)")
  for bundle in bundles:
    for text in bundle:
      if match := pointer.match(text):
        yield match[1], match[2]
