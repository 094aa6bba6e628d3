"""The commands that help to find one's way: maskgen, configs, config, doctor."""

import json
import os
import subprocess
import sys

import jax
import pytest

import maskgen.__main__ as commands
from maskgen import config as config_lib
from maskgen.errors import UserError
from maskgen.tools import config, configs, doctor
from maskgen.training import cpu


def test_help_lists_every_command(capsys):
  commands.main(["--help"])
  lines = capsys.readouterr().out.splitlines()
  for name in ("train", "generate", "edit", "demo", "report", "doctor", "configs", "config"):
    assert [line for line in lines if line.startswith(f"  {name} ")], name
  assert not [line for line in lines if "python -m" in line or "sampling_flags" in line]


def test_a_command_runs_as_its_module_does(capsys, monkeypatch):
  monkeypatch.setattr(sys, "argv", ["maskgen", "configs"])
  monkeypatch.delitem(sys.modules, "maskgen.tools.configs")
  commands.main(["configs"])
  assert "quickstart.py" in capsys.readouterr().out
  with pytest.raises(SystemExit):
    commands.main(["configs", "--help"])
  assert capsys.readouterr().out.startswith("usage: maskgen configs ")


def test_an_unknown_command():
  with pytest.raises(UserError, match=r"command 'generat' does not exist; did you mean 'generate'"):
    commands.main(["generat"])


def test_a_reader_that_leaves_is_no_error():
  reader, writer = os.pipe()
  os.close(reader)
  command = [sys.executable, "-m", "maskgen", "configs"]
  done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
  os.close(writer)
  assert (done.returncode, done.stderr) == (141, "")


def test_configs_are_listed_with_their_arguments(capsys):
  configs.main([])
  out = capsys.readouterr().out
  for file in config_lib.shipped():
    first, arguments = configs.describe(file)
    assert f"{file.name}\n  {first}\n" in out and first.endswith(".")
    assert {":tiny", ":debug"} <= {*arguments}
  arguments = configs.describe(config_lib.find_file("fewshot_mage.py"))[1]
  assert arguments[:3] == [":shots", ":share", ":subset_seed"] and arguments[-2:] == [":tiny", ":debug"]


def test_a_config_is_printed_with_what_differs(capsys):
  config.main(["quickstart.py:tiny", "--config.mage.batch_size=7"])
  out, err = capsys.readouterr()
  assert json.loads(out)["mage"]["batch_size"] == 7
  assert "\n  mage.batch_size: 64 -> 7\n" in err and "\n  tokenizer.total_steps: 600 -> 60\n" in err
  config.main(["quickstart.py"])
  assert not capsys.readouterr().err


def test_doctor(capsys, monkeypatch):
  monkeypatch.setattr(doctor, "_LEAST_DISK", 0)
  doctor.main([])
  out = capsys.readouterr().out
  assert "JAX runs on" in out and out.endswith("everything works\n")


def test_doctor_names_what_is_wrong(capsys, monkeypatch):
  monkeypatch.setattr(
    doctor, "version", lambda name: {"jaxlib": "0.9", "jax-cuda12-plugin": "0.8"}.get(name, "")
  )
  monkeypatch.setattr(doctor, "_LEAST_DISK", 0)
  with pytest.raises(UserError, match="2 of these checks failed"):
    doctor.main([])
  out = capsys.readouterr().out
  for remedy in (
    "pip install -U jax-cuda12-plugin==0.9",
    "pip install tensorflow-cpu",
    "pip install -e . jax ",
  ):
    assert remedy in out


def test_an_accelerator_that_jax_does_not_use(tmp_path, monkeypatch):
  monkeypatch.delenv("JAX_PLATFORMS", raising=False)
  monkeypatch.setattr(cpu, "_ACCELERATORS", (str(tmp_path / "*"),))
  assert not cpu.missing_accelerator("cpu")
  for device, extra in (("accel0", "tpu"), ("kfd", "rocm7-local"), ("nvidia0", "cuda12")):
    (tmp_path / device).touch()
    assert f"pip install 'jax[{extra}]=={jax.__version__}'" in cpu.missing_accelerator("cpu")
    (tmp_path / device).unlink()
  (tmp_path / "nvidia0").touch()
  assert not cpu.missing_accelerator("gpu")
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  assert not cpu.missing_accelerator("cpu")
