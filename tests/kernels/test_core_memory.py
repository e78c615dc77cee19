"""The scalar memory of a core: what listings share, what is a kernel's own, by hand.

The example is what libtpu 0.0.52 does around every program: its top level clears the words of a
registry in SMEM and leaves the registry's address at a fixed place; the finalization tests the
bits of word 7 and sends the host a command for each that is set.
"""

import pytest

from pallas_kernels import tpu_listing
from pallas_kernels.tpu_generations import GENERATIONS
from pallas_kernels.tpu_simulate import Machine

WORD = "  #{} [shape = 'u32[]', space=smem, size = 0x4, offset = {}, fixed_abs, tag = '{}']\n"
TOP = """
     0   :  {{ %s1_s0 = reloc 7  ;;  %s2_s1 = smov.u32 {flags} }}
   0x1   :  {{ %s3_s2 = scalar_lea.smem [#allocation0], %s1_s0  ;;  %s4_s3 = smov.u32 [#allocation0] }}
   0x2   :  {{ %5 = sst [smem:[%s3_s2]] %s2_s1  ;;  %6 = sst [smem:[#allocation3]] %s4_s3 }}
   0x3   :  {{ %7 = inlined_call /* <late-finalization> */ }}
"""  # noqa: E501
FINALIZATION = """
     0   :  { %s0_s0 = sld [smem:[#allocation5]]  ;;  %s1_s1 = reloc 7 }
   0x1   :  { %s2_s2 = sld [smem:[%s0_s0 + %s1_s1]] }
   0x2   :  { %s3_s3 = sand.u32 1, %s2_s2 }
   0x3   :  { %p4_p0 = scmp.eq.s32.totalorder %s3_s3, 0 }
   0x4   :  { %5 = sbr.rel (%p4_p0) target bundleno = 12 (0xc), region = 4 }
   0x5   :  {}
   0x6   :  {}
   0x7   :  {}
   0x8   :  {}
   0x9   :  { %6 = sfence }
   0xa   :  {}
   0xb   :  { %7 = sfence }
   0xc PF:  { %8 = sfence }
"""
LEAVE = """
     0   :  { %s1_s0 = sld [smem:[#allocation0]] }
   0x1   :  { %p2_p0 = scmp.eq.s32.totalorder %s1_s0, 1 }
   0x2   :  { %3 = sbr.rel (%p2_p0) target bundleno = 7 (0x7)  ;;  %s4_s1 = smov.u32 1 }
   0x3   :  { %5 = sst [smem:[#allocation0]] %s4_s1 }
   0x4   :  {}
   0x5   :  {}
   0x6   :  {}
   0x7   :  { %6 = sfence }
"""
TWICE = """
     0   :  { %s1_s0 = smov.u32 1 }
   0x1   :  { %2 = sst [smem:[#allocation0]] %s1_s0 }
   0x2   :  { %3 = inlined_call /* %leave = custom-call(%x) */ }
   0x3   :  { %4 = inlined_call /* %leave = custom-call(%x) */ }
"""


def listing(name, text, original=""):
  """A listing with allocations but without slots."""
  bundles = tpu_listing.parse_bundles(text)
  return tpu_listing.Listing(
    name, bundles, tpu_listing.SlotUse(), 0, tpu_listing.parse_fixed(original)
  )


def run(*listings):
  return Machine({x.name: x for x in listings}, GENERATIONS["v6e"], {}).run()


@pytest.mark.parametrize(
  ("flags", "place", "cycles", "unknown"),
  [
    (0, "0xfff98", 4 + 10, 0),  # nothing to tell the host: three bundles are skipped
    (2, "0xfff98", 4 + 10, 0),  # another command's bit
    (3, "0xfff98", 4 + 13, 0),
    (3, "0xfff90", 4 + 10, 1),  # an address that nothing was left at
  ],
)
def test_finalization_sees_what_the_program_left(flags, place, cycles, unknown):
  top = listing("TLP", TOP.format(flags=flags), WORD.format("allocation3", "0xfff98", "registry"))
  last = listing("<late-finalization>", FINALIZATION, WORD.format("allocation5", place, "registry"))
  found = run(top, last)
  assert (found.cycles, found.unknown_branches) == (cycles, unknown)


def test_a_kernel_finds_nothing_in_its_own_buffers():
  """Neither what the last call left there, nor the caller's buffer with the same number."""
  assert run(listing("TLP", TWICE), listing("leave", LEAVE)).unknown_branches == 2
  shared = WORD.format("allocation0", "0x40", "a place for both")
  found = run(listing("TLP", TWICE, shared), listing("leave", LEAVE, shared))
  assert (found.unknown_branches, found.cycles) == (0, 4 + 2 * 8)


@pytest.mark.parametrize(("place", "unknown"), [("0x4", 0), ("0xfffe8", 0), ("0", 1)])
def test_core_0_in_run_0_is_known_and_the_chip_is_not(place, unknown):
  found = run(listing("TLP", LEAVE, WORD.format("allocation0", place, "given by the runtime")))
  assert found.unknown_branches == unknown


def test_fixed_buffers_are_words_of_scalar_memory():
  text = (
    WORD.format("allocation0", "0x4", "core index")
    + WORD.format("allocation3", "0", "chip ID")
    + WORD.format("allocation4", "0x7b4", "flag").replace("smem", "sflag")
    + "  #allocation5 [shape = 'u32[8]{0}', space=smem, size = 0xffff, tag = 'Program registry']\n"
    + "  #allocation6 [shape = 'u32[1]{0}', space=smem, size = 0x4, scoped, fixed_abs]\n"
  )
  assert tpu_listing.parse_fixed(text) == {"#allocation0": 1, "#allocation3": 0}
