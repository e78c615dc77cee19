"""Rows of the training systems."""

from jaxquant.recipes.system import System
from jaxquant.recipes.training import (
  mxfp8,
  nvfp4,
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
}
