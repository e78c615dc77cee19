"""Training in low precision: the six operands of every matmul."""

from jaxquant.recipes.training.int8 import w8a8_int8
from jaxquant.recipes.training.int_vs_fp import int_vs_fp
from jaxquant.recipes.training.mxfp8 import mxfp8
from jaxquant.recipes.training.nvfp4 import nvfp4

__all__ = ["int_vs_fp", "mxfp8", "nvfp4", "w8a8_int8"]
