"""Evaluations state the memory that they need, and are refused before a run that does not have it."""

import dataclasses
import logging

import pytest
import tiny

from maskgen import main
from maskgen.errors import UserError
from maskgen.training import memory
from maskgen.training.experiment import Experiment


def test_an_evaluation_that_does_not_fit_into_memory_is_refused_before_the_run(tmp_path, monkeypatch, caplog):
  probe = dict(type="probe", every_steps=4, baselines=False)
  experiment = Experiment({**tiny.stage("mage"), "evals": {"probe": probe}})
  evaluator = experiment.evaluators["probe"][1]
  few = dataclasses.replace(evaluator, num_images=10)
  spec, sizes = experiment.data.eval_spec(8), {"train": 500, "eval": 100}
  many, some = (one.memory(experiment.call_shapes, spec, sizes) for one in (evaluator, few))
  assert many - some == 5 * 4 * 16 * (500 - 10)  # features are 16 wide
  monkeypatch.setattr(memory, "_STATED", 0)
  with caplog.at_level(logging.INFO, "maskgen"):
    memory.check(experiment, "mage")
  assert "mage: evaluations need memory: probe 0.0 GB" in caplog.text
  monkeypatch.setattr(memory, "available", lambda: 1000)
  with pytest.raises(UserError, match=r"config\.evals\.probe needs about .* available: lower its num_images"):
    memory.check(experiment, "mage")
  section = ["--config.mage.evals.probe.type=probe", "--config.mage.evals.probe.every_steps=4"]
  monkeypatch.setattr(memory, "available", lambda: 0)
  with pytest.raises(UserError, match=r"config\.mage\.evals\.probe needs about"):
    main.main([f"--config={tiny.FILE}", f"--workdir={tmp_path / 'new'}", *section])
  assert not (tmp_path / "new").exists()


def test_a_container_limits_the_available_memory(tmp_path, monkeypatch):
  free = memory.available()
  for name, text in {"max": "3000\n", "current": "1000\n", "stat": "anon 1\ninactive_file 500\n"}.items():
    (tmp_path / f"memory.{name}").write_text(text)
  monkeypatch.setattr(memory, "_CGROUP", tmp_path)
  assert memory.available() == 2500 and (free is None or free > 2500)
  (tmp_path / "memory.max").write_text("max\n")
  assert memory.available() != 2500
