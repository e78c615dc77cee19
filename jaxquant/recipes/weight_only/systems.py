"""Rows of the systems that quantize weights alone."""

from jaxquant.recipes.system import System
from jaxquant.recipes.weight_only import (
  affinequant,
  awq,
  bitmod,
  bitmod4,
  bitstack,
  boa,
  cbq,
  eora,
  fp4,
  layerwise,
  nf4,
  omniquant,
  ptq161,
  quantease,
  rsq,
  vptq,
  w4a16_gptq,
  w4a16_rtn,
  zeroquant_fp6,
)

SYSTEMS: dict[str, System] = {
  "w4a16_rtn": System(
    w4a16_rtn,
    "-",
    "baseline",
    "int4 g128 weights, nearest",
    "KL 6.5e-3 on the shipped model (make demo)",
  ),
  "w4a16_gptq": System(
    w4a16_gptq,
    "W3",
    "arXiv:2210.17323",
    "int4 g128 weights, GPTQ",
    "KL 2.8e-3 on the shipped model, RTN 6.5e-3 (make demo)",
  ),
  "vptq": System(
    vptq,
    "W17",
    "arXiv:2409.17066",
    "vectors of 4 on 256 codewords, error feedback, codewords tuned",
    "2.15 bits: KL 45e-3 on the shipped model, 55e-3 untuned (one draw, 4 batches of 8 x 128 to "
    "calibrate); untuned 42e-3, without feedback 93e-3, GPTQ at 2.53 bits 201e-3 (6 batches of "
    "8 x 256)",
  ),
  "omniquant": System(
    omniquant,
    "W3",
    "arXiv:2308.13137",
    "learned ranges, and scales of quantized activations (LWC, LET), block by block",
    "W2 g64 KL 114e-3, RTN 131e-3; W3 g128 19.1e-3, RTN 20.3e-3 (gate `omniquant`, 6 batches of "
    "8 x 128); W4A4, outlier channels: 108e-3, ranges alone 110e-3, SmoothQuant 115e-3 "
    "(gate `omniquant_let`, 4 batches of 8 x 128)",
  ),
  "ptq161": System(
    ptq161,
    "W18",
    "arXiv:2502.13179",
    "1 bit, 4 for a fifth of the channels, learned scales",
    "1.96 bits on the shipped model (1.63 at K = N = 4096): KL 259e-3, 559e-3 before learning, "
    "random channels 1631e-3 (gates `ptq161`, `ptq161_mask`, 6 batches of 8 x 128)",
  ),
  "rsq": System(
    rsq,
    "W12",
    "arXiv:2503.01820",
    "GPTQ that counts a token by the attention it draws",
    "weights of one give GPTQ's codes (tests/recipes/test_attention_recipes.py)",
  ),
  "boa": System(
    boa,
    "W16",
    "arXiv:2406.13474",
    "GPTQ that sees what attention does with q, k, v",
    "H_out = I is GPTQ bit for bit (tests/solvers/test_attention_aware.py); error of the attention "
    "output, q, k and v at 2 bits: .84 to .97 of GPTQ's by layer, so its .95 fails in one or two "
    "layers (gate `boa_attention`, docs/results/ptq.md)",
  ),
  "cbq": System(
    cbq,
    "W13",
    "arXiv:2312.07950",
    "outliers cut or smoothed, rounding learned across two blocks at a time",
    "60 steps, W2 g64 KL 111e-3, 114e-3 without outlier detection, RTN 131e-3 (one draw, 4 batches "
    "of 8 x 128); exactly injected outliers are found (tests/solvers/test_coarse_to_fine.py)",
  ),
  "quantease": System(
    quantease,
    "W15",
    "arXiv:2309.01885",
    "int3 g128 weights, coordinate descent; outliers in float16",
    "all codes of the published code (tests/solvers/test_golden_second_order.py); int3: relative "
    "output error 4.76e-3, GPTQ 4.83e-3 (gate `quantease_proxy`, docs/results/ptq.md)",
  ),
  "bitstack": System(
    bitstack,
    "W20",
    "arXiv:2410.23918",
    "sign planes times low rank, cut to a budget",
    "four layers of rank 4: KL 17.4e-3, an SVD of that memory 257e-3; with scaled inputs 16.9e-3 "
    "(gates `bitstack_svd`, `bitstack_scaled`, docs/results/ptq.md)",
  ),
  "eora": System(
    eora,
    "W23",
    "arXiv:2410.21271",
    "int3 g128 and the low-rank branch of least output error",
    "equals the Eckart-Young optimum and the paper's formula (tests/solvers/test_low_rank.py, "
    "test_golden_second_order.py); int3, rank 8, 16, 32: KL 14.7, 11.3, 7.2e-3, plain SVD 19.5, "
    "17.8, 14.0e-3 (gate `eora`, docs/results/ptq.md)",
  ),
  "zeroquant_fp6": System(
    zeroquant_fp6,
    "W7",
    "arXiv:2312.08583",
    "FP6 weights per channel, in planes of 4 and 2 bits",
    "KL 1.05e-3, int4 per channel 5.5e-3 "
    "(jaxquant.apps.gates --gates fp6 --batches 3 --calibration_batches 2)",
  ),
  "bitmod": System(
    bitmod,
    "W19",
    "arXiv:2411.11745",
    "3-bit floats with a special value per group",
    "KL 18.1e-3, int3 asymmetric 20.0e-3, FP3 27.3e-3, int3 35.3e-3 "
    "(jaxquant.apps.gates --gates bitmod --batches 3 --calibration_batches 2)",
  ),
  "bitmod4": System(
    bitmod4,
    "W19",
    "arXiv:2411.11745",
    "4-bit floats with a special value per group",
    "codes of an independent implementation (tests/recipes/test_weight_act.py)",
  ),
  "layerwise": System(
    layerwise,
    "W24",
    "arXiv:2406.17415",
    "GPTQ, int4 and in the least important layers int2; wants looped layers",
    "orders of LIM and ZD: jaxquant.evaluation.layer_scores (tests/test_evaluation.py)",
  ),
  "nf4": System(
    nf4,
    "E4",
    "arXiv:2305.14314",
    "NF4 g64 weights, nearest",
    "KL 3.5e-3 on the shipped model, fp4_bnb 6.7e-3 "
    "(jaxquant.apps.evaluate --recipes nf4,fp4_bnb --batches 4)",
  ),
  "fp4_bnb": System(
    fp4,
    "E4",
    "bitsandbytes",
    "FP4 g64 weights of bitsandbytes, nearest",
    "KL 6.7e-3 on the shipped model, nf4 3.5e-3 "
    "(jaxquant.apps.evaluate --recipes nf4,fp4_bnb --batches 4)",
  ),
  "awq": System(
    awq,
    "W2",
    "arXiv:2306.00978",
    "scales searched, ranges clipped but for q and k, asymmetric int4 g128",
    "W3: KL awq 15.5e-3, nearest 20e-3; W4, outlier channels: KL awq 4.43e-3, nearest 14.4e-3 "
    "(jaxquant.apps.gates --gates awq,awq_outliers --batches 3 --calibration_batches 2)",
  ),
  "affinequant": System(
    affinequant,
    "W14",
    "arXiv:2403.12544",
    "int3 g128 behind affine maps in heads",
    "function kept to 1e-5, packed equals unpacked bit for bit, on a small random model "
    "(tests/recipes/test_transform_recipes.py)",
  ),
}
