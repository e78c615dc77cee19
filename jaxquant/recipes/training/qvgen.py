"""QVGen: W4A4 training behind a low-rank branch that decays (arXiv:2505.11497)."""

from jaxquant.ops.qdot import FLOAT, Rule
from jaxquant.quantizers import Branch, LsqWeight, Parts, TokenRange
from jaxquant.recipe import Recipe


def qvgen(
  *,
  bits: int = 4,
  input_bits: int = 4,
  rank: int | None = 32,
  steps: int = 444,
  float_sites: str = "embed|head",
) -> Recipe:
  """LSQ+ weights, clipped ranges per token, and w - Q(w) as factors whose rank halves each phase.

  After log2(rank) + 1 phases nothing but the quantized weight is left. The paper distills from the
  float model, and learns the clipping of inputs per group of diffusion timesteps; here there is one
  group. Call `jaxquant.state.between_steps` between updates.

  Args:
    bits: of weights.
    input_bits: of inputs.
    rank: of the branch, a power of two; None: no branch (the paper's baseline).
    steps: updates in a phase.
    float_sites: pattern of sites that stay in high precision.
  """
  weight = LsqWeight(bits)
  weight = weight if rank is None else Branch(weight, rank, steps)
  rule = Rule(learned=Parts(weight=weight, input=TokenRange(input_bits)))
  return Recipe(((float_sites, FLOAT), (".*", rule)), name="qvgen")
