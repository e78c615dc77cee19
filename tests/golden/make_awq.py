"""Golden scales and codes of AWQ's scale search, by its formula in float64 numpy.

  python tests/golden/make_awq.py

Written from section 3.2 of arXiv:2306.00978 and what its code (auto_scale.py of llm-awq) does: two
weights [out, in] read one input, and the loss is the squared error of their outputs, measured on
the inputs themselves. The inputs are made from a seed again by the test.
"""

import pathlib

import numpy as np

PATH = pathlib.Path(__file__).with_name("awq.npz")
K, N, TOKENS, BITS, GROUP, GRID = 256, (32, 48), 256, 3, 128, 20


def inputs():
  """Float32 x [TOKENS, K], a few channels of it large, and two weights [K, N]."""
  rng = np.random.default_rng(7)
  x = rng.normal(size=(TOKENS, K)) @ (rng.normal(size=(K, K)) * 0.02 + np.eye(K))
  x *= np.exp(0.5 * rng.normal(size=K))
  x[:, rng.permutation(K)[:6]] *= 12
  return np.float32(x), [np.float32(rng.normal(size=(K, n)) / np.sqrt(K)) for n in N]


def quantize(w):
  """Codes and values of w [out, in], integers with a zero point in groups along the inputs."""
  groups = w.reshape(len(w), -1, GROUP)
  low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
  step = (high - low) / (2**BITS - 1)
  zero = np.clip(-np.round(low / step), 0, 2**BITS - 1)
  codes = np.clip(np.round(groups / step) + zero, 0, 2**BITS - 1)
  return codes.reshape(w.shape), ((codes - zero) * step).reshape(w.shape)


def search(x, weights):
  """(index of the best power, its scale [K]) for weights [out, in] of one input x [TOKENS, K]."""
  mean = np.abs(x).mean(0)
  best = (np.inf, None, None)
  for i in range(GRID):
    s = np.maximum(mean ** (i / GRID), 1e-4)
    s = s / np.sqrt(s.max() * s.min())
    error = sum(np.square(x @ (quantize(w * s)[1] / s - w).T).sum() for w in weights)
    best = min(best, (error, i, s), key=lambda one: one[0])
  return best[1:]


def main():
  """Writes the file."""
  x, weights = inputs()
  x, weights = np.float64(x), [np.float64(w).T for w in weights]
  power, s = search(x, weights)
  codes = {f"codes_{i}": np.uint8(quantize(w * s)[0].T) for i, w in enumerate(weights)}
  np.savez_compressed(PATH, power=power, scale=np.float32(s), **codes)


if __name__ == "__main__":
  main()
