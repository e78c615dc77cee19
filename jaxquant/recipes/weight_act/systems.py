"""Rows of the systems that quantize weights and activations."""

from jaxquant.recipes.system import System
from jaxquant.recipes.weight_act import (
  comet,
  dgq,
  fireq,
  flexq,
  llm_int8,
  mr_gptq,
  noisyquant,
  qoq,
  quarot,
  smoothquant,
  spinquant,
  svdquant,
  w4a16_int,
  w8a8_fp,
  w8a8_int,
  zeroquant_fp,
)

SYSTEMS: dict[str, System] = {
  "llm_int8": System(
    llm_int8,
    "W1",
    "arXiv:2208.07339",
    "int8, outlier channels of x in float",
    "with outlier channels, threshold 40: KL 1.6e-3, int8 24e-3 "
    "(jaxquant.apps.gates --gates llm_int8 --batches 3 --calibration_batches 2)",
  ),
  "qoq": System(
    qoq,
    "W4",
    "arXiv:2405.04532",
    "W4A8: int4 groups inside int8 columns, rotation, GPTQ",
    "nearest, g64, no rotation: KL 5.36e-3, float scales 5.39e-3, per channel 7.2e-3 "
    "(jaxquant.apps.gates --gates qoq --batches 3 --calibration_batches 2); 4-bit keys and values "
    "with large key pairs: 12.9e-3 after SmoothAttention, 817e-3 without "
    "(jaxquant.apps.evidence --gates smooth_attention)",
  ),
  "dgq": System(
    dgq,
    "W5",
    "arXiv:2310.04836",
    "W4A8: two searches, int4 groups inside int8 columns",
    "KL 4.7e-3, float scales to nearest 6.3e-3, per channel 7.2e-3 "
    "(jaxquant.apps.gates --gates dgq --batches 3 --calibration_batches 2)",
  ),
  "zeroquant_fp": System(
    zeroquant_fp,
    "W6",
    "arXiv:2307.09782",
    "FP4 weights under shifted scales, GPTQ, low rank; FP8 activations",
    "M2, nearest: KL 5.8e-3, free scales 5.7e-3, M1 7.8e-3; GPTQ and rank 0, 8, 32: 3.4, 2.7, "
    "2.1e-3 (jaxquant.apps.gates --gates zeroquant_fp,lorc --batches 3 --calibration_batches 2)",
  ),
  "flexq": System(
    flexq,
    "W8",
    "arXiv:2508.04405",
    "W6A6, the input of down in 8 bits",
    "KL 1.6e-3, all of x in 6 bits 3.8e-3 "
    "(jaxquant.apps.gates --gates flexq --batches 3 --calibration_batches 2)",
  ),
  "fireq": System(
    fireq,
    "W9",
    "arXiv:2505.20839",
    "int4 weights with E4M3 scales, FP8 activations",
    "weights times 0.02, nearest: KL 6.3e-3, without the power of two 5.3 "
    "(jaxquant.apps.gates --gates fireq --batches 3 --calibration_batches 2); 4-bit keys and "
    "values with large key pairs: 3.9e-3 after its scaling of keys, 817e-3 without "
    "(jaxquant.apps.evidence --gates smooth_attention)",
  ),
  "comet": System(
    comet,
    "W10",
    "arXiv:2410.12168",
    "W4A4, blocks with outliers in W4A8, channels permuted",
    "with outlier channels, g64: KL 27e-3, W4A4 732e-3; W4A8 16e-3, so its 1.15 W4A8 fails "
    "(jaxquant.apps.gates --gates comet --batches 3 --calibration_batches 2)",
  ),
  "w8a8_fp": System(
    w8a8_fp,
    "E3",
    "arXiv:2411.02355",
    "E4M3 weights per channel, activations per token",
    "packed equals unpacked bit for bit (tests/test_one_path.py)",
  ),
  "w8a8_int": System(
    w8a8_int,
    "E3",
    "arXiv:2411.02355",
    "int8 weights by GPTQ, activations per token",
    "quantizes and runs on a small random model (tests/recipes/test_studies.py)",
  ),
  "w4a16_int": System(
    w4a16_int,
    "E3",
    "arXiv:2411.02355",
    "int4 g128 by GPTQ with clipped ranges",
    "quantizes and runs on a small random model (tests/recipes/test_studies.py)",
  ),
  "smoothquant": System(
    smoothquant,
    "W3",
    "arXiv:2211.10438",
    "int8 after outliers moved into the weights",
    "outlier channels: KL smoothquant 1.99e-3, int8 24.1e-3 (jaxquant.apps.gates --gates "
    "smoothquant --batches 3 --calibration_batches 2)",
  ),
  "quarot": System(
    quarot,
    "W3",
    "arXiv:2404.00456",
    "W4A4, the stream rotated",
    "outlier channels, nearest: KL quarot 19.2e-3, smoothquant 111e-3 (jaxquant.apps.gates "
    "--gates quarot --batches 3 --calibration_batches 2)",
  ),
  "spinquant": System(
    spinquant,
    "W3",
    "arXiv:2405.16406",
    "W4A4, learned rotations",
    "function kept to 1e-5, packed equals unpacked bit for bit, on a small random model "
    "(tests/recipes/test_transform_recipes.py)",
  ),
  "mr_gptq": System(
    mr_gptq,
    "W11",
    "arXiv:2509.23202",
    "MXFP4 or NVFP4, block rotations and GPTQ",
    "MXFP4, 4/3 scales: KL mr_gptq 15.7e-3, nearest 24.1e-3, outlier channels 67.2e-3 and 144e-3; "
    "floor scales: 16.7e-3 and 26.3e-3, outlier channels 73.3e-3 and 106e-3, where its gate fails "
    "(jaxquant.apps.gates --gates mr_gptq,mr_gptq_outliers,mr_gptq_floor,mr_gptq_outliers_floor "
    "--batches 3 --calibration_batches 2)",
  ),
  "svdquant": System(
    svdquant,
    "W22",
    "arXiv:2411.05007",
    "W4A4 beside a 16-bit branch of rank 32",
    "rank 16: KL smooth 9.44e-3, without 868e-3 (jaxquant.apps.gates --gates svdquant_smooth "
    "--batches 3 --calibration_batches 2)",
  ),
  "noisyquant": System(
    noisyquant,
    "W28",
    "arXiv:2211.16056",
    "W6A6, a fixed noise under x",
    "KL 74.4e-3, without noise 100.6e-3 (jaxquant.apps.gates --gates noisyquant --batches 3 "
    "--calibration_batches 2); layer error 0.9 or less of that without noise for x between levels "
    "(tests/solvers/test_transform_solvers.py)",
  ),
}
