"""Training of language models: state, loss, optimizer and one step, all pure.

Letters: B batch, T time. The float model and a quantized one train through the same step: only the
`apply` function differs.
"""

from collections.abc import Callable, Iterable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxquant import state
from jaxquant.optimizers import METHODS
from jaxquant.recipe import Recipe
from jaxquant.state import init_quant

Apply = Callable[..., jax.Array]  # (variables, tokens [B, T], rngs={'sr': key}) -> logits
# (variables, batch [B, T+1], rngs) -> nats per token
Loss = Callable[[dict, jax.Array, dict], jax.Array]


@flax.struct.dataclass
class TrainState:
  """All that a run is, except its config.

  Attributes:
    step: int32 scalar, updates done; it also names the next batch and the next random key.
    params: the model's parameters.
    opt_state: the optimizer's state.
    quant: the recipe's state (`jaxquant.state`); {} if it has none.
  """

  step: jax.Array
  params: optax.Params
  opt_state: optax.OptState
  quant: dict = flax.struct.field(default_factory=dict)

  @property
  def variables(self) -> dict:
    """What the model is applied to."""
    return {"params": self.params} | ({"quant": self.quant} if self.quant else {})


def init_state(
  model: nn.Module,
  tx: optax.GradientTransformation,
  tokens: ArrayLike,
  seed: int,
  recipe: Recipe | None = None,
) -> TrainState:
  """Fresh parameters, optimizer and recipe state; tokens [B, T] give the shapes.

  Parameters that the recipe learns start from what the sites see of the tokens.
  """
  params = jax.jit(model.init)(jax.random.key(seed), tokens)["params"]
  quant = {} if recipe is None else init_quant(model, {"params": params}, recipe, tokens)
  opt_state = tx.init(_trained(params, quant))
  return TrainState(jnp.zeros((), jnp.int32), params, opt_state, quant)


def _trained(params: optax.Params, quant: dict) -> optax.Params:
  """What the optimizer sees: the parameters, and beside them those that the recipe learns."""
  learned = state.learned(quant)
  return {"params": params, "quant": learned} if learned else params


def _decayed(params: optax.Params) -> optax.Params:
  """True for all but the norms' scales (2-D under a layer scan, so rank cannot tell them)."""
  return jax.tree.map_with_path(lambda path, _: path[-1].key != "scale", params)


def _stacked(path: tuple, leaf: jax.Array) -> int:
  """One axis of the parameters under a layer scan numbers layers (`jaxquant.models.decoder`)."""
  del leaf
  return int(any(entry.key == "layers" for entry in path))


def optimizer(
  steps: int,
  learning_rate: float,
  warmup: int,
  weight_decay: float = 0.1,
  clip: float | None = 1.0,
  mu_dtype: jax.typing.DTypeLike | None = None,
  method: str = "adamw",
) -> optax.GradientTransformation:
  """AdamW after clipping by the global norm; linear warmup, then a cosine to 0 over `steps`.

  Args:
    steps: of the run.
    learning_rate: at the end of the warmup.
    warmup: steps.
    weight_decay: of all but the norms' scales, times the learning rate.
    clip: of the gradients' global norm; None: not clipped, as "stable_spam" wants it.
    mu_dtype: in which the first moment is stored; None: that of the parameters.
    method: a name of `jaxquant.optimizers.METHODS`.

  Raises:
    ValueError: for another name.
  """
  if method not in METHODS:
    raise ValueError(f"optimizer: method is one of {', '.join(METHODS)}; got {method!r}")
  schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, steps)
  update = optax.chain(
    METHODS[method](mu_dtype=mu_dtype, stacked=_stacked),
    optax.add_decayed_weights(weight_decay, _decayed),
    optax.scale_by_learning_rate(schedule),
  )
  return optax.chain(*([] if clip is None else [optax.clip_by_global_norm(clip)]), update)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Mean negative log-likelihood in nats per token; logits [B, T, V], targets int32 [B, T]."""
  return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def from_logits(apply: Apply) -> Loss:
  """The loss of any model that returns logits: all of them exist at once."""

  def loss(variables, batch, rngs):
    return cross_entropy(apply(variables, batch[:, :-1], rngs=rngs), batch[:, 1:])

  return loss


def from_targets(apply: Apply) -> Loss:
  """The same of a model that takes `targets` and returns losses, such as ours: chunk by chunk."""

  def loss(variables, batch, rngs):
    return apply(variables, batch[:, :-1], targets=batch[:, 1:], rngs=rngs).mean()

  return loss


def make_step(
  apply: Apply,
  tx: optax.GradientTransformation,
  seed: int,
  *,
  recipe: Recipe | None = None,
  accumulate: int = 1,
  loss_of: Callable[[Apply], Loss] = from_logits,
  out_shardings: object = None,
) -> jax.stages.Wrapped:
  """One jitted update, (state, batch int32 [B, T+1]) -> (state, metrics); the state is donated.

  Its randomness is a function of (seed, step), so a resumed run draws what the first would have.

  Args:
    apply: `model.apply` or `jaxquant.quantized(model, recipe)`.
    tx: the optimizer.
    seed: of all randomness.
    recipe: that of `apply`, if it keeps state.
    accumulate: microbatches per update, along B.
    loss_of: `from_logits` or `from_targets`.
    out_shardings: of (state, metrics), as of `jax.jit`; None: the compiler's choice.
  """
  gradients = state.value_and_grad(loss_of(apply), recipe, accumulate)

  def step(before, batch):
    rngs = {"sr": jax.random.fold_in(jax.random.key(seed), before.step)}
    value, grads, seen = gradients(before.variables, batch, rngs)
    quant = state.advance(recipe, before.quant, seen) if before.quant else before.quant
    trained, grads = _trained(before.params, quant), _trained(grads, seen)
    updates, opt_state = tx.update(grads, before.opt_state, trained)
    params = optax.apply_updates(trained, updates)
    if state.learned(quant):
      params, quant = params["params"], state.merge(quant, params["quant"])
    metrics = {"loss": value, "grad_norm": optax.global_norm(grads)}
    return TrainState(before.step + 1, params, opt_state, quant), metrics

  return jax.jit(step, donate_argnums=0, out_shardings=out_shardings)


def make_evaluate(apply: Apply) -> Callable[[dict, Iterable[ArrayLike]], float]:
  """(variables, batches int32 [B, T+1]) -> mean loss in nats per token over all of them."""

  @jax.jit
  def loss(variables, batch):
    return from_logits(apply)(variables, batch, {"sr": jax.random.key(0)})

  def evaluate(variables, batches):
    losses = [loss(variables, batch) for batch in batches]
    return float(sum(losses) / len(losses))

  return evaluate
