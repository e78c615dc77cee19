"""Gradient estimators: masks at their bounds, ragged and zero blocks, the rotated basis.

Slopes and the gradient through a scale are in tests/recipes/test_design_space.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import estimators
from jaxquant.encoding import encode
from jaxquant.formats import E2M1, MXFP4, Format
from jaxquant.ops.hadamard import rotate
from jaxquant.ops.qdot import Operand, Rotation, Rule, Source, qdot
from jaxquant.scales import Scales, quest

ALL = {
  "clipped_ste": estimators.clipped_ste,
  "trusted": estimators.trusted,
  "trust": estimators.trust(0.5),
  "dge": estimators.dge(),
  "spline": estimators.spline(),
  "through_scale": estimators.through_scale(),
  "through_soft_scale": estimators.through_scale(estimators.dge(), sharpness=16.0),
}
FMT = Format(E2M1, 8)


@pytest.mark.parametrize(
  ("name", "passes"),  # for u = -8, -6, -5, -.3, 0, .25, 6, 6.01 on E2M1
  [
    ("clipped_ste", [0, 1, 1, 1, 1, 1, 1, 0]),
    ("trusted", [0, 0, 1, 1, 1, 1, 0, 0]),
    ("trust", [0, 1, 0, 1, 1, 1, 1, 1]),  # |u - q| <= 1/2: -5 is a tie between -4 and -6
  ],
)
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_masks_at_their_bounds(name, passes, scale):
  u = jnp.array([[-8, -6, -5, -0.3, 0, 0.25, 6, 6.01]], jnp.float32)
  q = encode(u * scale, FMT, axis=-1, scales=Scales(jnp.full((1, 1), scale)))
  g = jnp.arange(1.0, 9)[None]
  np.testing.assert_array_equal(ALL[name](u * scale, q, g), g * jnp.array(passes))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("axis", [-1, -2])
def test_ragged_and_zero_blocks(name, axis):
  """Padding neither changes the elements that are there nor divides by zero."""
  x, g = jax.random.normal(jax.random.key(0), (2, 5, 24))
  x = x.at[:, 8:16].set(0)
  lay = lambda a: a if axis == -1 else a.T

  @jax.jit
  def run(x, g):
    return lay(ALL[name](lay(x), encode(lay(x), FMT, axis=axis), lay(g)))

  whole, ragged = run(x, g), run(x[:, :21], g[:, :21])
  assert jnp.isfinite(whole).all()
  alone = run(x[:, 16:21], g[:, 16:21])  # the tail by itself is a block of five
  # Another shape is another program: the last bits of powers, exponentials and sums of 8 differ.
  np.testing.assert_allclose(ragged[:, :16], whole[:, :16], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(ragged[:, 16:], alone, rtol=1e-5, atol=1e-6)


def test_they_act_in_the_basis_of_the_quantizer():
  """dx = ((g w~^T) * mask) R^T for a rotated operand, dw alike, whatever the backward source."""
  ahead = Operand(MXFP4, quest, rotation=Rotation(32), gradient=estimators.trusted)
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = (16, 64), (64, 24), (16, 24)
  x, w, g = (jax.random.normal(k, s) for k, s in zip(keys, shapes))

  @jax.jit
  def run(x, w, g):
    xh, wh = rotate(x, 32, -1), rotate(w, 32, -2)
    xq, wq = encode(xh, MXFP4, axis=-1, rule=quest), encode(wh, MXFP4, rule=quest)
    masks = [estimators.trusted(a, q, jnp.ones_like(a)) for a, q in ((xh, xq), (wh, wq))]
    found = {}
    for source in Source:
      back = Operand(source=source)
      rule = Rule(x=ahead, w=ahead, dgrad_w=back, wgrad_x=back)
      found[source.value] = jax.vjp(lambda x, w, r=rule: qdot(x, w, r), x, w)[1](g)
    return jq.dequantize(xq), jq.dequantize(wq), xh, wh, masks, found

  xq, wq, xh, wh, masks, found = jax.device_get(run(x, w, g))
  assert all(0.005 < 1 - m.mean() < 0.1 for m in masks)  # something clips
  h = np.float64(rotate(jnp.eye(64), 32, -1))
  for source, (a, b) in {"forward": (xq, wq), "original": (xh, wh)}.items():
    dx, dw = found[source]
    want = (np.float64(g) @ b.T * masks[0]) @ h, h @ (np.float64(a).T @ g * masks[1])
    # float32 sums of at most 64 terms
    np.testing.assert_allclose(dx, want[0], rtol=0, atol=3e-6 * np.abs(want[0]).max())
    np.testing.assert_allclose(dw, want[1], rtol=0, atol=3e-6 * np.abs(want[1]).max())
