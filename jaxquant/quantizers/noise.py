"""Pseudo-quantization noise on weights, with learned bit widths."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxquant.estimators import straight_through
from jaxquant.formats import BF16, Format, Grid
from jaxquant.ops.tracked import State
from jaxquant.quantizers.parts import Part
from jaxquant.rounding import pick, round_to, uniform
from jaxquant.tensor import amax, block_sizes, from_blocks, per_block, to_blocks

# P(|z| < 1), P(1 < |z| < 3), P(|z| > 3) of a normal z: what round(z / 2), clipped to 2, takes.
EDGES = (0.00134990, 0.15865525, 0.84134475, 0.99865010)


def rounded_normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """R = round(N(0, 1) / 2) clipped to [-2, 2]: 0 in 68.3 %, +-1 in 31.5 %, +-2 in 0.27 % of cases.

  One uniform number and four comparisons each (arXiv:2505.11170, section 3.2, which approximates
  the probabilities by dyadic ones).
  """
  return pick(uniform(key, shape), EDGES, (-2.0, -1.0, 0.0, 1.0, 2.0))


@dataclasses.dataclass(frozen=True)
class GaussianNoise(Part):
  """GaussWS: w^ = cast(w + R max_block |w| 2^(1 - b_t)), R fresh at each step.

  b_t = b_target + b (b_init - b_target), with a b per block that starts at 1 and is trained; weight
  decay pulls it to 0, the target (arXiv:2505.11170, of which the abstract and reviews could be
  read; the rest is recalled). The gradient to w is 1, that to b flows through 2^(1 - b_t). The
  noise is made again in the backward pass instead of being kept. The trained weights stay in float.

  Attributes:
    start: b_init.
    target: b_target.
    block: edge of the square blocks.
    cast: grid of the result; None: no cast.
  """

  start: float = 6.0
  target: float = 4.0
  block: int = 32
  cast: Grid | None = BF16

  random = True

  def _fmt(self) -> Format:
    return Format(BF16, self.block, self.block)

  def bits(self, theta: State) -> jax.Array:
    """b_t of each block [K / block, N / block]."""
    return self.target + theta["bits"] * (self.start - self.target)

  def init(self, a: jax.Array) -> State:
    """Ones [K / block, N / block], rounded up."""
    r, c = block_sizes(self._fmt(), a.shape, -2)
    return {"bits": jnp.ones((-(-a.shape[0] // r), -(-a.shape[1] // c)), jnp.float32)}

  def __call__(
    self, theta: State, a: jax.Array, clock: jax.Array, key: jax.Array | None
  ) -> jax.Array:
    """The weight with its noise, float32 [K, N]."""

    @jax.checkpoint
    def noisy(a: jax.Array, bits: jax.Array, key: jax.Array) -> jax.Array:
      blocks = to_blocks(a, self._fmt(), -2)
      size = jax.lax.stop_gradient(amax(blocks)) * jnp.exp2(1 - bits)
      noise = to_blocks(rounded_normal(key, a.shape), self._fmt(), -2)
      return from_blocks(blocks + noise * per_block(size), a.shape)

    w = noisy(a.astype(jnp.float32), self.bits(theta), key)
    return w if self.cast is None else straight_through(w, round_to(w, self.cast))
