"""Rows of the training systems."""

import functools

from jaxquant import formats
from jaxquant.recipes.system import System
from jaxquant.recipes.training import (
  int_vs_fp,
  layercast,
  mxfp8,
  nvfp4,
  rope_guard,
  w8a8_int8,
)

SYSTEMS: dict[str, System] = {
  "w8a8_int8": System(
    w8a8_int8,
    "T9",
    "arXiv:2505.01043",
    "int8 in all six operands; PTQ and decode too",
    "KL 2.2e-3 on the shipped model, step 0.49 of float32 (make demo, docs/results)",
  ),
  "mxfp8": System(
    mxfp8,
    "T9",
    "arXiv:2506.08027",
    "E4M3 blocks of 32, ceil scales",
    "step 0.54 of float32 (docs/results/train_step.md); no training comparison yet",
  ),
  "nvfp4": System(
    nvfp4,
    "T1",
    "arXiv:2509.25149",
    "NVFP4: 2D weights, RHT on wgrad, SR on gradients",
    "KL 13.7e-3 as W4A4 on the shipped model, step 0.49 of float32 (make demo, docs/results)",
  ),
  "mxint8": System(
    int_vs_fp,
    "T8",
    "arXiv:2510.25602",
    "MXINT8 in all six operands, symmetric, scales rounded up; MXFP8 is row `mxfp8`",
    "QSNR 41.6 dB on a normal (MXFP8 31.5), theory within .7 dB (tests/test_qsnr.py)",
  ),
  "mxint6": System(
    functools.partial(int_vs_fp, formats.MXINT6),
    "T8",
    "arXiv:2510.25602",
    "MXINT6, as above",
    "QSNR 29.4 dB on a normal (tests/test_formats.py); crossover 1.96 (tests/test_qsnr.py)",
  ),
  "mxfp6": System(
    functools.partial(int_vs_fp, formats.MXFP6_E2M3),
    "T8",
    "arXiv:2510.25602",
    "MXFP6 (E2M3), as above",
    "QSNR 31.0 dB on a normal (tests/test_formats.py)",
  ),
  "mxint4": System(
    functools.partial(int_vs_fp, formats.MXINT4),
    "T8",
    "arXiv:2510.25602",
    "MXINT4, as above",
    "QSNR 16.9 dB on a normal (tests/test_formats.py); crossover 2.04 (tests/test_qsnr.py)",
  ),
  "mxfp4": System(
    functools.partial(int_vs_fp, formats.MXFP4),
    "T8",
    "arXiv:2510.25602",
    "MXFP4 (E2M1), round to nearest everywhere",
    "QSNR 18.8 dB on a normal (tests/test_formats.py)",
  ),
  "nvint4": System(
    functools.partial(int_vs_fp, formats.NVINT4),
    "T8",
    "arXiv:2510.25602",
    "NVINT4: blocks of 16, E4M3 scales, one float32 per tensor",
    "QSNR 21.3 dB on a normal (NVFP4 20.4); crossover 2.39 (tests/test_qsnr.py)",
  ),
  "nvint4_hadamard": System(
    functools.partial(int_vs_fp, formats.NVINT4, rotation=32),
    "T8",
    "arXiv:2510.25602",
    "NVINT4 after a block Hadamard along every contraction",
    "outlier channels: QSNR below NVFP4 before a 16-rotation, above it after (tests/test_qsnr.py)",
  ),
  "rope_guard": System(
    rope_guard,
    "T18",
    "arXiv:2411.13476",
    "bf16 in all six operands; rotary angles exact for integer positions; packs with an anchor",
    "scores move 2.4e-7 for any common shift; bf16 angles .07 to .79 (tests/ops/test_rope.py)",
  ),
  "layercast": System(
    layercast,
    "T19",
    "arXiv:2506.09501",
    "bf16 weights (or any format), widened beside their product; the rest float32",
    "over batch, padding and cache logits move 2.3e-5, greedy tokens not (tests/test_layercast.py)",
  ),
}
