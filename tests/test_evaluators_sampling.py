"""Sampling options in evaluations: checked when a run starts, with all calls traced beforehand."""

import functools
import logging

import jax
import pytest
import tiny
from etils import epath

from maskgen import config as config_lib
from maskgen import evaluators, objectives
from maskgen.errors import UserError
from maskgen.training.experiment import Experiment

trained = tiny.trained


@functools.cache
def objective(config, stage=None):
  loaded = config_lib.to_dict(config_lib.load(config))
  return objectives.build((loaded[stage] if stage else loaded)["objective"])


def diffusion():
  return objective("diffusion_digits.py:debug")


def mage_text():
  return objective("mage_text_cond.py:debug", "mage_text")


def mage():
  return objective(tiny.FILE, "mage")


def build(of, **section):
  context = evaluators.Context(of, of.predict_fns(), lambda split: (), lambda seed, frozen: None, None)
  return evaluators.build("it", section, context)


@pytest.mark.parametrize(
  ("of", "kind", "sampling", "message"),
  [
    (diffusion, "generation", dict(temperature=2.0), "no option 'temperature'"),
    (diffusion, "samples", dict(guidance=-1.0), "guidance is -1.0"),
    (diffusion, "captioned_digits", dict(steps=10_000), "10000 steps of sampling"),
    (mage_text, "captioned_digits", dict(sampler="ddim"), "no option 'sampler'"),
    (mage_text, "captioned_digits", dict(schedul="cosine"), "did you mean 'schedule'"),
    (mage, "generation", dict(guidance=2.0), "guidance is 2.0: guidance needs a model with classes"),
    (mage, "samples", dict(steps=4, reuse=3), "reuse is 3: it must divide the number of steps, 4"),
    (mage_text, "generation", dict(guidance=2.0), "set captions=True"),
    (mage_text, "generation", "steps", "give options by name"),
  ],
)
def test_options_of_other_objectives_are_refused_at_once(of, kind, sampling, message):
  with pytest.raises(UserError, match=message) as error:
    build(of(), type=kind, sampling=sampling)
  assert str(error.value).startswith("config.evals.it: ") and "\n" not in str(error.value)


def test_options_of_the_own_objective_are_taken():
  assert build(mage(), type="generation", sampling=dict(temperature=2.0)).sampling == dict(temperature=2.0)
  assert build(diffusion(), type="captioned_digits", sampling=dict(sampler="ddim"))
  guided = dict(sampling=dict(guidance=2.0), captions=True)
  assert build(mage_text(), type="generation", **guided) and build(diffusion(), type="generation", **guided)
  with pytest.raises(UserError, match="captions is True, but the objective takes no captions"):
    build(mage(), type="generation", captions=True)


def test_keys_that_evaluations_had_before_are_read_with_a_warning(caplog):
  section = dict(type="generation", temperature=2.0, steps=4, schedule=None, sampling=dict(steps=5))
  with caplog.at_level(logging.WARNING, "maskgen"):
    evaluator = build(mage(), **section)
  assert evaluator.sampling == dict(temperature=2.0, steps=5)
  (record,) = caplog.records
  assert (
    "config.evals.it: steps, schedule, temperature now belong in config.evals.it.sampling"
    in record.getMessage()
  )


def test_the_command_line_sets_options_and_adds_evaluations():
  overrides = {
    "mage.evals.samples.sampling.temperature": "2.5",
    "mage.evals.more.type": "loss",
    "mage.evals.more.every_steps": "5",
  }
  evals = config_lib.to_dict(config_lib.load(tiny.FILE, overrides))["mage"]["evals"]
  assert evals["samples"]["sampling"] == dict(temperature=2.5)
  assert evals["more"] == dict(type="loss", every_steps=5)


def test_check_mode_traces_what_evaluations_call(trained):
  evals = dict(
    generation=dict(type="generation", num_images=4, sampling=dict(steps=2)),
    samples=dict(type="samples", num_generated=4, sampling=dict(steps=1)),
    reconstruction=dict(type="reconstruction"),
    probe=dict(type="probe", num_images=64, draws=1, shots=(1,), random_encoders=1),
    validation=dict(type="loss"),
  )
  evals = {name: {"every_steps": 1, **section} for name, section in evals.items()}
  pretrained = {"pretrained__tokenizer": str(trained / "tokenizer")}
  experiment = Experiment({**tiny.stage("mage", **pretrained), "evals": evals})
  calls = tiny.record_calls(experiment.predict)
  experiment.check_predict_fns()
  traced = set(calls)
  calls.clear()
  state, frozen = experiment.init(epath.Path("unused"))
  for _, evaluator in experiment.evaluators.values():
    evaluator.run(state.variables(frozen), jax.random.key(0))
  assert traced == calls


def test_check_mode_names_the_evaluation_that_cannot_be_traced(trained):
  evals = {"validation": dict(type="loss", every_steps=1)}
  pretrained = {"pretrained__tokenizer": str(trained / "tokenizer")}
  experiment = Experiment({**tiny.stage("mage", **pretrained), "evals": evals})

  def refuse(variables, batch, rng):
    raise UserError("no")

  experiment.predict["loss"] = refuse
  with pytest.raises(UserError, match=r"config\.evals\.validation: no"):
    experiment.check_predict_fns()
