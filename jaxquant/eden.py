"""MS-EDEN: unbiased 4-bit gradients from a random rotation and nearest codes (arXiv:2601.22813).

Elements of a rotated group are rounded to the nearest code, which is biased toward zero for every
group alike; one factor per group repairs the length, and only the scales, which carry that factor,
are rounded at random. So there is one random number per block instead of one per element, and less
than half the squared error of stochastic rounding.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxquant.formats import E4M3, Format
from jaxquant.rounding import round_to, stochastic, uniform
from jaxquant.scales import Scales, mean, nvfp4
from jaxquant.tensor import per_block

# Block maxima are mapped above 6, where a few elements saturate: the least squared error.
TOP = 6 / (17 / 16 * 0.93)
BOUND = 255.99  # of the block scales: leaves room in E4M3 for the factor


@dataclasses.dataclass(frozen=True)
class MSEden:
  """Scale rule of NVFP4 whose values are unbiased over the rotations of their operand.

      u = x / (s_b s_t),   q = e2m1(u),   c = sum u^2 / sum u q over a rotation group,
      s_b' = e4m3(c s_b), rounded up or down at random so that its mean is c s_b

  The operand must have been rotated in the same groups along the contraction with fresh signs,
  `Rotation(group, random=True)`: the mean is one over the signs, c itself being deterministic.
  (arXiv:2601.22813, Quartet II; EDEN is arXiv:2108.08842.) A block whose scale underflows is zero.

  Attributes:
    group: elements that were rotated together, a multiple of the format's block.
    random: it is called rule(blocks, fmt, key=...).

  Example:
    >>> import jaxquant as jq
    >>> from jaxquant.ops.qdot import Operand, Rotation, quantize_operand
    >>> operand = Operand(jq.formats.NVFP4, MSEden(32), rotation=Rotation(32, random=True))
    >>> quantize_operand(jnp.ones((2, 64)), operand, -1, jax.random.key(0)).scale.data.shape
    (2, 4)
  """

  group: int = 128
  random = True

  @property
  def __name__(self) -> str:
    return f"ms_eden{self.group}"

  def __call__(self, blocks: jax.Array, fmt: Format, *, key: jax.Array) -> Scales:
    """Scales of float32 blocks [..., A, r, B, c]; `key` rounds them.

    Raises:
      ValueError: if the blocks are not whole rotation groups along the contraction.
    """
    along_rows = blocks.shape[-1] == 1
    count = blocks.shape[-4 if along_rows else -2]
    size = blocks.shape[-3 if along_rows else -1]
    if self.group % size or count * size % self.group:
      raise ValueError(
        f"{self.__name__}: {count} blocks of {size} along the contraction are no whole rotation "
        f"groups; give the operand rotation=Rotation({self.group}, random=True)"
      )
    found = nvfp4(blocks, fmt, bound=BOUND, top=TOP)
    u = blocks * per_block(found.multiplier)
    *lead, a, r, b, c = blocks.shape
    n = self.group // size
    groups = (*lead, a // n, r * n, b, c) if along_rows else (*lead, a, r, b // n, c * n)
    length, aligned = (mean(v.reshape(groups)) for v in (u * u, u * round_to(u, fmt.elem)))
    factor = jnp.where(aligned > 0, length / jnp.where(aligned > 0, aligned, 1), 1)
    factor = jnp.repeat(factor, n, -2 if along_rows else -1)
    noise = uniform(key, factor.shape)
    block = round_to(found.scale.data * factor, E4M3, stochastic, noise)
    return Scales(found.scale.replace(data=block), multiplier=found.multiplier)
