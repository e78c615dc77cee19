"""How bad the outliers of a tensor are: pure functions of x [..., M, K], blocks along K.

They are the diagnostics of CHON (arXiv:2602.02047), whose exact definitions we could not read; each
docstring states ours. All take canonical activations x [M, K], output gradients g [M, N], or
weights as [N, K], so that channels are the last axis and blocks run along it as in a GEMM. Letters:
M tokens, K channels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxquant.diagnostics.qsnr import crest_factor
from jaxquant.encoding import encode
from jaxquant.formats import NVFP4, Format
from jaxquant.spread import central_moments
from jaxquant.statistics import amax, mean_abs
from jaxquant.tensor import dequantize, to_blocks

Measured = dict[str, jax.Array]  # {measure: float32 [...]}


def channel_kurtosis(x: jax.Array) -> jax.Array:
  """Excess kurtosis of each channel, E[(x - mu)^4] / sigma^4 - 3 over the tokens.

  0 for a normal distribution, and for a constant channel; -2 at least, M - 3 about at most.

  Args:
    x: [..., M, K].

  Returns:
    float32 [..., K].

  Example:
    >>> channel_kurtosis(jnp.array([[1.0, 5.0], [-1.0, 5.0]])).tolist()
    [-2.0, 0.0]
  """
  n, mean, m2, _, m4 = central_moments(x)
  variance = m2 / n
  flat = variance <= jnp.square(jnp.finfo(jnp.float32).eps * mean)  # rounding of a constant
  return jnp.where(flat, 0, m4 / n / jnp.where(flat, 1, variance) ** 2 - 3)


def kurtosis(x: jax.Array) -> jax.Array:
  """Excess kurtosis of all values together, E[(x - mu)^4] / sigma^4 - 3; float32 scalar.

  Example:
    >>> float(kurtosis(jnp.array([[1.0, -1.0], [1.0, -1.0]])))
    -2.0
  """
  return channel_kurtosis(x.reshape(-1, 1))[0]


def top_magnitudes(x: jax.Array, k: tuple[int, ...] = (1, 4, 16)) -> Measured:
  """Mean of the k largest channel maxima max_m |x_mk|, as `topk` for each k.

  Args:
    x: [..., M, K].
    k: how many channels; all, if there are fewer.

  Returns:
    {"top1": float32 [...], ...}.

  Example:
    >>> found = top_magnitudes(jnp.array([[1.0, -8.0, 0.0], [4.0, 2.0, 1.0]]), (1, 2))
    >>> {name: float(value) for name, value in found.items()}
    {'top1': 8.0, 'top2': 6.0}
  """
  maxima = amax(x)
  largest = jax.lax.top_k(maxima, min(max(k), maxima.shape[-1]))[0]
  return {f"top{i}": largest[..., :i].mean(-1) for i in k}


def crest_factors(x: jax.Array, fmt: Format = NVFP4) -> jax.Array:
  """Crest factor max |x| / rms(x) of each block that shares a scale: 1 to sqrt(its elements).

  Args:
    x: [..., M, K]; a last block that is not full repeats its last element, as in quantization.
    fmt: whose blocks; `NVFP4` has rows of 16, `NVFP4_2D` tiles of 16 x 16.

  Returns:
    float32 [..., blocks along M, blocks along K]; 1 for a block of zeros.

  Example:
    >>> crest_factors(jnp.zeros((16, 32)).at[0, 0].set(3.0)).max().tolist()
    4.0
  """
  blocks = jnp.moveaxis(to_blocks(x.astype(jnp.float32), fmt, -1), -3, -2)  # [..., A, B, r, c]
  flat = blocks.reshape(*blocks.shape[:-2], -1)
  return crest_factor(flat, flat.shape[-1])[..., 0]


def flush_to_zero(x: jax.Array, fmt: Format = NVFP4) -> jax.Array:
  """Share of the nonzero values that a format turns into 0 (TransformerEngine: underflows).

      #{x != 0, Q(x) = 0} / #{x != 0}

  Args:
    x: [..., M, K].
    fmt: blocks along K; its own scale rule, to nearest.

  Returns:
    float32 scalar.

  Example:
    >>> from jaxquant.formats import INT4
    >>> float(flush_to_zero(jnp.array([[7.0, 1.0, 0.25, 0.0]]), INT4)) == float(jnp.float32(1 / 3))
    True
  """
  x = x.astype(jnp.float32)
  there = x != 0
  lost = there & (dequantize(encode(x, fmt, axis=-1)) == 0)
  return lost.sum() / jnp.maximum(there.sum(), 1)


def hot_channels(x: jax.Array, k: int) -> jax.Array:
  """The k channels of largest mean_m |x_mk|, as rising indices int32 [..., min(k, K)].

  Example:
    >>> hot_channels(jnp.array([[1.0, -8.0, 0.0, 3.0]]), 2).tolist()
    [1, 3]
  """
  size = mean_abs(x)
  return jnp.sort(jax.lax.top_k(size, min(k, size.shape[-1]))[1], -1)


def jaccard(a: jax.Array, b: jax.Array) -> jax.Array:
  """|A and B| / |A or B| of sets of channels: 1 if they are the same, 0 if they share none.

  Args:
    a: indices [..., k] without repetition.
    b: the same shape.

  Example:
    >>> float(jaccard(jnp.array([1, 3, 5]), jnp.array([5, 1, 7])))
    0.5
  """
  both = (a[..., :, None] == b[..., None, :]).sum((-2, -1))
  return both / (2 * a.shape[-1] - both)


def alignment(gate: jax.Array, up: jax.Array) -> jax.Array:
  """Cosine of each column of W_gate with the same column of W_up, in a SwiGLU.

  Aligned columns make silu(g) u quadratic in their common direction, which is how a SwiGLU grows
  outliers (arXiv:2409.12517, sec. 4).

  Args:
    gate: [..., K, F].
    up: the same shape.

  Returns:
    float32 [..., F].

  Example:
    >>> alignment(jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.array([[3.0, 1.0], [0.0, 0.0]])).tolist()
    [1.0, 0.0]
  """
  gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
  norms = jnp.linalg.norm(gate, axis=-2) * jnp.linalg.norm(up, axis=-2)
  return (gate * up).sum(-2) / jnp.where(norms == 0, 1, norms)


def spread(name: str, values: jax.Array) -> Measured:
  """Median, 99th percentile and maximum of all values as `name`_p50, `name`_p99, `name`_max.

  Percentiles are values that are there, the nearest rank below.

  Example:
    >>> {k: float(v) for k, v in spread("a", jnp.arange(101.0)).items()}
    {'a_p50': 50.0, 'a_p99': 99.0, 'a_max': 100.0}
  """
  ordered = jnp.sort(values.reshape(-1))  # jnp.quantile compiles three times as long
  last = ordered.size - 1
  at = {"p50": last // 2, "p99": last * 99 // 100, "max": last}
  return {f"{name}_{share}": ordered[i] for share, i in at.items()}


def outliers(x: jax.Array, fmt: Format = NVFP4, hot: int = 16) -> Measured:
  """All of the above of one tensor x [M, K], as {measure: float32}.

  Args:
    x: [M, K].
    fmt: of blocks and flush to zero.
    hot: how many channels count as hot.

  Example:
    >>> float(outliers(jnp.ones((4, 16)))["crest_max"])
    1.0
  """
  return {
    "kurtosis": kurtosis(x),
    **spread("channel_kurtosis", channel_kurtosis(x)),
    **top_magnitudes(x),
    **spread("crest", crest_factors(x, fmt)),
    "flushed": flush_to_zero(x, fmt),
    "hot": hot_channels(x, hot),
  }


def gate_range(y: jax.Array) -> Measured:
  """Smallest, median and largest value that a gate projection gives, before its sigmoid.

  Args:
    y: [M, N]; GLA's log alpha is log sigmoid(y) / 16 (arXiv:2312.06635, sec. 4.4).

  Example:
    >>> {k: float(v) for k, v in gate_range(jnp.array([[-4.0, 1.0, 6.0]])).items()}
    {'gate_min': -4.0, 'gate_p50': 1.0, 'gate_max': 6.0}
  """
  return {"gate_min": y.min(), "gate_p50": jnp.median(y), "gate_max": y.max()}
