"""Which options of FP4 training pay on a small regression, and what they cost.

python benchmarks/fp4_space.py --seeds 6 --steps 400 --write
"""

from __future__ import annotations

import argparse

import common
import numpy as np

from jaxquant import design_space
from jaxquant.ops.qdot import FLOAT

SCALES = (2.0**-8, 1.0, 2.0**8)
SIZE = 4096  # of the GEMMs whose overhead is listed
BOTH = {"rounding": "sr", "rotation": "rht"}
TRIED = (
  [{"scale": name} for name in design_space.AXES["scale"]]
  + [{"scale": name, **BOTH} for name in ("e8m0", "e8m0+ts", "e4m3+ts", "ue5m3")]
  + [{"scale": "e4m3+ts", "rounding": name} for name in ("sr", "sr all")]
  + [{"scale": "e4m3+ts", "rotation": name} for name in ("rht w", "rht")]
  + [{"scale": "e4m3+ts", "rotation": "rht w", "rounding": "sr"}]
  + [{"scale": "e4m3+ts", "block": "16"}, {"scale": "e4m3+ts", "maximum": "soft"}]
  + [{"scale": "e4m3+ts", "gradient": name} for name in list(design_space.AXES["gradient"])[1:]]
)


def row(labels: dict[str, str], naive: np.ndarray, task: design_space.Regression) -> list[str]:
  rule = design_space.choose(**labels).rule("layer")
  found = np.asarray(design_space.train(rule, task, loss_scales=SCALES), np.float64)
  difference = found[1] - naive
  error = difference.std(ddof=1) / len(naive) ** 0.5
  cost = design_space.overhead(rule, SIZE, SIZE, SIZE)
  extra = cost - design_space.overhead(design_space.choose().rule("layer"), SIZE, SIZE, SIZE)
  value = design_space.gain(naive.mean(), found[1].mean(), extra)
  versus = f"{difference.mean():+.4f} ± {error:.4f}"
  losses = [f"{loss:.4f}" for loss in found.mean(1)]
  return [" ".join(labels.values()), *losses, versus, f"{1e3 * cost:.2f}", f"{100 * value:+.1f}"]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--seeds", type=int, default=6)
  parser.add_argument("--steps", type=int, default=400)
  parser.add_argument("--write", action="store_true", help="write docs/results/fp4_space.md")
  args = parser.parse_args()
  task = design_space.regression(args.seeds, args.steps)
  plain = float(design_space.train(FLOAT, task).mean())
  naive = design_space.train(design_space.choose().rule("layer"), task)
  naive = np.asarray(naive, np.float64)[0]
  header = ["options", "loss, scaled 2^-8", "1", "2^8", "less naive", "overhead 1e-3", "gain %"]
  rows = []
  for labels in TRIED:
    rows.append(row(labels, naive, task))
    print(" | ".join(rows[-1]), flush=True)
  if args.write:
    body = (
      f"Two layers of 32, {args.steps} steps of Adam, {args.seeds} teachers; the float32 student "
      f"ends at {plain:.4f}. Losses are of the last tenth of the steps, with the loss multiplied "
      "by three scales. Less naive: against naive MXFP4 (the first row), paired by teacher, mean "
      "and standard error. Overhead: operations of quantization over those of three GEMMs of "
      f"{SIZE} (`design_space.overhead`, proposed constants). Gain: relative loss against naive "
      f"less the extra overhead.\n\n{common.markdown(header, rows)}"
    )
    common.write("fp4_space", "Options of FP4 training on a regression", body)


if __name__ == "__main__":
  main()
