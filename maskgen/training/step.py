"""One update for every objective: one forward pass, one vjp, one pull-back per parameter group.

No line here averages gradients over devices: a loss is a mean over the global batch, whose leading axis is
sharded over the mesh, so the compiler adds the all-reduce to the backward pass (`pull_back` in `gradients`).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend import core

from maskgen.objectives import Objective
from maskgen.training.state import TrainState

Update = Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, jax.Array]]]


def step_keys(seed: int, step: jax.Array | int, batch_size: int) -> tuple[jax.Array, jax.Array]:
  """The randomness of a step: one key per example [b], and one for the model."""
  example_rng, model_rng = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
  return jax.random.split(example_rng, batch_size), model_rng


def gradient_dtypes(objective: Objective, params: Any, frozen: Any, model_state: Any, batch: Any) -> set[str]:
  """The names of all dtypes in a step's backward pass. Nothing is computed: arguments may be shapes."""
  found: set[str] = set()

  def collect(jaxpr: core.Jaxpr) -> None:
    for equation in jaxpr.eqns:
      found.update(str(getattr(variable.aval, "dtype", "")) for variable in equation.outvars)
      for leaf in jax.tree.leaves(equation.params):
        if isinstance(leaf, core.Jaxpr | core.ClosedJaxpr):
          collect(leaf.jaxpr if isinstance(leaf, core.ClosedJaxpr) else leaf)

  def trace(params: Any, frozen: Any, model_state: Any, batch: Any) -> None:
    keys, rng = step_keys(0, 0, jax.tree.leaves(batch)[0].shape[0])
    rest = (frozen, model_state, {**batch, "key": keys}, rng, jnp.int32(0))
    values, pull_back = jax.vjp(lambda params: objective.losses(params, *rest, train=True)[0], params)
    collect(jax.make_jaxpr(pull_back)(values).jaxpr)

  jax.eval_shape(trace, params, frozen, model_state, batch)
  return found


def with_averages(objective: Objective, frozen: Any, ema: Mapping[str, Any]) -> Any:
  """The frozen parts that losses see: with the moving averages that the objective asks for."""
  groups = getattr(objective, "averages", ())
  return {**frozen, "average": {group: ema[group] for group in groups}} if groups else frozen


def make_update(
  objective: Objective,
  transforms: Mapping[str, optax.GradientTransformation],
  schedules: Mapping[str, optax.Schedule],
  *,
  seed: int,
  ema: Mapping[str, float | optax.Schedule],
  accumulation: int,
  parts: tuple[Any, Any] | None = None,
) -> Update:
  """Builds `update(state, frozen, batch) -> (state, metrics)`; pure, to be compiled by the caller.

  Args:
    objective: what is trained.
    transforms: the optimizer of each parameter group.
    schedules: the learning rate of each group, for the metrics.
    seed: of all randomness in the step, together with the step number.
    ema: decay of each group's moving average, a number or a schedule; other groups have none.
    accumulation: number of micro-batches. Micro-batch j takes the examples j, j + k, j + 2k, ..., so that no
      example changes its device. Exact if the objective's loss is a mean of per-example losses.
    parts: shardings of the parameters that each device updates, and of those that it holds afterwards, if
      these differ.
  """

  def gradients(params, frozen, model_state, batch, rng, step):
    def losses(params):
      values, metrics, new_state = objective.losses(params, frozen, model_state, batch, rng, step, train=True)
      return values, (metrics, new_state)

    values, pull_back, (metrics, model_state) = jax.vjp(losses, params, has_aux=True)
    grads = {}
    for group in params:
      # Only the owning group's gradient is kept; the compiler removes the rest.
      cotangent = {name: jnp.float32(name == group) for name in values}
      grads[group] = pull_back(cotangent)[0][group]
    metrics = {**metrics, **{f"loss/{group}": value for group, value in values.items()}}
    return grads, metrics, model_state

  def accumulate(params, frozen, model_state, batch, rng, step):
    micro_batches = jax.tree.map(
      lambda x: jnp.moveaxis(x.reshape(-1, accumulation, *x.shape[1:]), 1, 0), batch
    )

    def one(carry, inputs):
      sums, model_state = carry
      index, micro_batch = inputs
      grads, metrics, model_state = gradients(
        params, frozen, model_state, micro_batch, jax.random.fold_in(rng, index), step
      )
      return (jax.tree.map(jnp.add, sums, (grads, metrics)), model_state), None

    first = jax.tree.map(lambda x: x[0], micro_batches)
    shapes = jax.eval_shape(gradients, params, frozen, model_state, first, rng, step)[:2]
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    inputs = (jnp.arange(accumulation), micro_batches)
    (sums, model_state), _ = jax.lax.scan(one, (zeros, model_state), inputs)
    grads, metrics = jax.tree.map(lambda x: x / accumulation, sums)
    return grads, metrics, model_state

  def update(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
    keys, model_rng = step_keys(seed, state.step, jax.tree.leaves(batch)[0].shape[0])
    batch = {**batch, "key": keys}
    frozen = with_averages(objective, frozen, state.ema)
    compute = gradients if accumulation == 1 else accumulate
    grads, metrics, model_state = compute(
      state.params, frozen, state.model_state, batch, model_rng, state.step
    )
    old = state.params
    if parts:
      grads, old = (jax.lax.with_sharding_constraint(tree, parts[0]) for tree in (grads, old))
    params, opt_state, averages = {}, {}, {}
    for group, transform in transforms.items():
      updates, opt_state[group] = transform.update(grads[group], state.opt_state[group], old[group])
      params[group] = optax.apply_updates(old[group], updates)
      metrics[f"norm/{group}_gradient"] = optax.tree.norm(grads[group])
      metrics[f"norm/{group}_parameters"] = optax.tree.norm(params[group])
      metrics[f"norm/{group}_update"] = optax.tree.norm(updates)
      metrics[f"learning_rate/{group}"] = schedules[group](state.step)
      if parts:
        params[group] = jax.lax.with_sharding_constraint(params[group], parts[1][group])
      if group in ema:
        # Early averages would be dominated by the initialisation: let their horizon grow with the step.
        given = ema[group]
        decay = given(state.step) if callable(given) else given
        decay = jnp.minimum(decay, (1.0 + state.step) / (10.0 + state.step))
        averages[group] = optax.incremental_update(params[group], state.ema[group], 1.0 - decay)
    state = TrainState(state.step + 1, params, opt_state, averages, model_state)
    return state, metrics

  return update
