"""jaxquant: one jit-compiled code path for quantized training, quantization and decode."""

from jaxquant import checkpoint, formats, rounding, scales, sharding
from jaxquant.contraction import Contraction
from jaxquant.encoding import encode, quantize
from jaxquant.formats import Format, bits_per_value
from jaxquant.intercept import collect, intercepted, quantized
from jaxquant.kernels import Codebook, LowRank, Pre, Sparse, Sum, map_kernels, matmul, to_dense
from jaxquant.ops.qdot import FLOAT, Operand, Rotation, Rule, Source, qdot, weight_only
from jaxquant.ops.tracked import Static
from jaxquant.ptq import quantize_params, report, size_bytes
from jaxquant.recipe import Recipe
from jaxquant.sites import Sites, sites
from jaxquant.state import init_quant, without_state
from jaxquant.tensor import QTensor, dequantize, nonfinite_blocks, pack, unpack

__version__ = "0.1.0"
__all__ = [
  "FLOAT",
  "Codebook",
  "Contraction",
  "Format",
  "LowRank",
  "Operand",
  "Pre",
  "QTensor",
  "Recipe",
  "Rotation",
  "Rule",
  "Sites",
  "Source",
  "Sparse",
  "Static",
  "Sum",
  "bits_per_value",
  "checkpoint",
  "collect",
  "dequantize",
  "encode",
  "formats",
  "init_quant",
  "intercepted",
  "map_kernels",
  "matmul",
  "nonfinite_blocks",
  "pack",
  "qdot",
  "quantize",
  "quantize_params",
  "quantized",
  "report",
  "rounding",
  "scales",
  "sharding",
  "sites",
  "size_bytes",
  "to_dense",
  "unpack",
  "weight_only",
  "without_state",
]
