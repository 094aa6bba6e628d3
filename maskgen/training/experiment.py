"""Builds everything a run needs from its config, and checks it before training starts."""

import dataclasses
import functools
import json
import logging
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from maskgen import batch as batch_lib
from maskgen import config as config_lib
from maskgen import evaluators, files, objectives, processes, sharding, storage, tree
from maskgen.config import fields
from maskgen.errors import UserError, nearest
from maskgen.importers.published import PUBLISHED
from maskgen.training import best, optim, writers
from maskgen.training.state import TrainState
from maskgen.training.step import Update, gradient_dtypes, make_update, with_averages
from maskgen.training.warm_start import WarmStart

log = logging.getLogger("maskgen")

# Larger batches do not speed up evaluation.
EVAL_BATCH_SIZE = 256
DATA = "data.json"


class Experiment:
  """A run built from its config: data, objective, mesh, optimizers, shardings, compiled functions.

  Building allocates and loads no parameters: shapes come from `jax.eval_shape`.

  Attributes:
    config: the typed config.
    mesh: the device mesh.
    data: the input pipeline.
    objective: what is trained.
    total_steps: the length of the run.
    eval_batch_size: examples per batch of evaluations.
    targets: trees of shapes with shardings for `state`, `frozen` and `pretrained`.
    update: compiled (state, frozen, batch) -> (state, metrics); the state is donated.
    schedules: the learning rate of each parameter group, a function of the step.
    first_state: compiled (pretrained, taken) -> (state, frozen), see `init`.
    predict: compiled prediction functions by name.
    evaluators: (interval in steps, evaluator) of each evaluation.
    warm_start: the parameters of `config.init_from`, once `check_pretrained` has compared them; else None.
  """

  def __init__(
    self, config: Mapping[str, Any], devices: Sequence[jax.Device] | None = None, data: Any = None
  ):
    """Builds everything from a plain config.

    Args:
      config: of one stage.
      devices: to build for, by default all; they need not exist on this machine if nothing runs.
      data: replaces the `pipeline.Data` that `config.data` describes, or None.

    Raises:
      UserError: if anything in the config is wrong or inconsistent.
    """
    self.config = cfg = config_lib.build_dataclass(config_lib.RunConfig, config, "config")
    self.mesh = sharding.make_mesh(cfg.mesh, devices)
    sharding.check_batch(cfg.batch_size, cfg.accumulation, self.mesh)
    self.objective = objectives.build(cfg.objective)
    pretrained = fields.current_pretrained(type(self.objective), cfg.pretrained, "config.pretrained")
    self.config = cfg = dataclasses.replace(cfg, pretrained=pretrained)
    self.data = data or _open_data(cfg)
    self._check_data()
    ways = sharding.batch_ways(self.mesh)
    # A micro-batch fits in memory when training, so it does when only predicting.
    self.eval_batch_size = max(min(cfg.batch_size // cfg.accumulation, EVAL_BATCH_SIZE) // ways, 1) * ways
    self.total_steps = config_lib.duration(cfg, "total", cfg.batch_size, self.data.num_train)
    self._build_state()
    self.warm_start: WarmStart | None = None
    self.predict = objectives.compile_predict_fns(self.objective, self.mesh)
    self._build_evaluators()

  def _check_data(self) -> None:
    """Checks that the data provides what the objective reads."""
    cfg, spec, name = self.config, self.objective.batch_spec(), self.config.objective["name"]
    batch_lib.check_data(spec, self.data, name, cfg.data["source"])
    if spec.whole_batch and cfg.accumulation > 1:
      raise UserError(
        f"config.accumulation={cfg.accumulation} hides examples from each other, and objective '{name}' "
        "compares all of a batch: set it to 1, and save memory by objective.remat or more devices"
      )

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
    optim.check_groups(groups, cfg.optimizer, cfg.ema, getattr(self.objective, "averages", ()))
    self.schedules, self._transforms = {}, {}
    for group, section in cfg.optimizer.items():
      optimizer = config_lib.build_dataclass(optim.Optimizer, section, f"config.optimizer.{group}")
      try:
        schedule = optimizer.make_schedule(self.total_steps, cfg.batch_size, self.data.num_train)
      except UserError as error:
        raise UserError(f"config.optimizer.{group}.{error}") from None
      self.schedules[group] = schedule
      encoder = getattr(self.objective, "image_encoder", None)
      layers = encoder.layers(group) if encoder else ()
      self._transforms[group] = optimizer.make_transform(schedule, groups[group], layers)
    state, frozen = jax.eval_shape(self._init, pretrained)
    shapes = {"state": state, "frozen": frozen}
    shardings = sharding.shard(shapes, cfg.sharding, self.mesh)
    over_data = cfg.mesh.optimizer_over_data
    spread = sharding.shard(shapes, cfg.sharding, self.mesh, over_data)["state"]
    self._parts = (spread.params, shardings["state"].params) if over_data else None
    shardings["state"] = shardings["state"].replace(opt_state=spread.opt_state)
    everywhere = sharding.replicated(self.mesh)
    self.targets = {
      "state": sharding.attach(state, shardings["state"]),
      "frozen": sharding.attach(frozen, shardings["frozen"]),
      "pretrained": sharding.attach(pretrained, jax.tree.map(lambda _: everywhere, pretrained)),
    }
    self.first_state = jax.jit(self._init, out_shardings=(shardings["state"], shardings["frozen"]))
    self.update = jax.jit(
      self.make_update(self.objective),
      in_shardings=(shardings["state"], shardings["frozen"], sharding.batch_sharding(self.mesh)),
      out_shardings=(shardings["state"], everywhere),
      donate_argnums=0,
    )

  def make_update(self, objective: objectives.Objective, accumulation: int | None = None) -> Update:
    """The step, not compiled, for this objective or one with the same parameters.

    Args:
      objective: what is trained.
      accumulation: number of micro-batches, by default the config's.
    """
    cfg = self.config
    update = make_update(
      objective,
      self._transforms,
      self.schedules,
      seed=cfg.seed,
      ema={group: optim.average_decay(decay, self.total_steps) for group, decay in cfg.ema.items()},
      accumulation=accumulation or cfg.accumulation,
      parts=self._parts,
    )
    return sharding.on_mesh(update, self.mesh)

  def _init(
    self, pretrained: Any, taken: Mapping[str, jax.Array] | None = None, seed: int | None = None
  ) -> tuple[TrainState, Any]:
    """Makes the first state; `taken` replaces fresh parameters by path name. Pure."""
    rng = jax.random.key(self.config.seed if seed is None else seed)
    parts = self.objective.init(rng, pretrained)
    params = tree.replace(parts["params"], taken or {})
    state = TrainState(
      step=jnp.int32(0),
      params=params,
      opt_state={group: tx.init(params[group]) for group, tx in self._transforms.items()},
      ema={group: jax.tree.map(jnp.copy, params[group]) for group in self.config.ema},
      # With the types that a step returns: of weakly typed arrays, a second step would be compiled.
      model_state=jax.tree.map(lambda x: x.astype(x.dtype), parts["extra"]),
    )
    return state, parts["frozen"]

  def init(self, workdir: epath.Path) -> tuple[TrainState, Any]:
    """Makes (state, frozen) from fresh and pretrained parameters, directly on their devices."""
    self.check_pretrained(workdir)
    taken = self.warm_start.take() if self.warm_start else {}
    state, frozen = self.first_state(self._load_pretrained(workdir), taken)
    if self.warm_start:
      log.info("%s: parameters taken from the source\n%s", workdir.name, self.warm_start.report(frozen))
    return state, frozen

  def check_pretrained(self, workdir: epath.Path, pending: Collection[epath.Path] = ()) -> None:
    """Checks that the models of `config.resume`, `init_from` and `pretrained` exist and fit.

    Args:
      workdir: of the run.
      pending: workdirs of earlier stages, which may not be trained yet.

    Raises:
      UserError: if one does not.
    """
    if self.config.resume:
      storage.open_to_read(epath.Path(self.config.resume).expanduser()).close()
    else:
      self._check_init_from(workdir, pending)
    for name, given in self.config.pretrained.items():
      path = storage.resolve(given, workdir)
      if path in pending:
        continue
      _check_fetched(f"config.pretrained.{name}", given, path)
      try:
        self.objective.check_pretrained(name, storage.load_config(path))
      except UserError as error:
        raise UserError(f"config.pretrained.{name}={given}: {error}") from None
    if self.data.codes is not None and not set(pending) & set(self._pretrained(workdir).values()):
      self._check_codes(workdir)

  def _check_codes(self, workdir: epath.Path) -> None:
    """Checks that cached codes come from the tokenizer that training starts with."""
    cfg = self.config
    assert self.data.codes is not None

    def begin(pretrained: Any) -> Any:
      return self.objective.tokenizer_params(self.objective.init(jax.random.key(0), pretrained))

    # Compiled, this only passes on loaded parameters; the fresh ones are dead code.
    tokenizer = jax.jit(begin)(self._load_pretrained(workdir))
    if objectives.tokenizer_fingerprint(tokenizer) != self.data.codes.tokenizer:
      given = " and ".join(f"config.pretrained.{name}={path}" for name, path in cfg.pretrained.items())
      raise UserError(
        f"config.data.source={cfg.data['source']} was made with another tokenizer than that of {given}: give "
        "that tokenizer, or recreate the cache with maskgen.tools.tokenize"
      )

  def _pretrained(self, workdir: epath.Path) -> dict[str, epath.Path]:
    return {name: storage.resolve(given, workdir) for name, given in self.config.pretrained.items()}

  def _load_pretrained(self, workdir: epath.Path) -> dict[str, Any]:
    paths, targets = self._pretrained(workdir), self.targets["pretrained"]
    return {name: storage.load_variables(paths[name], target) for name, target in targets.items()}

  def _check_init_from(self, workdir: epath.Path, pending: Collection[epath.Path]) -> None:
    given, fresh = self.config.init_from, self.config.init_fresh
    if given is None:
      if fresh:
        raise UserError(f"config.init_fresh='{fresh}' is given without config.init_from: give both, or none")
      return
    path = storage.resolve(given, workdir)
    if path in pending:
      return
    _check_fetched("config.init_from", given, path)
    try:
      self.warm_start = WarmStart(path, self.objective, self.targets["state"].params, fresh)
    except UserError as error:
      raise UserError(f"config.init_from={given}: {error}") from None

  def check_data(self, workdir: epath.Path) -> None:
    """Checks that the records are those with which the run in this workdir began; warns of another decoder.

    Raises:
      UserError: if they are not.
    """
    if not (workdir / DATA).exists():
      return
    remedy = "delete it to continue with the present data"
    before = files.read_json(workdir / DATA, remedy)
    for use, now in self.data.fingerprints.items():
      if before.get(use, now) != now:
        if not isinstance(before[use], dict) or not {"source", "size"} <= before[use].keys():
          raise files.damaged(workdir / DATA, f"of {use} it says {before[use]!r}", remedy)
        if before[use] == {key: value for key, value in now.items() if key != "jpeg_decoding"}:
          log.warning(
            "this run began with an older version, which decoded the JPEGs of %s about 1 of 255 levels "
            "differently: start a new workdir if all of its steps must see the same pixels",
            now["source"],
          )
          continue
        change = (
          f"{before[use]['source']} had {before[use]['size']} records, {now['source']} has {now['size']}"
        )
        if all(before[use][key] == now[key] for key in ("source", "size")):
          change = f"{now['source']} has other files, labels or captions, or its classes are in another order"
        raise UserError(
          f"the data for {use} has changed since this run began ({change}): restore it, or start a new "
          f"workdir, or delete {workdir / DATA} to continue with the present data"
        )

  def write_data(self, workdir: epath.Path) -> None:
    """Records in `data.json` what the records are.

    Raises:
      UserError: in all processes, if they see different records.
    """
    if not processes.all_equal(json.dumps(self.data.fingerprints)):
      raise UserError(
        f"the processes of this run see different data in {self.config.data['source']}: give all the same"
      )
    if jax.process_index() == 0:
      files.replace(workdir / DATA, json.dumps(self.data.fingerprints, indent=2))

  def train_batches(self, step: int) -> Generator[Mapping[str, jax.Array]]:
    """The training batches on the devices, starting at a step."""
    from maskgen.data import pipeline

    return pipeline.to_device(self.data.train_batches(step), sharding.batch_sharding(self.mesh))

  def compile(self, batch: Any = None) -> Any:
    """Compiles the training step ahead of time, by default for batches of its data; nothing is allocated."""
    target = self.targets
    return self.update.lower(target["state"], target["frozen"], batch or self.data.spec).compile()

  def coverage(self) -> str:
    """A table of how `config.sharding` shards the state and the frozen parts."""
    targets = {name: self.targets[name] for name in ("state", "frozen")}
    return sharding.coverage(targets, self.config.sharding)

  def check_precision(self) -> None:
    """Checks that no gradient is computed in float16, where small ones become 0: losses are not scaled.

    Raises:
      UserError: naming the fields that say so.
    """
    walked = fields.walk(type(self.objective), self.config.objective)
    dtypes = {path: value for path, field, value in walked if field.metadata.get("precision")}
    half = [".".join(path) for path, value in dtypes.items() if value == "float16"]
    state, frozen = self.targets["state"], self.targets["frozen"]
    frozen = with_averages(self.objective, frozen, state.ema)
    parts = (state.params, frozen, state.model_state, self.data.spec)
    if half and "float16" in gradient_dtypes(self.objective, *parts):
      raise UserError(
        f"config.objective.{' and '.join(half)} computes gradients in float16, where small ones become 0: "
        "set it to bfloat16 or float32"
      )

  def call_shapes(self, name: str, batch: Any, **options: Any) -> Any:
    """The shapes that a prediction function returns for a batch of shapes; see `evaluators.Call`."""
    variables = self.targets["state"].variables(self.targets["frozen"])
    fn = functools.partial(self.predict[name], **options)
    return jax.eval_shape(fn, variables, batch, jax.random.key(0))

  def check_predict_fns(self) -> None:
    """Traces the prediction functions that the evaluations call, with their batches and options."""
    for name, (_, evaluator) in self.evaluators.items():
      try:
        evaluators.trace(evaluator, self.call_shapes, self.data.eval_spec(self.eval_batch_size))
      except UserError as error:
        raise UserError(f"config.evals.{name}: {error}") from error

  def _build_evaluators(self) -> None:
    cfg, data, fresh = self.config, self.data, jax.jit(self._fresh_variables)
    context = evaluators.Context(
      self.objective, self.predict, self._eval_batches, fresh, data.class_names, data.lacks, data.num_train
    )
    self.evaluators: dict[str, tuple[int, evaluators.Evaluator]] = {}
    for name, section in cfg.evals.items():
      if section.get("every_steps", 0) < 1:
        key = f"config.evals.{name}.every_steps"
        found = f"is {section['every_steps']}" if "every_steps" in section else "is missing"
        raise UserError(f"{key} {found}: set it to 1 or more")
      if not isinstance(first := section.get("first_step", 0), int) or first < 0:
        raise UserError(f"config.evals.{name}.first_step is {first!r}: give a step, or 0 for none")
      if name in ("train", "timing"):
        raise UserError(f"config.evals.{name}: this name is taken by the metrics of training, give another")
      evaluator = evaluators.build(name, section, context)
      self.evaluators[name] = (section["every_steps"], evaluator)
    best.check(cfg)
    writers.check(cfg.writers)

  def _eval_batches(self, split: str) -> Iterator[Mapping[str, jax.Array]]:
    batches = self.data.eval_batches(split, self.eval_batch_size)
    from maskgen.data import pipeline

    return pipeline.to_device(batches, sharding.batch_sharding(self.mesh))

  def _fresh_variables(self, seed: int, frozen: Any) -> dict[str, Any]:
    """Untrained parameters with given frozen parts, for baselines. Pure."""
    shapes = self.objective.pretrained_shapes()
    pretrained = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return self._init(pretrained, seed=seed)[0].variables(frozen)


def _check_fetched(key: str, given: str, path: epath.Path) -> None:
  """Raises an error that says where to fetch published weights that do not exist on this machine."""
  if given in PUBLISHED and not path.exists():
    found = PUBLISHED[given]
    raise UserError(
      f"{key}={given} is not on this machine: fetch {found.address} ({found.license}), convert it by "
      f"maskgen.tools.convert --format={found.format}, and give the folder that it writes"
    )


def _open_data(cfg: config_lib.RunConfig) -> Any:
  from maskgen.data import pipeline  # and TensorFlow, which not every experiment needs

  return config_lib.build_dataclass(
    pipeline.Data,
    cfg.data,
    "config.data",
    batch_size=cfg.batch_size,
    seed=cfg.seed,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
