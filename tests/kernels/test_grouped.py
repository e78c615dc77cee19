"""Grouped matmul: interpreted against a float64 product per group, compiled for each TPU."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxquant as jq
from jaxquant import formats
from jaxquant.ops.backend import target
from jaxquant.ops.grouped import grouped_matmul as site
from jaxquant.ops.grouped import why_no_kernel
from jaxquant.ops.pallas import interpreted
from pallas_kernels.grouped import Unsupported, grouped_matmul, why_not
from pallas_kernels.grouped.cases import FORMATS, case, routed
from pallas_kernels.grouped.plan import cut

# Races and reads of memory that nobody wrote (NaN) fail the test.
CHECKED = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
K, N, EXPERTS = 256, 128, 6
# Elements times scales are exact in bf16 here; sums of K products in float32, in another order.
SUMS = 2e-6
BF16 = 2.0**-8  # results rounded to bf16, at the end


@functools.cache
def operands(name, t, n=N, seed=0):
  """(x, packed w, float64 x, float64 w)."""
  rng = np.random.default_rng(seed)
  x = jnp.asarray(rng.normal(size=(t, K)), jnp.bfloat16)
  w = jnp.asarray(rng.normal(size=(EXPERTS, K, n)) * 0.02, jnp.float32)
  q = jax.vmap(lambda w: jq.quantize(w, FORMATS[name]))(w)
  return x, q, np.asarray(x, np.float64), np.asarray(jq.dequantize(q), np.float64)


@functools.cache
def kernel(name, generation="v6e", blocks=()):
  """One program for all group sizes."""

  def run(x, data, scale, sizes):
    scale, outer = (scale.data, scale.scale) if isinstance(scale, jq.QTensor) else (scale, None)
    return grouped_matmul(
      x, data, scale, sizes, FORMATS[name], generation=generation, outer=outer,
      out_dtype=jnp.float32, blocks=dict(blocks), interpret=CHECKED,
    )  # fmt: skip

  return jax.jit(run)


def product(x, w, sizes):
  """float64 reference: group after group; rows beyond the last group are zero."""
  y, row = np.zeros((x.shape[0], w.shape[2])), 0
  for e, size in enumerate(sizes):
    y[row : row + size] = x[row : row + size] @ w[e]
    row += size
  return y


def check(name, sizes, t, n=N, **options):
  x, q, x64, w64 = operands(name, t, n)
  got = kernel(name, **options)(x, q.data, q.scale, jnp.asarray(sizes, jnp.int32))
  want = product(x64, w64, sizes)
  assert np.abs(got - want).max() <= SUMS * np.abs(want).max()
  np.testing.assert_array_equal(got[sum(sizes) :], 0)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", FORMATS)
def test_formats(name):
  check(name, [3, 0, 17, 5, 0, 2], 32, generation="v5e" if name in ("nvfp4", "int8") else "v6e")


GROUPS = {
  "empty ones between": [3, 0, 17, 5, 0, 2],
  "none": [0, 0, 0, 0, 0, 0],
  "first takes all": [32, 0, 0, 0, 0, 0],
  "last takes all": [0, 0, 0, 0, 0, 32],
  "one row each": [1, 1, 1, 1, 1, 1],
  "one row": [0, 0, 0, 1, 0, 0],
  "on tiles": [16, 0, 0, 16, 0, 0],
  "across a tile": [15, 2, 15, 0, 0, 0],
  "some rows left over": [0, 9, 0, 0, 4, 0],
}


@pytest.mark.parametrize("groups", GROUPS)
def test_groups(groups):
  check("int4_g128", GROUPS[groups], 32)


CUTS = {
  "less than a tile": ([0, 2, 0, 3, 2, 1], 8, ()),
  "one token": ([0, 1, 0, 0, 0, 0], 1, ()),
  "rows that fill no tile": ([7, 0, 9, 0, 3, 1], 21, ()),
  "chunks, columns in two passes": (
    [5, 0, 30, 1, 0, 12], 64, (("chunk", 16), ("splits", 2), ("bn", 128), ("depth", 4)),
  ),
  "an odd number of chunks, columns in two passes": (
    [5, 0, 30, 1, 0, 12], 48, (("chunk", 16), ("splits", 2), ("bn", 128), ("depth", 2)),
  ),
  "all in one expert, many chunks": ([0, 0, 64, 0, 0, 0], 64, (("chunk", 16), ("depth", 8))),
  "chunks without rows": ([0, 0, 6, 0, 0, 0], 64, (("chunk", 16), ("depth", 2))),
  "two sizes of windows": ([40, 0, 3, 13, 0, 8], 64, (("windows", (48, 16)),)),
}  # fmt: skip


@pytest.mark.sampled(2)
@pytest.mark.parametrize("how", CUTS)
def test_cuts(how):
  sizes, t, blocks = CUTS[how]
  check("nvfp4", sizes, t, 256 if "columns" in how else N, blocks=blocks)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 32), min_size=EXPERTS, max_size=EXPERTS))
def test_any_groups(sizes):
  """Chunks of 16 of 32 rows; what does not fit any more is cut off."""
  sizes = np.diff(np.minimum(np.cumsum(sizes), 32), prepend=0)
  check("int4_g128", sizes.tolist(), 32, blocks=(("chunk", 16),))


def test_rows_of_nobody_do_not_matter():
  x, q, *_ = operands("int8", 32)
  sizes = jnp.array([3, 0, 17, 0, 0, 0], jnp.int32)
  got = kernel("int8")(x.at[20:].set(jnp.nan), q.data, q.scale, sizes)
  np.testing.assert_array_equal(got, kernel("int8")(x, q.data, q.scale, sizes))


def test_refusals_say_why():
  assert "float32" in why_not(formats.INT4, 8, 256, 128, jnp.float32)
  assert "N=100" in why_not(formats.INT4, 8, 256, 100)
  assert "blocks of K x 128" in why_not(formats.E4M3_128X128, 8, 256, 128)
  with pytest.raises(Unsupported, match="K=200"):
    cut(formats.INT4, 8, 200, 128, 4, "v6e")
  with pytest.raises(ValueError, match=r"wanted \[T, K\]"):
    site(jnp.ones((4, 8)), jnp.ones((2, 9, 3)), jnp.ones(2, jnp.int32))


# --- behind dispatch ------------------------------------------------------------------------------

SIZES = [3, 0, 17, 5, 0, 2]


def close(got, want):
  """Results in bf16 against float64."""
  got = np.asarray(got, np.float64)
  assert got.shape == want.shape
  assert np.abs(got - want).max() <= BF16 * np.abs(want).max()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("where", ["cpu", "tpu v6e"])
@pytest.mark.parametrize("name", ["int4_g128", "nvfp4"])
def test_site(name, where):
  x, q, x64, w64 = operands(name, 32)
  sizes, want = jnp.asarray(SIZES, jnp.int32), product(x64, w64, SIZES)
  with target(where), interpreted(CHECKED):
    assert (why_no_kernel(x, q) is None) == (where != "cpu")
    close(jax.jit(site)(x, q, sizes), want)
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), q)
    scan = jax.jit(lambda x, w: jax.lax.scan(lambda c, one: (c, site(x, one, sizes)), 0, w)[1])
    close(scan(x, stacked)[1], want)
    both = jax.jit(jax.vmap(site, (0, None, None)))(jnp.stack([x, 2 * x]), q, sizes)
    close(both[1], 2 * want)
    dx = jax.jit(jax.grad(lambda x: site(x, q, sizes).astype(jnp.float32).sum()))(x)
  # The weight of the dense gradient is rounded to bf16, the compute dtype, before it is summed.
  close(dx, product(np.ones((32, N)), w64.swapaxes(1, 2), SIZES))


def test_gradient_of_float_weights():
  x, _, x64, w64 = operands("int8", 32)
  sizes = jnp.asarray(SIZES, jnp.int32)
  loss = lambda x, w: (site(x, w, sizes) ** 2).sum() / 2
  dx, dw = jax.grad(loss, (0, 1))(x.astype(jnp.float32), jnp.asarray(w64, jnp.float32))
  y, row = product(x64, w64, SIZES), 0
  for e, size in enumerate(SIZES):
    rows = slice(row, row + size)
    np.testing.assert_allclose(dw[e], x64[rows].T @ y[rows], atol=1e-5)  # float32 sums of float32
    row += size
  np.testing.assert_allclose(dx, product(y, w64.swapaxes(1, 2), SIZES), atol=1e-5)


@pytest.mark.parametrize("check_vma", [False, True])
def test_experts_on_their_devices(check_vma):
  """Two devices with three experts each; rows are dispatched to where their expert is."""
  x, q, x64, w64 = operands("int4_g128", 32)
  halves = [[3, 0, 11], [9, 0, 2]]
  mesh = jax.make_mesh((2,), ("e",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
  with target("tpu v6e"), interpreted(CHECKED):
    run = jax.shard_map(
      site, mesh=mesh, in_specs=(P("e"), P("e"), P("e")), out_specs=P("e"), check_vma=check_vma
    )
    got = jax.jit(run)(x, q, jnp.asarray(np.concatenate(halves), jnp.int32))
  want = [product(x64[16 * i :][:16], w64[3 * i :][:3], s) for i, s in enumerate(halves)]
  close(got, np.concatenate(want))


# --- compiled -------------------------------------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize("generation", ["v5e", "v6e", "tpu7x"])
def test_compiles_and_reads_each_expert_once(generation):
  """Few rows of each format, many of some; HBM traffic at most 5 % above what must move."""
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip('libtpu is not installed: pip install "jaxquant[tpu-aot]"')
  from pallas_kernels.static_cost import costs

  made = {
    (name, tokens): case(generation, fmt=fmt, sizes=routed(tokens, 32, 2), k=1024, n=512)
    for name, fmt in FORMATS.items()
    for tokens in ((4, 512) if name in ("int8", "int4_g128", "nvfp4") else (4,))
  }
  results = dict(zip(made, costs(list(made.values()), generation)))
  assert {key: cost.error for key, cost in results.items() if cost.error} == {}
  assert not any(cost.truncated for cost in results.values())
  moved = {key: cost.read_bytes + cost.written_bytes for key, cost in results.items()}
  assert {k: v / made[k].bytes for k, v in moved.items() if v > 1.05 * made[k].bytes} == {}
