"""What a rule remembers from step to step: delayed scales, hot channels, learned quantizers.

State is a dict of arrays per site. A tracker makes it (`init`), uses it inside the contraction,
says what it saw there (`observe`; the leaf called "seen" only has the shape of that), and turns
both into the next state (`update`). All but `observe` take leading axes: stacked layers, experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.encoding import encode
from jaxquant.formats import Format
from jaxquant.scales import ScaleRule, Scales, default_rule
from jaxquant.tensor import LARGEST, QTensor, dequantize, reciprocal

State = dict[str, jax.Array]


class Tracked:
  """A scale rule with state; `Operand.scales` takes one like any other rule."""

  def init(self) -> State:
    """The state before the first step."""
    raise TypeError(f"{type(self).__name__} is abstract")

  def scales(self, state: State, blocks: jax.Array, fmt: Format) -> Scales:
    """As a scale rule, of the blocks of this step."""
    raise TypeError(f"{type(self).__name__} is abstract")

  def observe(self, x: jax.Array) -> jax.Array:
    """What is kept of the operand of this step."""
    raise TypeError(f"{type(self).__name__} is abstract")

  def combine(self, a: jax.Array, b: jax.Array) -> jax.Array:
    """Two observations of one step (gradient accumulation) as one."""
    raise TypeError(f"{type(self).__name__} is abstract")

  def update(self, state: State, seen: jax.Array, clock: jax.Array) -> State:
    """The state of the next step."""
    raise TypeError(f"{type(self).__name__} is abstract")


@dataclasses.dataclass(frozen=True)
class Delayed(Tracked):
  """Delayed scaling: this step's scale comes from the magnitudes of the steps before.

  x is multiplied by (max of the grid / A) / 2^margin, where A is the largest magnitude of the last
  `history` steps; by 1 before the first. A step whose A is zero or not finite keeps the one before.
  The elements saturate. (The delayed recipe of Transformer Engine; arXiv:2209.05433, section 3.)

  Attributes:
    history: steps that A looks back on.
    margin: binades that stay free.
    most_recent: A is the magnitude of the last step alone.
  """

  history: int = 1024
  margin: int = 0
  most_recent: bool = False

  @property
  def __name__(self) -> str:
    return f"delayed{self.history}"

  def init(self) -> State:
    """`amax` 0 stands for the scale 1 of the first step."""
    zero = jnp.zeros((), jnp.float32)
    return {"amax": zero, "history": jnp.zeros(self.history, jnp.float32), "seen": zero}

  def scales(self, state: State, blocks: jax.Array, fmt: Format) -> Scales:
    """The stored one; float32 [..., 1, 1]."""
    if fmt.block is not None or fmt.block_n is not None or fmt.scale is not None:
      raise ValueError(f"delayed scaling keeps one float32 scale per tensor, not that of {fmt}")
    del blocks
    a = state["amax"]
    scale = jnp.where(a > 0, fmt.elem.max / jnp.where(a > 0, a, 1), 1)
    multiplier = jnp.minimum(scale * np.float32(2.0**-self.margin), LARGEST)[..., None, None]
    return Scales(reciprocal(multiplier), multiplier=multiplier)

  def observe(self, x: jax.Array) -> jax.Array:
    """Max |x|; NaN and infinities are seen as infinite."""
    a = jnp.abs(x.astype(jnp.float32))
    return jnp.where(jnp.isfinite(a), a, jnp.inf).max()

  def combine(self, a: jax.Array, b: jax.Array) -> jax.Array:
    """The larger."""
    return jnp.maximum(a, b)

  def update(self, state: State, seen: jax.Array, clock: jax.Array) -> State:
    """The history moved by one, and the A of the next step."""
    del clock
    history = jnp.concatenate([seen[..., None], state["history"][..., :-1]], -1)
    a = seen if self.most_recent else history.max(-1)
    a = jnp.where(jnp.isfinite(a) & (a > 0), a, state["amax"])
    return {"amax": a, "history": history, "seen": jnp.zeros_like(seen)}


@dataclasses.dataclass(frozen=True)
class Static(Tracked):
  """Static scaling of activations: the range A of calibration data, fixed ever after.

      A = max |x| over the calibration tokens;  scales of the rule as if max |x| were A

  `jaxquant.ranges` finds A. No reduction over x is left at run time, and what a token becomes does
  not depend on the other tokens. What lies above the range saturates. Of a format with two
  levels (NVFP4) the scale of the tensor is fixed, those of its blocks come from x as ever. O3 of
  SmoothQuant (arXiv:2211.10438, table 2) and the input scales of NVFP4 checkpoints are this.

  Attributes:
    rule: how a scale comes from a range; None: the one that the format implies.
  """

  rule: ScaleRule | None = None

  @property
  def __name__(self) -> str:
    return "static" if self.rule is None else f"static {self.rule.__name__}"

  def init(self) -> State:
    """NaN, and so is all that comes out: nothing is known before calibration."""
    return {"amax": jnp.full((), jnp.nan), "seen": jnp.zeros(())}

  def scales(self, state: State, blocks: jax.Array, fmt: Format) -> Scales:
    """Of blocks [A, r, B, c], for the stored range; raises ValueError for a scale per token."""
    level, top = fmt.scale, state["amax"]
    whole = lambda f: isinstance(f, Format) and f.block is None and f.block_n is None
    if fmt.zero_point or fmt.offset or not (whole(fmt) or whole(level)):
      raise ValueError(
        f"a static range is one magnitude per tensor, and {fmt} has no scale of that kind; take a "
        "symmetric format with one scale per tensor (INT8_TENSOR, E4M3_TENSOR) or above those of "
        "its blocks (NVFP4)"
      )
    rule = self.rule or default_rule(fmt)
    if whole(fmt):
      return rule(jnp.broadcast_to(top, (1, 1, 1, 1)), fmt)
    # One more row of blocks, as large as the range says, sets the scale of the tensor.
    inside = jnp.clip(blocks, -top, top)
    row = jnp.broadcast_to(top, (1, *blocks.shape[1:]))
    return jax.tree.map(
      lambda a: a if a.shape[0] == 1 else a[:-1], rule(jnp.concatenate([inside, row]), fmt)
    )

  def observe(self, x: jax.Array) -> jax.Array:
    """Nothing."""
    del x
    return jnp.zeros(())

  def combine(self, a: jax.Array, b: jax.Array) -> jax.Array:
    """Nothing."""
    del b
    return a

  def update(self, state: State, seen: jax.Array, clock: jax.Array) -> State:
    """The same."""
    del seen, clock
    return state


@dataclasses.dataclass(frozen=True)
class HotChannels:
  """Hot-channel patch: the residuals of the k worst channels enter the product again.

      y = x~ w~ + R_x[:, I] w~[I] + x~[:, I] R_w[I],   R = original - quantized

  which is one GEMM of contraction length K + 2k over [x~, R_x, x~_I] and [w~; w~_I; R_w], and
  leaves of the channels I only R_x R_w. I are the k channels of largest mean_t |R_x[t, j]| +
  mean_n |R_w[j, n]|, found anew every `every` steps and fixed in between (arXiv:2602.02047; k,
  interval and the precision of the residuals are not in what could be read, the defaults are
  ours). With K + k, as [x~, R_x] [w~; R_w], the formula adds R_x R_w and repairs nothing.

  The rows I of dw = x~^T g~ may get the same (`wgrad`), R_x[:, I]^T g~ + x~[:, I]^T R_g with the
  residuals of wgrad's operands: R_x^T R_g is left of them. That is ours too.

  Attributes:
    k: channels, a multiple of 16 for NVFP4; None: a sixteenth of K, at least 16.
    fmt: of the residuals; None: high precision.
    x: patch the residual of x.
    w: patch that of the other operand, w or g.
    every: steps between two choices of I.
    wgrad: patch dw too.
  """

  k: int | None = None
  fmt: Format | None = None
  x: bool = True
  w: bool = True
  every: int = 100
  wgrad: bool = False

  def size(self, channels: int) -> int:
    """How many of K channels are patched."""
    return min(channels, self.k or max(16, round(channels / 256) * 16))

  def init(self, channels: int) -> State:
    """The first k channels, until the first step has seen better ones."""
    index = jnp.arange(self.size(channels), dtype=jnp.int32)
    return {"index": index, "seen": jnp.zeros(channels, jnp.float32)}

  def __call__(
    self,
    x: jax.Array,
    w: jax.Array,
    xq: QTensor,
    wq: QTensor,
    index: jax.Array,
    contract: Callable[[object, object], jax.Array],
  ) -> jax.Array:
    """What the patch adds to y, float32 [M, N]."""
    at, on = dequantize(xq)[:, index], dequantize(wq)[index]
    left = x[:, index].astype(jnp.float32) - at
    right = w[index].astype(jnp.float32) - on
    terms = [(self._kept(left, -1), on)] * self.x + [(at, self._kept(right, -2))] * self.w
    return sum((contract(a, b) for a, b in terms), jnp.float32(0))

  def rows(
    self,
    x: jax.Array,
    g: jax.Array,
    xq: QTensor,
    gq: QTensor,
    index: jax.Array,
    contract: Callable[[object, object], jax.Array],
  ) -> jax.Array:
    """What the patch adds to the rows I of dw = x^T g, float32 [k, N]; x [M, K], g [M, N]."""
    at, on = dequantize(xq)[:, index], dequantize(gq)
    left, right = (a.astype(jnp.float32) - q for a, q in ((x[:, index], at), (g, on)))
    terms = [(self._kept(left, -2), on)] * self.x + [(at, self._kept(right, -2))] * self.w
    return sum((contract(a, b) for a, b in terms), jnp.float32(0))

  def _kept(self, residual: jax.Array, axis: int) -> jax.Array:
    if self.fmt is None:
      return residual
    return dequantize(encode(residual, self.fmt, axis=axis))

  def observe(self, x: jax.Array, w: jax.Array, xq: QTensor, wq: QTensor) -> jax.Array:
    """Score of each channel, float32 [K]."""
    error = lambda a, q, axis: jnp.abs(a.astype(jnp.float32) - dequantize(q)).mean(axis)
    return error(x, xq, 0) + error(w, wq, 1)

  def combine(self, a: jax.Array, b: jax.Array) -> jax.Array:
    """Their sum: only the order of channels counts."""
    return a + b

  def update(self, state: State, seen: jax.Array, clock: jax.Array) -> State:
    """New channels if the steps done are a multiple of `every`."""
    _, found = jax.lax.top_k(seen, state["index"].shape[-1])
    now = (clock % self.every == 0)[..., None]
    index = jnp.where(now, found.astype(jnp.int32), state["index"])
    return {"index": index, "seen": jnp.zeros_like(seen)}

  def __str__(self) -> str:
    """`patch(k=32 of x and w, every 100)`."""
    sides = " and ".join(["x"] * self.x + ["w"] * self.w)
    wgrad = ", wgrad too" * self.wgrad
    return f"patch(k={self.k or 'K/16'} of {sides}, every {self.every}{wgrad})"


class Learned:
  """A quantizer with parameters: stands between a site's inputs and its contraction.

  Subclasses are frozen dataclasses. Parameters are trained with the model's (`jaxquant.state`).

  Attributes:
    random: whether a call needs a key.
  """

  random = False

  def init(self, w: jax.Array, x: jax.Array) -> State:
    """Parameters of a site from its weight [K, N] and first inputs [M, K]."""
    raise TypeError(f"{type(self).__name__} is abstract")

  def __call__(
    self,
    theta: State,
    x: jax.Array,
    w: object,
    dot: Callable[[jax.Array, object], jax.Array],
    clock: jax.Array,
    key: jax.Array | None,
  ) -> jax.Array:
    """Y [M, N]; differentiable in theta, x and w.

    Args:
      theta: the parameters.
      x: [M, K].
      w: [K, N], or what `kernel` made of it.
      dot: (x, kernel) -> y under the site's rule.
      clock: int32 scalar, steps done: schedules are functions of it.
      key: for noise.
    """
    raise TypeError(f"{type(self).__name__} is abstract")

  def kernel(self, theta: State, w: jax.Array) -> object:
    """What the trained weight is packed as: a node of `jaxquant.kernels`."""
    raise TypeError(f"{type(self).__name__} is abstract")

  def due(self, step: int) -> bool:
    """Whether `renewed` has something to do after so many steps."""
    del step
    return False

  def renewed(self, theta: State, clock: jax.Array) -> State:
    """The parameters as the next step shall find them (`jaxquant.state.between_steps`)."""
    del clock
    return theta
