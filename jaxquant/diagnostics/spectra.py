"""What quantization leaves of a singular spectrum: the tools of spectral fidelity.

"On the Spectral Flattening of Quantized Embeddings" (arXiv:2602.00969; abstract read, formulas are
the standard ones). Tokens follow Zipf's law, so embeddings have singular values s_k ~ k^-a whose
tail carries the rare tokens. Quantization adds a noise matrix with a flat spectrum: values of the
tail that lie below its floor are lifted to it, and the directions are lost.

s are singular values in falling order, [n], n = min(rows, columns).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.scipy.special import entr

from jaxquant.diagnostics.measures import Measured
from jaxquant.encoding import encode
from jaxquant.formats import Format, int_grid
from jaxquant.tensor import dequantize

INT4_TENSOR = Format(int_grid(4), None, None)


def spectrum(a: jax.Array) -> jax.Array:
  """Singular values of a [..., m, n] in falling order, float32 [..., min(m, n)].

  Example:
    >>> spectrum(jnp.array([[3.0, 0.0], [0.0, -4.0]])).tolist()
    [4.0, 3.0]
  """
  return jnp.linalg.svd(a.astype(jnp.float32), compute_uv=False)


def stable_rank(s: jax.Array) -> jax.Array:
  """Stable rank sum s^2 / s_1^2 = |A|_F^2 / |A|_2^2: from 1 to n; 0 for a zero matrix.

  Example:
    >>> float(stable_rank(jnp.array([2.0, 2.0, 0.0])))
    2.0
  """
  top = jnp.where(s[..., :1] == 0, 1, s[..., :1])
  return jnp.square(s / top).sum(-1)


def effective_rank(s: jax.Array) -> jax.Array:
  """exp(-sum p ln p), p = s / sum s; zeros count for nothing (Roy and Vetterli, EUSIPCO 2007).

  Example:
    >>> round(float(effective_rank(jnp.array([2.0, 2.0, 0.0]))), 4)
    2.0
  """
  total = s.sum(-1, keepdims=True)
  return jnp.exp(entr(s / jnp.where(total == 0, 1, total)).sum(-1))


def power_law_exponent(s: jax.Array, low: float = 0.01, high: float = 0.5) -> jax.Array:
  """The a of s_k ~ k^-a: minus the slope of ln s on ln k (least squares, ranks low n to high n).

  Args:
    s: [..., n], positive on these ranks (else infinite or NaN, and that is what it says).
    low: first rank over n.
    high: last rank over n.

  Example:
    >>> round(float(power_law_exponent(jnp.arange(1.0, 257.0) ** -0.8)), 4)
    0.8
  """
  n = s.shape[-1]
  first, last = max(1, round(low * n)), max(2, round(high * n))
  rank = jnp.log(jnp.arange(first, last + 1, dtype=jnp.float32))
  value = jnp.log(s[..., first - 1 : last])
  centred = rank - rank.mean()
  return -(centred * (value - value.mean(-1, keepdims=True))).sum(-1) / (centred**2).sum()


def spectral_fidelity(s: jax.Array, quantized: jax.Array) -> jax.Array:
  """1 - sum |s - s^| / sum s: 1 if the spectrum is kept.

  Args:
    s: [..., n].
    quantized: singular values s^ of the quantized matrix.

  Example:
    >>> float(spectral_fidelity(jnp.array([3.0, 1.0]), jnp.array([3.0, 2.0])))
    0.75
  """
  return 1 - jnp.abs(s - quantized).sum(-1) / s.sum(-1)


def tail_energy(s: jax.Array, quantized: jax.Array, rank: int) -> jax.Array:
  """sum_{i > rank} s^_i^2 / sum_{i > rank} s_i^2: above 1, the tail is lifted.

  Example:
    >>> float(tail_energy(jnp.array([3.0, 2.0]), jnp.array([3.0, 4.0]), 1))
    4.0
  """
  return jnp.square(quantized[..., rank:]).sum(-1) / jnp.square(s[..., rank:]).sum(-1)


def step_noise(step: jax.Array | float) -> jax.Array | float:
  """Noise step / sqrt(12): the rms error of rounding to a uniform grid that does not saturate.

  Example:
    >>> round(step_noise(1.0), 4)
    0.2887
  """
  return step / 12**0.5


def noise_floor(noise: jax.Array | float, shape: tuple[int, int]) -> jax.Array | float:
  """Floor noise (sqrt m + sqrt n): the largest singular value of independent errors of this rms.

  Args:
    noise: rms error of an element (`step_noise`).
    shape: (m, n) of the matrix.

  Example:
    >>> noise_floor(0.5, (16, 9))
    3.5
  """
  return noise * (shape[0] ** 0.5 + shape[1] ** 0.5)


def detectability_edge(noise: jax.Array | float, shape: tuple[int, int]) -> jax.Array | float:
  """Edge noise (m n)^(1/4): a direction with a smaller singular value leaves no trace in the noise.

  The threshold of a spiked matrix (Benaych-Georges and Nadakuditi, arXiv:1103.2221, sec. 3.1).

  Example:
    >>> detectability_edge(0.5, (16, 1))
    1.0
  """
  return noise * (shape[0] * shape[1]) ** 0.25


def predicted_stable_rank(
  s: jax.Array, noise: jax.Array | float, shape: tuple[int, int]
) -> jax.Array:
  """(sum s^2 + m n noise^2) / (s_1^2 + m noise^2): independent errors add to both.

  Fails where most elements round to zero (2 bits), because errors then follow the elements.

  Args:
    s: [..., n].
    noise: rms error of an element.
    shape: (m, n), m the longer side.

  Example:
    >>> float(predicted_stable_rank(jnp.array([2.0, 0.0]), 1.0, (4, 2)))
    1.5
  """
  m, n = max(shape), min(shape)
  variance = jnp.square(noise)
  return (jnp.square(s).sum(-1) + m * n * variance) / (jnp.square(s[..., 0]) + m * variance)


def spectral(a: jax.Array, fmt: Format = INT4_TENSOR) -> Measured:
  """The spectrum of a [m, n], and what a format leaves of it.

  The floor and the edge are those of the measured rms error, which is `step_noise` for a uniform
  grid. `below_edge` is the share of singular values under the edge: above .5 is an alarm.

  Args:
    a: [m, n], an embedding or hidden states of m tokens.
    fmt: blocks along n.

  Example:
    >>> found = spectral(jnp.eye(8), INT4_TENSOR)
    >>> float(found["stable_rank"]), float(found["fidelity"]), float(found["below_edge"])
    (8.0, 1.0, 0.0)
  """
  a = a.astype(jnp.float32)
  decoded = dequantize(encode(a, fmt, axis=-1))
  s, after = spectrum(jnp.stack([a, decoded]))
  noise = jnp.sqrt(jnp.square(a - decoded).mean())
  edge = detectability_edge(noise, a.shape)
  return {
    "spectrum": s,
    "spectrum_quantized": after,
    "stable_rank": stable_rank(s),
    "effective_rank": effective_rank(s),
    "exponent": power_law_exponent(s),
    "fidelity": spectral_fidelity(s, after),
    "tail_energy": tail_energy(s, after, s.shape[-1] // 2),
    "floor": noise_floor(noise, a.shape),
    "edge": edge,
    "below_edge": (s < edge).mean(),
  }
