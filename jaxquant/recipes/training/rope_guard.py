"""BF16 training whose positions stay exact (arXiv:2411.13476)."""

from jaxquant.formats import BFLOAT16
from jaxquant.ops.qdot import Operand, Rule
from jaxquant.recipe import Recipe


def rope_guard() -> Recipe:
  """All six operands of every site in bf16, sums in float32; rotary angles in float32 always.

  The paper finds that bf16 breaks the relative position encoding of RoPE: a common shift of all
  positions changes the scores, and the first token changes them most. Here that cannot be asked
  for: `ops.attention` takes integer positions only, rotates in float32 and casts q and k after it,
  so what is left is the rounding of q and k, the same at every position. The paper's remedy for the
  first token, AnchorAttention, is data: `data.pack_documents` and the `documents` of the model.

  On a float32 model this is bf16 in the contractions alone; build it with dtype=bfloat16 for the
  rest, as the paper trains.
  """
  each = Operand(BFLOAT16)
  rule = Rule(each, each, each, each, each, each)
  return Recipe(((".*", rule),), name="rope_guard")
