"""Training in low precision: the six operands of every matmul."""

from jaxquant.recipes.training.bibench import bibench
from jaxquant.recipes.training.binarydm import binarydm
from jaxquant.recipes.training.chon import chon
from jaxquant.recipes.training.fp4_space import fp4_space
from jaxquant.recipes.training.fp8 import fp8
from jaxquant.recipes.training.fp8_blocks import fp8_blocks
from jaxquant.recipes.training.gaussws import gaussws
from jaxquant.recipes.training.int8 import w8a8_int8
from jaxquant.recipes.training.int_embeddings import int_embeddings
from jaxquant.recipes.training.int_vs_fp import int_vs_fp
from jaxquant.recipes.training.jetfire import jetfire
from jaxquant.recipes.training.layercast import layercast
from jaxquant.recipes.training.mxfp8 import mxfp8
from jaxquant.recipes.training.nvfp4 import nvfp4
from jaxquant.recipes.training.quartet import quartet
from jaxquant.recipes.training.quartet2 import quartet2
from jaxquant.recipes.training.qvgen import qvgen
from jaxquant.recipes.training.rope_guard import rope_guard
from jaxquant.recipes.training.switchback import switchback

__all__ = [
  "bibench",
  "binarydm",
  "chon",
  "fp4_space",
  "fp8",
  "fp8_blocks",
  "gaussws",
  "int_embeddings",
  "int_vs_fp",
  "jetfire",
  "layercast",
  "mxfp8",
  "nvfp4",
  "quartet",
  "quartet2",
  "qvgen",
  "rope_guard",
  "switchback",
  "w8a8_int8",
]
