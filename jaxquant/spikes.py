"""Loss spikes: a step whose loss stands far above those of the steps before."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

State = dict[str, jax.Array]
SIGMA = 1.4826  # standard deviation of a normal in units of its median absolute deviation


@dataclasses.dataclass(frozen=True)
class Spikes:
  """Watches the loss of every step.

      spike:  loss > median + threshold * 1.4826 * median |loss - median|, or not finite

  over the last `window` losses; none before there are that many. Medians, because a mean and its
  deviation are moved by the very spikes that they should find.

  Attributes:
    window: steps looked back on.
    threshold: k, in standard deviations of a normal.
    skip: leave out the update of a spike (`guarded` does).

  Example:
    >>> spikes = Spikes(window=4)
    >>> state = spikes.init()
    >>> for step, loss in enumerate((2.0, 2.1, 1.9, 2.0, 2.1, 9.0, 2.0)):
    ...   state, spike = spikes(state, jnp.float32(loss), jnp.int32(step + 1))
    >>> int(state["spikes"]), int(state["spike_at"])
    (1, 6)
  """

  window: int = 64
  threshold: float = 6.0
  skip: bool = False

  def __post_init__(self) -> None:
    """Raises ValueError for a window without a median deviation."""
    if self.window < 3:
      raise ValueError(f"Spikes: a window of {self.window} losses has no scale; take 3 or more")

  def init(self) -> State:
    """Before the first step: `losses` [window] newest first, how many spikes, the last one's step.

    Places that hold no loss yet are NaN.
    """
    zero = lambda: jnp.zeros((), jnp.int32)  # a buffer each, because both are donated
    losses = jnp.full(self.window, jnp.nan, jnp.float32)
    return {"losses": losses, "spikes": zero(), "spike_at": zero()}

  def __call__(self, state: State, loss: jax.Array, step: jax.Array) -> tuple[State, jax.Array]:
    """(the next state, whether this step is a spike).

    Args:
      state: from `init` or the step before.
      loss: float32 scalar.
      step: int32 scalar, its number.
    """
    losses = state["losses"]
    full = ~jnp.isnan(losses).any()
    median = jnp.median(losses)
    sigma = SIGMA * jnp.median(jnp.abs(losses - median))
    spike = ~jnp.isfinite(loss) | (full & (loss > median + self.threshold * sigma))
    # What is not finite has no place in a median.
    kept = jnp.where(jnp.isfinite(loss), jnp.roll(losses, 1).at[0].set(loss), losses)
    after = {
      "losses": kept,
      "spikes": state["spikes"] + spike,
      "spike_at": jnp.where(spike, step, state["spike_at"]).astype(jnp.int32),
    }
    return after, spike


def guarded(step: Callable, spikes: Spikes, *, out_shardings: object = None) -> jax.stages.Wrapped:
  """A training step under watch: (state, seen, batch) -> (state, seen, metrics), both donated.

  With `skip`, a spike leaves everything but the numbers of steps as it was: that batch and its
  random key are passed over, in a resumed run as in the first.

  Args:
    step: (state, batch) -> (state, metrics with "loss"), as `training.make_step` makes it.
    spikes: what to watch for.
    out_shardings: of the result, as of `jax.jit`.
  """

  def run(before, seen: State, batch: jax.Array) -> tuple:
    after, metrics = step(before, batch)
    seen, spike = spikes(seen, metrics["loss"], after.step)
    if spikes.skip:
      kept = lambda path, old, new: new if _counts(path) else jnp.where(spike, old, new)
      after = jax.tree.map_with_path(kept, before, after)
    counted = {name: seen[name] for name in ("spikes", "spike_at")}
    return after, seen, metrics | counted

  return jax.jit(run, donate_argnums=(0, 1), out_shardings=out_shardings)


def _counts(path: tuple) -> bool:
  """Whether a leaf is a number of steps: of the state, or of a site's schedules."""
  return jax.tree_util.keystr(path[-1:], simple=True) in ("step", "clock")
