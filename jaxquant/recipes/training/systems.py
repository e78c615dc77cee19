"""Rows of the training systems."""

import functools

from jaxquant import formats, scales
from jaxquant.ops.hadamard import RHT_SIGNS
from jaxquant.ops.qdot import Rotation
from jaxquant.recipes.system import System
from jaxquant.recipes.training import (
  bibench,
  binarydm,
  chon,
  fp4_space,
  fp8,
  fp8_blocks,
  gaussws,
  int_embeddings,
  int_vs_fp,
  jetfire,
  layercast,
  mxfp8,
  nvfp4,
  quartet,
  quartet2,
  qvgen,
  rope_guard,
  switchback,
  w8a8_int8,
)
from jaxquant.rounding import stochastic

SYSTEMS: dict[str, System] = {
  "w8a8_int8": System(
    w8a8_int8,
    "T9",
    "arXiv:2505.01043",
    "int8 in all six operands; PTQ and decode too",
    "KL 2.2e-3 on the shipped model, step 0.62 of float32 (make demo, docs/results); loss 1.001 of "
    "float32, GLA .999 (docs/results/training.md)",
  ),
  "mxfp8": System(
    mxfp8,
    "T9",
    "arXiv:2506.08027",
    "E4M3 blocks of 32, ceil scales",
    "step 0.62 of float32 (docs/results/train_step.md); loss 1.000 of float32, GLA 1.003 "
    "(docs/results/training.md)",
  ),
  "nvfp4": System(
    nvfp4,
    "T1",
    "arXiv:2509.25149",
    "NVFP4: 2D weights, RHT on wgrad, SR on gradients",
    "KL 13.7e-3 as W4A4 on the shipped model, step 0.64 of float32 (make demo, docs/results); loss "
    "1.020 of float32, GLA 1.044 (docs/results/training.md)",
  ),
  "chon": System(
    chon,
    "T2",
    "arXiv:2602.02047",
    "NVFP4 with a patch of the worst input channels; v of softmax attention in high precision",
    "K=512, 10 hot channels: GEMM error .129, k=32: .088, k=64: .061 (tests/ops/test_patch.py); "
    "loss 1.016 of float32, 1.020 without the patch (docs/results/training.md)",
  ),
  "chon_gla": System(
    functools.partial(chon, attention="gla"),
    "T2",
    "arXiv:2602.02047",
    "the same for gated linear attention: its output and gate projections in high precision",
    "loss 1.028 of float32, with the patch and without it (docs/results/training.md)",
  ),
  "quartet": System(
    quartet,
    "T5",
    "arXiv:2505.14669",
    "MXFP4: QuEST scales under a Hadamard forward, unbiased SR under random ones backward",
    "gradients equal the published algorithm's (tests/recipes/test_training_recipes.py); loss "
    "1.013 of float32, GLA 1.053 (docs/results/training.md)",
  ),
  "quartet2": System(
    quartet2,
    "T5",
    "arXiv:2601.22813",
    "NVFP4: nearest forward, MS-EDEN for all backward operands",
    "MS-EDEN: squared error .0099 on a normal, SR .0236; slope bias < 2e-3 (tests/test_eden.py); "
    "loss 1.021 of float32, GLA 1.032 (docs/results/training.md)",
  ),
  "fp8_delayed": System(
    fp8,
    "T9",
    "arXiv:2209.05433",
    "E4M3, gradients E5M2; delayed scale per tensor",
    "trace of scales bit for bit (tests/recipes/test_training_recipes.py)",
  ),
  "fp8_current": System(
    functools.partial(fp8, scales.fp8_scale),
    "T9",
    "arXiv:2209.05433",
    "the same with current scales",
    "scales of Transformer Engine bit for bit (tests/test_vectors.py)",
  ),
  "fp8_blocks": System(
    fp8_blocks,
    "T9",
    "arXiv:2412.19437",
    "E4M3: 1 x 128 of x and g, 128 x 128 of w",
    "shared tests (tests/recipes/test_training_recipes.py)",
  ),
  "switchback": System(
    switchback,
    "T9",
    "arXiv:2304.13013",
    "int8 rows of x and g, int8 tensor of w; weight gradient in high precision",
    "shared tests (tests/recipes/test_training_recipes.py)",
  ),
  "jetfire": System(
    jetfire,
    "T9",
    "arXiv:2403.12422",
    "int8 tiles of 32 x 32, SR on gradients; without the int8 data flow",
    "shared tests (tests/recipes/test_training_recipes.py)",
  ),
  "mxint8": System(
    int_vs_fp,
    "T8",
    "arXiv:2510.25602",
    "MXINT8 in all six operands, symmetric, scales rounded up; MXFP8 is row `mxfp8`",
    "QSNR 41.6 dB on a normal (MXFP8 31.5), theory within .7 dB (tests/test_qsnr.py); loss 1.000 "
    "of float32, GLA .994 (docs/results/training.md)",
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
    "QSNR 16.9 dB on a normal (tests/test_formats.py); crossover 2.04 (tests/test_qsnr.py); loss "
    "1.054 of float32, GLA 1.068 (docs/results/training.md)",
  ),
  "mxfp4": System(
    functools.partial(int_vs_fp, formats.MXFP4),
    "T8",
    "arXiv:2510.25602",
    "MXFP4 (E2M1), round to nearest everywhere",
    "QSNR 18.8 dB on a normal (tests/test_formats.py); loss 1.029 of float32, GLA 1.055 "
    "(docs/results/training.md)",
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
  "gaussws": System(
    gaussws,
    "T7",
    "arXiv:2505.11170",
    "noise of the size of rounding on weights, bits learned per 32 x 32 block, 6 towards 4",
    "moments, gradients, no noise kept (tests/quantizers/test_noise.py); docs/results/qat.md",
  ),
  "qvgen": System(
    qvgen,
    "T10",
    "arXiv:2505.11497",
    "W4A4: LSQ+ weights, clipped tokens, a low-rank branch that decays to nothing",
    "no jump between phases, bits as packed (tests/quantizers/test_branch.py); docs/results/qat.md",
  ),
  "binarydm": System(
    binarydm,
    "T11",
    "arXiv:2404.05662",
    "W1A4: one or two learned binary bases, LSQ inputs; mimicking loss beside it",
    "normal weights: energy left .363, .130 (tests/quantizers/test_binary.py); docs/results/qat.md",
  ),
  "bibench_bnn": System(
    functools.partial(bibench, "bnn"),
    "T12",
    "arXiv:2301.11233",
    "W1A1 by BNN: plain signs",
    "gradients by formula (tests/quantizers/test_binary.py); docs/results/qat.md",
  ),
  "bibench_xnor": System(
    functools.partial(bibench, "xnor"),
    "T12",
    "arXiv:2301.11233",
    "W1A1 by XNOR-Net: centered weights, mean magnitudes of both",
    "gradients by formula (tests/quantizers/test_binary.py); docs/results/qat.md",
  ),
  "bibench_dorefa": System(
    functools.partial(bibench, "dorefa"),
    "T12",
    "arXiv:2301.11233",
    "W1A1 by DoReFa: mean magnitudes of weights",
    "gradients by formula (tests/quantizers/test_binary.py); docs/results/qat.md",
  ),
  "bibench_bireal": System(
    functools.partial(bibench, "bireal"),
    "T12",
    "arXiv:2301.11233",
    "W1A1 by Bi-Real: quadratic sign for inputs",
    "gradients by formula (tests/quantizers/test_binary.py); docs/results/qat.md",
  ),
  "bibench_xnor_pp": System(
    functools.partial(bibench, "xnor_pp"),
    "T12",
    "arXiv:2301.11233",
    "W1A1 by XNOR-Net++: one learned scale per output",
    "gradients by formula (tests/quantizers/test_binary.py); docs/results/qat.md",
  ),
  "bibench_react": System(
    functools.partial(bibench, "react"),
    "T12",
    "arXiv:2301.11233",
    "W1A1 by ReActNet: learned thresholds of inputs, without RPReLU",
    "gradients by formula (tests/quantizers/test_binary.py); docs/results/qat.md",
  ),
  "bibench_recu": System(
    functools.partial(bibench, "recu"),
    "T12",
    "arXiv:2301.11233",
    "W1A1 by ReCU: clamped, standardized weights, learned scale",
    "gradients by formula (tests/quantizers/test_binary.py); docs/results/qat.md",
  ),
  "bibench_fda": System(
    functools.partial(bibench, "fda"),
    "T12",
    "arXiv:2301.11233",
    "W1A1 by FDA: Fourier slopes and a fading network",
    "gradients by formula (tests/quantizers/test_binary.py); docs/results/qat.md",
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
  "nvfp4_nearest": System(
    functools.partial(int_vs_fp, formats.NVFP4),
    "T3",
    "arXiv:2602.02047",
    "NVFP4 without remedies, as outliers meet it; `diagnostics.OUTLIERS` watches them",
    "a float run, steps 20 to 200: NVFP4 flushes .31 of down's inputs to zero (of all inputs .09, "
    "weights .06, gradients .16), their kurtosis goes 13.5 to 35.9; hot channels overlap .43 to "
    ".73 from row to row (jaxquant.apps.train --config configs/outliers.py)",
  ),
  "int4_embeddings": System(
    int_embeddings,
    "T4",
    "arXiv:2602.00969",
    "int4 embedding and head, one scale each; `diagnostics.SPECTRA` watches what is left",
    "1024 x 256, s ~ k^-.8: stable rank 2.226 to 2.428 (predicted 2.426), .80 of the values below "
    "the floor (tests/diagnostics); a float run of 200 steps: exponent .13 of the embedding, none "
    "below the edge; residual stream .82, .17 below (configs/outliers.py)",
  ),
  "fp4_space": System(
    functools.partial(
      fp4_space,
      scale=formats.UE5M3,
      rule=scales.absmax,
      backward=stochastic,
      wgrad=Rotation(16, RHT_SIGNS),
    ),
    "T6",
    "arXiv:2509.17791",
    "E2M1 with UE5M3 scales, SR, RHT on wgrad: a point of the 2880 of `jaxquant.design_space`",
    "regression, 400 steps: naive MXFP4 .108, UE5M3 .104, E4M3 with tensor scale, RHT and SR .103, "
    "float .079; E8M0 with RHT and SR .110 (docs/results/fp4_space.md)",
  ),
}
