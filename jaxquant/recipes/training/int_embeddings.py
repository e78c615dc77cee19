"""Quantized embeddings (arXiv:2602.00969), whose spectra `diagnostics.SPECTRA` watches."""

from jaxquant.formats import Format, int_grid
from jaxquant.ops.qdot import weight_only
from jaxquant.recipe import Recipe


def int_embeddings(bits: int = 4, *, sites: str = "embed|head") -> Recipe:
  """Embedding and head as symmetric integers with one scale per tensor; all else in float.

  The study asks what such a grid leaves of a spectrum s_k ~ k^-a: its errors are a noise matrix
  with a flat spectrum, and the tail below its floor is lifted to it (`diagnostics.spectra`). The
  abstract was read, not the theorem.

  Args:
    bits: of an integer.
    sites: pattern of the quantized sites.
  """
  return Recipe(
    ((sites, weight_only(Format(int_grid(bits), None, None))),), name=f"int{bits}_embeddings"
  )
