"""Solvers: (w [K, N], statistic, Format) -> QTensor. Pure functions, jit- and vmap-safe."""

from jaxquant.solvers.by_site import BySite
from jaxquant.solvers.cholesky import dead_channels, error_feedback
from jaxquant.solvers.gptq import gptq, proxy_loss
from jaxquant.solvers.kmeans import kmeans
from jaxquant.solvers.rtn import rtn
from jaxquant.solvers.vq import vptq

__all__ = [
  "BySite",
  "dead_channels",
  "error_feedback",
  "gptq",
  "kmeans",
  "proxy_loss",
  "rtn",
  "vptq",
]
