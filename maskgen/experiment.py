"""Everything a run is made of, built from its config and checked before anything is trained."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from maskgen import config as config_lib
from maskgen import evaluators, objectives, optim, sharding
from maskgen.data import pipeline
from maskgen.errors import UserError, nearest
from maskgen.state import TrainState
from maskgen.step import make_update


class Experiment:
  """A config brought to life: data, objective, mesh, optimizers, shardings, compiled functions.

  Nothing is trained or loaded here, and no parameter exists yet: shapes come from `jax.eval_shape`.

  Attributes:
    config: the typed config.
    mesh: the device mesh.
    data: the input pipeline.
    objective: what is trained.
    total_steps: the length of the run.
    targets: trees of shapes with shardings for `state`, `frozen` and `pretrained`.
    update: compiled (state, frozen, batch) -> (state, metrics); the state is donated.
    predict: compiled prediction functions by name.
    evaluators: for each evaluation its interval in steps and its evaluator.
  """

  def __init__(self, config: Mapping[str, Any]):
    """Builds everything from a plain config.

    Raises:
      UserError: for anything in the config that is wrong or does not fit together.
    """
    self.config = cfg = config_lib.build_dataclass(config_lib.RunConfig, config, "config")
    self.mesh = sharding.make_mesh(cfg.mesh)
    sharding.check_batch(cfg.batch_size, cfg.accumulation, self.mesh)
    self.objective = objectives.build(cfg.objective)
    self.data = config_lib.build_dataclass(
      pipeline.Data, cfg.data, "config.data", batch_size=cfg.batch_size, seed=cfg.seed
    )
    if self.data.image_shape != self.objective.image_shape:
      raise UserError(
        f"config.data gives images of shape {self.data.image_shape}, config.objective takes "
        f"{self.objective.image_shape}: change config.data.preprocess or config.objective.image_size"
      )
    self.total_steps = config_lib.duration(cfg, "total", cfg.batch_size, self.data.num_train)
    self._build_state()
    self.predict = objectives.compile_predict_fns(self.objective)
    self._build_evaluators()

  def _build_state(self) -> None:
    cfg = self.config
    pretrained = self.objective.pretrained_shapes()
    for name in cfg.pretrained:
      if name not in pretrained:
        raise UserError(f"config.pretrained has no key '{name}'{nearest(name, pretrained)}")
    for name in pretrained:
      if name not in cfg.pretrained:
        raise UserError(f"config.pretrained.{name} is missing: give the path of a trained model")
    parts = jax.eval_shape(self.objective.init, jax.random.key(0), pretrained)
    groups = parts["params"]
    for where, section in (("optimizer", cfg.optimizer), ("ema", cfg.ema)):
      for group in section:
        if group not in groups:
          raise UserError(f"config.{where} has no group '{group}'{nearest(group, groups)}")
    for group in groups:
      if group not in cfg.optimizer:
        raise UserError(f"config.optimizer.{group} is missing: every parameter group needs one")
    schedules, self._transforms = {}, {}
    for group, section in cfg.optimizer.items():
      optimizer = config_lib.build_dataclass(optim.Optimizer, section, f"config.optimizer.{group}")
      schedules[group] = optimizer.make_schedule(self.total_steps, cfg.batch_size, self.data.num_train)
      self._transforms[group] = optimizer.make_transform(schedules[group], groups[group])
    state, frozen = jax.eval_shape(self._init, pretrained)
    shardings = sharding.shard({"state": state, "frozen": frozen}, cfg.sharding, self.mesh)
    everywhere = sharding.replicated(self.mesh)
    self.targets = {
      "state": _attach(state, shardings["state"]),
      "frozen": _attach(frozen, shardings["frozen"]),
      "pretrained": _attach(pretrained, jax.tree.map(lambda _: everywhere, pretrained)),
    }
    update = make_update(
      self.objective,
      self._transforms,
      schedules,
      seed=cfg.seed,
      ema=cfg.ema,
      accumulation=cfg.accumulation,
    )
    self._shardings = shardings
    self.update = jax.jit(
      update,
      in_shardings=(shardings["state"], shardings["frozen"], sharding.batch_sharding(self.mesh)),
      out_shardings=(shardings["state"], everywhere),
      donate_argnums=0,
    )

  def _init(self, pretrained: Any, seed: int | None = None) -> tuple[TrainState, Any]:
    """Makes the first state; pure."""
    rng = jax.random.key(self.config.seed if seed is None else seed)
    parts = self.objective.init(rng, pretrained)
    params = parts["params"]
    state = TrainState(
      step=jnp.int32(0),
      params=params,
      opt_state={group: tx.init(params[group]) for group, tx in self._transforms.items()},
      ema={group: jax.tree.map(jnp.copy, params[group]) for group in self.config.ema},
      extra=parts["extra"],
    )
    return state, parts["frozen"]

  def init(self, pretrained: Any) -> tuple[TrainState, Any]:
    """Makes (state, frozen), every parameter born where it belongs."""
    shardings = (self._shardings["state"], self._shardings["frozen"])
    return jax.jit(self._init, out_shardings=shardings)(pretrained)

  def train_batches(self, step: int) -> Iterator[Mapping[str, jax.Array]]:
    """The training batches from a step on, on the devices."""
    return pipeline.to_device(self.data.train_batches(step), sharding.batch_sharding(self.mesh))

  def compile(self) -> Any:
    """Compiles the training step ahead of time; nothing is allocated."""
    target = self.targets
    return self.update.lower(target["state"], target["frozen"], self.data.spec).compile()

  def _build_evaluators(self) -> None:
    context = evaluators.Context(
      predict=self.predict,
      batches=self._eval_batches,
      fresh_variables=self._fresh_variables,
      codebook_size=self.objective.codebook_size,
      class_names=self.data.class_names,
    )
    self.evaluators: dict[str, tuple[int, evaluators.Evaluator]] = {}
    for name, section in self.config.evals.items():
      if "every_steps" not in section:
        raise UserError(f"config.evals.{name} needs the key 'every_steps'")
      evaluator = evaluators.build(name, section, context)
      self.evaluators[name] = (section["every_steps"], evaluator)

  def _eval_batches(self, split: str) -> Iterator[Mapping[str, jax.Array]]:
    batches = self.data.eval_batches(split, self.config.batch_size)
    return pipeline.to_device(batches, sharding.batch_sharding(self.mesh))

  def _fresh_variables(self, seed: int, frozen: Any) -> dict[str, Any]:
    """Untrained parameters beside given frozen parts, for baselines."""

    def init(frozen: Any) -> dict[str, Any]:
      shapes = self.objective.pretrained_shapes()
      pretrained = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
      return self._init(pretrained, seed)[0].variables(frozen)

    return jax.jit(init)(frozen)


def _attach(shapes: Any, shardings: Any) -> Any:
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    shapes,
    shardings,
  )
