"""Rule: what happens to the six operands of a training matmul, as a value.

y = x w        fprop: x blocked along K, w along K
dx = g w^T     dgrad: g along N, w^T along N
dw = x^T g     wgrad: x^T along M, g along M
"""

from __future__ import annotations

import dataclasses
import enum

from jaxquant.estimators import Estimator
from jaxquant.formats import Format
from jaxquant.ops.tracked import HotChannels, Learned, Static, Tracked
from jaxquant.rounding import Rounding, nearest_even, stochastic
from jaxquant.scales import ScaleRule


class Source(enum.Enum):
  """Which tensor a backward operand is made from."""

  ORIGINAL = "original"  # the tensor before forward quantization
  FORWARD = "forward"  # what the forward GEMM saw: the exact gradient of fake quant under STE


@dataclasses.dataclass(frozen=True)
class Rotation:
  """Block Hadamard along the contraction; both operands of a GEMM share it, so it cancels.

  Attributes:
    block: size, a power of two.
    signs: +1 and -1 per element of the block; None: no signs.
    random: fresh signs for every call, from the key.
  """

  block: int
  signs: tuple[int, ...] | None = None
  random: bool = False


@dataclasses.dataclass(frozen=True)
class Operand:
  """What happens to one operand of one GEMM.

  Attributes:
    fmt: the format; None leaves the operand in high precision.
    scales: scale rule; None: the format's own. A rule with state, such as `Delayed`, keeps it in
      the collection "quant" (`jaxquant.state`).
    rounding: of the elements.
    rotation: along the contraction, before quantization.
    source: for backward operands, what is quantized.
    gradient: for forward operands, what passes back through the quantizer (`jaxquant.estimators`);
      None: everything, the straight-through estimator.
  """

  fmt: Format | None = None
  scales: ScaleRule | Tracked | None = None
  rounding: Rounding = nearest_even
  rotation: Rotation | None = None
  source: Source = Source.ORIGINAL
  gradient: Estimator | None = None

  @property
  def random(self) -> bool:
    """Whether it needs a key."""
    turns = self.rotation is not None and self.rotation.random
    return turns or self.rounding is stochastic or getattr(self.scales, "random", False)

  def __str__(self) -> str:
    """`nvfp4+sr+rht16`, or `-` for high precision."""
    if self.fmt is None:
      return "-" if self.source is Source.ORIGINAL else "-(fwd)"
    parts = [str(self.fmt)]
    parts += [_name(self.scales)] if self.scales else []
    parts += [{"stochastic": "sr"}.get(self.rounding.__name__, self.rounding.__name__)] * (
      self.rounding is not nearest_even
    )
    parts += [f"rht{self.rotation.block}"] if self.rotation else []
    parts += [self.gradient.__name__] if self.gradient else []
    return "+".join(parts) + "(fwd)" * (self.source is Source.FORWARD)


def _inner(rule: Tracked) -> ScaleRule | None:
  return rule.rule if isinstance(rule, Static) else None


def _name(rule: object) -> str:
  return getattr(rule, "__name__", None) or str(rule)


STE = Operand(source=Source.FORWARD)


OPERANDS = ("x", "w", "dgrad_g", "dgrad_w", "wgrad_x", "wgrad_g")


@dataclasses.dataclass(frozen=True)
class Rule:
  """The six operands of a training matmul. The default is no quantization at all.

  A rule that names only `x` and `w` trains through them with the straight-through estimator: the
  backward GEMMs see the quantized forward operands, in high precision.

  Attributes:
    x: forward activations, blocked along K.
    w: forward weight, blocked along K.
    dgrad_g: output gradient in dx = g w^T, blocked along N.
    dgrad_w: weight in dx = g w^T, blocked along N.
    wgrad_x: activations in dw = x^T g, blocked along M.
    wgrad_g: output gradient in dw = x^T g, blocked along M.
    patch: channels whose residuals go into y again.
    learned: a quantizer with parameters of its own, between the inputs and the six operands.
    keep_packed: what the backward pass needs of quantized x and w (`Source.FORWARD`) is kept in the
      format's container: the same values in its bits instead of 32, for the time of packing.
  """

  x: Operand = Operand()
  w: Operand = Operand()
  dgrad_g: Operand = Operand()
  dgrad_w: Operand = STE
  wgrad_x: Operand = STE
  wgrad_g: Operand = Operand()
  patch: HotChannels | None = None
  learned: Learned | None = None
  keep_packed: bool = False

  def __post_init__(self) -> None:
    """Raises ValueError for operands that cannot go together."""
    for name, a, b in (
      ("x/w", self.x, self.w),
      ("dgrad_g/dgrad_w", self.dgrad_g, self.dgrad_w),
      ("wgrad_x/wgrad_g", self.wgrad_x, self.wgrad_g),
    ):
      if a.rotation != b.rotation:
        raise ValueError(
          f"Rule: {name} share a contraction, so they share its rotation; "
          f"got {a.rotation} and {b.rotation}"
        )

    if self.patch and (self.x.fmt is None or self.w.fmt is None or self.x.rotation):
      raise ValueError(
        "Rule: a patch repairs the residuals of x and w, so both have a format and no rotation; "
        f"got x {self.x}, w {self.w}"
      )
    if self.patch and self.patch.wgrad and None in (self.wgrad_x.fmt, self.wgrad_g.fmt):
      raise ValueError(
        "Rule: a patch of wgrad repairs the residuals of its operands, so both have a format; got "
        f"wgrad_x {self.wgrad_x}, wgrad_g {self.wgrad_g}"
      )
    for name, operand in self.operands.items():
      if isinstance(operand.scales, Static) and name != "x":
        raise ValueError(f"Rule: static ranges are those of x; {name} has none to calibrate")
      if operand.gradient and (name not in ("x", "w") or operand.fmt is None):
        raise ValueError(
          f"Rule: only quantized x and w have gradients to estimate, not {name} ({operand})"
        )

  @property
  def operands(self) -> dict[str, Operand]:
    """The six by name."""
    return {name: getattr(self, name) for name in OPERANDS}

  @property
  def tracked(self) -> dict[str, Tracked | HotChannels]:
    """What keeps state from step to step, by the name of its operand; the patch is "patch"."""
    scales = {n: o.scales for n, o in self.operands.items() if isinstance(o.scales, Tracked)}
    return scales | ({"patch": self.patch} if self.patch else {})

  @property
  def has_state(self) -> bool:
    """Whether a site of this rule needs an entry in the collection "quant"."""
    return bool(self.tracked) or self.learned is not None

  @property
  def is_static(self) -> bool:
    """Whether the range of x comes from calibration data."""
    return isinstance(self.x.scales, Static)

  def without_state(self, *, static: bool = True) -> Rule:
    """The rule with current scales for delayed ones, and no patch: for packed weights.

    Args:
      static: whether static ranges stay; packed weights need them too.
    """
    trackers = {n: t for n, t in self.tracked.items() if not (static and isinstance(t, Static))}
    current = {n: self.operands[n] for n in trackers if n != "patch"}
    current = {n: dataclasses.replace(o, scales=_inner(o.scales)) for n, o in current.items()}
    return dataclasses.replace(self, patch=None, **current)

  @property
  def needs_key(self) -> bool:
    """Whether anything in it is random."""
    return any(o.random for o in self.operands.values()) or getattr(self.learned, "random", False)

  def __str__(self) -> str:
    """One line: the operands that are quantized."""
    quantized = {n: o for n, o in self.operands.items() if o.fmt is not None}
    parts = [f"{n} {o}" for n, o in quantized.items()]
    parts += [str(self.patch)] if self.patch else []
    parts += [str(self.learned)] if self.learned else []
    parts += ["kept packed"] * self.keep_packed
    return "  ".join(parts) or "float"


FLOAT = Rule()


def weight_only(fmt: Format, *, scales: ScaleRule | None = None) -> Rule:
  """Rule with a quantized weight and nothing else: W4A16 and the like."""
  return Rule(w=Operand(fmt, scales))
