"""Training in low precision: the six operands of every matmul."""

from jaxquant.recipes.training.int8 import w8a8_int8
from jaxquant.recipes.training.int_vs_fp import int_vs_fp
from jaxquant.recipes.training.layercast import layercast
from jaxquant.recipes.training.mxfp8 import mxfp8
from jaxquant.recipes.training.nvfp4 import nvfp4
from jaxquant.recipes.training.rope_guard import rope_guard

__all__ = ["int_vs_fp", "layercast", "mxfp8", "nvfp4", "rope_guard", "w8a8_int8"]
