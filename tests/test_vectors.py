"""Formats and scale rules against ml_dtypes, microxcaling, Transformer Engine and torchao.

Everything is compared bit for bit, signed zeros included. Numbers in the file are decimal reprs of
float32 values. Each test counts what it compared, so that a record cannot be skipped in silence.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import formats as F
from jaxquant import packing, scales
from jaxquant.encoding import encode
from jaxquant.rounding import ceil, floor, nearest_even, round_to, stochastic, ties_away
from jaxquant.tensor import QTensor, dequantize, pack, scale_values, unpack

HERE = ("element_tables", "element_rounding", "stochastic_rounding", "block_vectors")
HERE += ("edge_vectors", "scale_rule_comparison")
ELSEWHERE = {
  "rht": "tests of transforms",
  "ms_eden": "tests/test_eden.py",
  "db_llm_fdb": "tests of the DB-LLM recipe",
  "delayed_scaling": "tests/recipes/test_training_recipes.py",
  "apollo_step1": "tests of the APOLLO optimizer",
}
INT8_X = F.Format(F.int_grid(8), 32, scale=F.E8M0)  # integer codes; MXINT8 has fixed point
FIXED4_X = F.Format(F.UniformGrid("fixed4", 4, -7 / 4, 7 / 4, 1 / 4), 32, scale=F.E8M0)
E2M1_F32 = F.Format(F.E2M1, 32)
E4M3_F32 = F.Format(F.E4M3, 32)

GRIDS = {
  "E2M1": F.E2M1,
  "E2M3": F.E2M3,
  "E3M2": F.E3M2,
  "E4M3FN": F.E4M3,
  "E5M2": F.E5M2,
  "E8M0": F.E8M0,
  "UE4M3": F.E4M3,  # the non-negative half
  "UE5M3": F.UE5M3,
  "MXINT8": F.FIXED8,
  "INT4_sym": F.int_grid(4),
  "NF4": F.NF4,
  "NF2": F.normal_float_grid(2),
  "NF3": F.normal_float_grid(3),
  "DYN8_signed": F.dynamic_grid(),
  "DYN8_unsigned": F.dynamic_grid(signed=False),
  "TERNARY": F.TERNARY,
}
FLOOR = {
  "MXE4M3": F.MXFP8,
  "MXE5M2": F.MXFP8_E5M2,
  "MXE2M3": F.MXFP6_E2M3,
  "MXE3M2": F.MXFP6_E3M2,
  "MXE2M1": F.MXFP4,
  "MXINT8": F.MXINT8,
  "MXINT4": FIXED4_X,
}
CEIL = FLOOR | {"MXINT8": INT8_X, "MXINT6": F.MXINT6, "MXINT4": F.MXINT4}
MODES = {
  "floor": scales.ocp_floor,
  "rceil": scales.ocp_ceil,
  "ceil": scales.ocp_next,
  "even": scales.ocp_even,
}


def f32(x):
  return np.asarray(x, np.float64).astype(np.float32)


def unsigned_zeros(x):
  """Two's complement has no -0; the tools multiply before they drop its sign."""
  x = f32(x)
  return np.where(x == 0, np.float32(0), x)


def hexes(codes):
  return np.asarray([int(c, 16) for c in codes])


def assert_bits(got, want, what=""):
  got, want = np.asarray(got, np.float32).ravel(), f32(want).ravel()
  np.testing.assert_array_equal(np.isnan(got), np.isnan(want), err_msg=str(what))
  ok = ~np.isnan(want)
  got, want = got[ok].view(np.uint32), want[ok].view(np.uint32)
  np.testing.assert_array_equal(got, want, err_msg=str(what))


to_codes = jax.jit(packing.to_codes, static_argnums=1)
from_codes = jax.jit(packing.from_codes, static_argnums=1)


@functools.cache
def encoder(fmt, rule):
  def run(x):
    q = encode(x, fmt, axis=-1, rule=rule)
    return q, pack(q), dequantize(q), dequantize(pack(q)), scale_values(q.scale)

  return jax.jit(run)


def check(record, fmt, rule, shape=None, *, x=None, scale=None, codes=None, dequant=None):
  """Quantizes record's x, compares what is given; the container must say the same as the values."""
  x = f32(record["x"] if x is None else x).reshape(shape or (1, -1))
  q, packed, values, unpacked, effective = encoder(fmt, rule)(x)
  what = record.get("id", record)
  assert_bits(values, unpacked, what)
  assert_bits(unpack(packed).data, q.data, what)
  if scale is not None:
    assert_bits(effective, scale, what)
  if codes is not None:
    got = np.asarray(to_codes(q.data, fmt.elem)).ravel()
    np.testing.assert_array_equal(got, codes & (2**fmt.elem.bits - 1), err_msg=what)
  if dequant is not None:
    integers = isinstance(fmt.elem, F.UniformGrid)
    assert_bits(values, unsigned_zeros(dequant) if integers else dequant, what)
  return q, packed


def test_every_section_is_accounted_for(golden):
  assert set(golden) == {"meta", *HERE, *ELSEWHERE}


def test_element_tables(golden):
  compared = 0
  for name, record in golden["element_tables"].items():
    if name == "BIPOLAR_INTk":
      for bits in (1, 2, 3):
        assert_bits(F.bipolar_grid(bits).values(), record[f"k{bits}"], name)
        compared += 1
      continue
    grid = GRIDS[name]
    if "values_by_code" in record:
      want = f32([float(v) for v in record["values_by_code"]])
      codes = np.arange(len(want), dtype=np.uint8)
    else:
      want = f32(record["values_sorted"] if "values_sorted" in record else record["values"])
      codes = np.asarray(to_codes(jnp.asarray(want), grid))
    got = np.asarray(from_codes(jnp.asarray(codes), grid))
    if name == "MXINT8":  # code 0x80 = -2 exists and is never produced
      assert want[128] == -2
      want, codes, got = (np.delete(a, 128) for a in (want, codes, got))
    assert_bits(got, want, name)
    finite = np.isfinite(want)
    if isinstance(grid, F.FloatGrid):
      assert_bits(grid.values()[codes][finite], want[finite], name)
    else:
      assert_bits(grid.values(), np.sort(want), name)
    compared += 1
    if name == "E8M0":
      finite[0] = False  # 2^-127 is subnormal: XLA may flush it, and no rule produces it
    np.testing.assert_array_equal(
      np.asarray(to_codes(jnp.asarray(want[finite]), grid)), codes[finite], err_msg=name
    )
  assert compared == len(golden["element_tables"]) - 1 + 3 == 19


def test_element_rounding(golden):
  compared = 0
  for record in golden["element_rounding"]:
    grid, x = GRIDS[record["format"]], f32(record["x"])
    for y, mode in (("y", nearest_even), ("y_ties_away", ties_away)):
      if y in record:
        want = unsigned_zeros(record[y]) if grid is F.FIXED8 else record[y]
        run = jax.jit(round_to, static_argnums=(1, 2))
        assert_bits(run(x, grid, mode), want, record["format"])
        compared += 1
    if "codes" in record:
      codes = to_codes(run(x, grid, nearest_even), grid)
      np.testing.assert_array_equal(np.asarray(codes), hexes(record["codes"]))
      compared += 1
    if record["format"] == "E8M0":
      # Scales below 2^-126 are raised to it: XLA flushes 2^-127, a subnormal, to zero.
      for y, mode in (("cast_nearest_mld", nearest_even), ("floor", floor), ("ceil", ceil)):
        want = np.maximum(f32(record[y]), np.float32(2.0**-126))
        assert_bits(jax.jit(round_to, static_argnums=(1, 2))(x, grid, mode), want, y)
        assert (f32(record[y]) < 2.0**-126).sum() == 2
        compared += 1
  assert compared == 7 + 5 + 5 + 3


def test_stochastic_rounding_given_noise(golden):
  (record,) = golden["stochastic_rounding"]
  y = round_to(f32(record["x"]), GRIDS[record["format"]], stochastic, f32(record["u"]))
  assert_bits(y, record["y"])


def _mx(r):
  fmt, rule = {"ocp_floor": (FLOOR, None), "ceil": (CEIL, scales.ocp_ceil)}[
    "ceil" if "_ceil_" in r["id"] else "ocp_floor"
  ]
  fmt = fmt[r["format"]]
  _, packed = check(
    r, fmt, rule, scale=r["scale"], codes=hexes(r["elem_codes"]), dequant=r["dequant"]
  )
  assert packed.scale.view(jnp.uint8).item() == int(r["scale_code"], 16)


def _quartet(r):
  codes = hexes(r["elem_codes_rne"])
  check(r, E2M1_F32, scales.quartet, scale=r["scale"], codes=codes, dequant=r["dequant_rne"])
  check(r, F.MXFP4, scales.ocp_floor, scale=r["pow2_scale"])
  largest = np.abs(f32(r["x"])).max() / f32(r["scale"])
  assert_bits(largest, r["x_scaled_max"])


def _quest(r):
  q, _ = check(
    r, F.MXFP4, scales.quest, scale=r["scale"], codes=hexes(r["elem_codes"]), dequant=r["dequant"]
  )
  mask = np.abs(f32(r["x"]) / np.asarray(scale_values(q.scale)).ravel()) < 6
  np.testing.assert_array_equal(mask, np.asarray(r["grad_mask"], bool))


def _nvfp4(r):
  rule = scales.four_over_six if "4over6" in r["id"] else None
  fmt = F.NVFP4_2D if "2d" in r["id"] else F.NVFP4
  packed_bytes = hexes(r["packed_bytes"])
  codes = np.stack([packed_bytes & 15, packed_bytes >> 4], -1).ravel()
  q, packed = check(r, fmt, rule, r["shape"], codes=codes, dequant=r["dequant"])
  np.testing.assert_array_equal(np.asarray(packed.data).ravel(), packed_bytes)  # the same container
  if fmt is F.NVFP4_2D:
    assert_bits(np.repeat(q.scale.data, 16), r["block_scales_per_row"])
    return
  assert_bits(q.scale.data, r["block_scales"], r["id"])
  np.testing.assert_array_equal(
    np.asarray(packed.scale.data.view(jnp.uint8)).ravel(), hexes(r["block_scale_codes"])
  )
  assert_bits(q.scale.scale, r["s_global"], r["id"])
  assert_bits(q.data, r["elem_values"], r["id"])
  assert_bits(np.abs(f32(r["x"])).max(), r["global_amax"])


def _nvint4(r):
  codes = np.asarray(r["int_codes"])
  q, packed = check(r, F.NVINT4, None, r["shape"], codes=codes)
  # The record multiplies by the rounded product of both scales. `dequantize` applies the tensor
  # scale last, like the reference of NVFP4 (whose records are bit-equal), so it may be 1 ulp off.
  product = q.data * jnp.repeat(scale_values(q.scale), 16, 1)
  assert_bits(product, unsigned_zeros(r["dequant"]), r["id"])
  np.testing.assert_array_max_ulp(np.asarray(dequantize(q)).ravel(), f32(r["dequant"]), 1)
  assert_bits(q.scale.scale, r["s_tensor"], r["id"])
  assert_bits(q.scale.data, r["block_scales"], r["id"])
  np.testing.assert_array_equal(
    np.asarray(packed.scale.data.view(jnp.uint8)).ravel(), hexes(r["block_scale_codes"])
  )


def _ue5m3(r):
  codes = hexes(r["elem_codes"])
  check(r, F.FP4_UE5M3, None, scale=r["scale"], codes=codes, dequant=r["dequant"])


def _fp8(r):
  rule = scales.fp8_scale_pow2 if "pow2" in r["id"] else scales.fp8_scale
  codes = hexes(r["elem_codes"])
  check(r, E4M3_F32, rule, scale=r["dec_scale"], codes=codes, dequant=r["dequant"])
  found = rule(f32(r["x"]).reshape(1, 1, 1, 32), E4M3_F32)
  assert_bits(found.multiplier, r["enc_scale"], r["id"])


def _nf4_double(r):
  # The record counts blocks through the rows; ours share second-level scales along K.
  codes = np.asarray(r["nf4_codes"])
  q, _ = check(
    r, F.NF4_DQ, scales.absmax_first, scale=r["absmax_dq"], codes=codes, dequant=r["dequant"]
  )
  assert isinstance(q.scale, QTensor)
  np.testing.assert_array_equal(
    np.asarray(to_codes(q.scale.data, q.scale.fmt.elem)).ravel(), r["absmax_codes"]
  )
  assert_bits(q.scale.offset, r["offset"])
  assert_bits(q.scale.scale, r["absmax2"])
  assert_bits(np.abs(f32(r["x"])).reshape(r["shape"]).max(-1), r["absmax"])


CHECKS = (
  ("MXFP4_quartet", _quartet, 3),
  ("MXFP4_quest", _quest, 3),
  ("MX", _mx, 39),
  ("NVFP4", _nvfp4, 7),
  ("NVINT4", _nvint4, 3),
  ("FP4_UE5M3", _ue5m3, 3),
  ("FP8block", _fp8, 6),
  ("NF4_doublequant", _nf4_double, 1),
)


@pytest.mark.parametrize(("prefix", "run", "count"), CHECKS, ids=[c[0] for c in CHECKS])
def test_block_vectors(golden, prefix, run, count):
  earlier = tuple(p for p, _, _ in CHECKS[: [c[0] for c in CHECKS].index(prefix)])
  records = [
    r
    for r in golden["block_vectors"]
    if r["id"].startswith(prefix) and not r["id"].startswith(earlier or ("-",))
  ]
  for record in records:
    run(record)
  assert len(records) == count


def test_block_vectors_are_65():
  assert sum(count for _, _, count in CHECKS) == 65


@pytest.mark.parametrize("mode", MODES)
def test_scale_rules_where_they_differ(golden, mode):
  x, compared = {}, 0
  for r in golden["scale_rule_comparison"]["records"]:
    assert r["rule_agrees"]
    if r["x"] is not None:  # stored once, in the floor record
      x[r["format"], r["amax"]] = r["x"]
    if r["mode"] != mode:
      continue
    _, packed = check(
      r | {"id": f"{mode} {r['format']} {r['amax']}"},
      FLOOR[r["format"]],
      MODES[mode],
      x=x[r["format"], r["amax"]],
      scale=r["scale"],
      codes=hexes(r["elem_codes"]),
      dequant=r["dequant"],
    )
    assert packed.scale.view(jnp.uint8).item() == int(r["scale_code"], 16)
    compared += 1
  assert compared == 72 / len(MODES)


def test_edge_vectors(golden):
  records = {r["id"]: r for r in golden["edge_vectors"]}
  assert len(records) == 7
  for name in ("zero_block_E2M1", "zero_block_INT8"):
    r = records[name]
    assert r["scale"] is None
    check(r, FLOOR[r["format"]], None, dequant=r["dequant"])
  for name in ("floor_saturation_E2M1", "floor_saturation_E4M3", "ceil_no_saturation_E2M1"):
    r = records[name]
    rule = MODES["rceil" if r["rule"] == "ceil" else "floor"]
    check(r, FLOOR[r["format"]], rule, scale=r["scale"], dequant=r["dequant"])


def test_nvfp4_zero_block_and_underflow(golden):
  records = {r["id"]: r for r in golden["edge_vectors"]}
  zero, tiny = records["nvfp4_zero_block"], records["nvfp4_block_scale_underflow"]
  for r in (zero, tiny):
    q, packed = check(r, F.NVFP4, None)
    scale_codes = np.asarray(packed.scale.data.view(jnp.uint8)).ravel()
    np.testing.assert_array_equal(scale_codes, hexes(r["block_scale_codes"]))
    # A block whose scale is zero decodes to zeros whatever its codes are. In the reference they are
    # saturated by an infinite multiplier; ours are zeros. The other block is compared.
    first = 8 if r is tiny else 0
    got = np.asarray(packed.data).ravel()[first:]
    np.testing.assert_array_equal(got, hexes(r["packed_bytes"])[first:])
    assert_bits(np.abs(dequantize(q)).ravel()[:16], np.zeros(16))
  assert_bits(q.scale.data, tiny["block_scales"])
