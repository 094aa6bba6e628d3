"""The tool that prepares data sets, with the digits, which need no network."""

import urllib.error
import urllib.request

import pytest

from maskgen.data.sources import open_source
from maskgen.data.sources.digits import Digits
from maskgen.errors import UserError
from maskgen.tools.prepare_data import main


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
  def refuse(*args, **kwargs):
    raise urllib.error.URLError("no route to host")

  monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_prepares_once(tmp_path, monkeypatch, capsys, file_format):
  main(["--name=digits", f"--format={file_format}", f"--data_dir={tmp_path}"])
  out = capsys.readouterr().out
  assert "prepared digits in " in out
  for line in (
    f"folder: {tmp_path}/digits/1.0.0 ({file_format})",
    "train: 1,437 records",
    "test: 360 records",
    "config: source='tfds:digits'",
    f"before a run: export TFDS_DATA_DIR={tmp_path}",
  ):
    assert line in out.splitlines()

  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  assert open_source("tfds:digits", "train").size == 1437
  monkeypatch.setattr(Digits, "download_and_prepare", None)
  main(["--name=digits"])  # the other format, perhaps
  out = capsys.readouterr().out
  assert out.startswith("digits is already prepared") and f"({file_format})" in out
  assert "export" not in out  # it is where a run looks for it


def test_interrupted_preparation_is_restarted(tmp_path, monkeypatch, capsys):
  (tmp_path / "digits" / "incomplete.AB12CD_1.0.0").mkdir(parents=True)
  generate = Digits._generate_examples

  def stop(self, *args):
    yield next(generate(self, *args))
    raise KeyboardInterrupt

  monkeypatch.setattr(Digits, "_generate_examples", stop)
  with pytest.raises(KeyboardInterrupt):
    main(["--name=digits", f"--data_dir={tmp_path}"])
  monkeypatch.setattr(Digits, "_generate_examples", generate)
  main(["--name=digits", f"--data_dir={tmp_path}"])
  assert "train: 1,437 records" in capsys.readouterr().out


def test_incomplete_folder_is_not_taken_for_the_data(tmp_path):
  (tmp_path / "digits" / "1.0.0").mkdir(parents=True)
  with pytest.raises(UserError, match=r"digits/1\.0\.0' exists but is incomplete: remove it"):
    main(["--name=digits", f"--data_dir={tmp_path}"])


def test_failure_is_one_sentence(tmp_path, monkeypatch):
  def fail(self, *args):
    raise RuntimeError("the archive\nis empty")
    yield

  monkeypatch.setattr(Digits, "_generate_examples", fail)
  with pytest.raises(UserError, match=r"'digits' cannot be prepared in '.*': .*the archive is empty"):
    main(["--name=digits", f"--data_dir={tmp_path}"])


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--name=cifar11"], "'cifar11' is unknown and not prepared in '.*'; did you mean 'cifar10"),
    (["--name=coco/2013"], "'coco' has no config '2013'; did you mean '201"),
    (
      ["--name=imagenet2012"],
      "ILSVRC2012_img_train.tar and .*_val.tar in '.*/downloads/manual': put them there",
    ),
    (
      ["--name=chexpert"],
      "'chexpert' needs files in '.*/downloads/manual' that must be downloaded manually: You must ",
    ),
    (["--name=cifar10"], "cannot be downloaded from https://.* .*no route to host.*: check the network"),
    (["--name=digits", "--format=csv"], "invalid choice: 'csv'"),
    ([], "--name"),
  ],
)
def test_what_cannot_be_prepared(tmp_path, arguments, message):
  with pytest.raises(UserError, match=message):
    main([*arguments, f"--data_dir={tmp_path}"])
  assert not list(tmp_path.iterdir())  # nothing was begun


def test_one_archive_of_two_is_not_enough(tmp_path):
  (tmp_path / "downloads" / "manual").mkdir(parents=True)
  (tmp_path / "downloads" / "manual" / "ILSVRC2012_img_train.tar").touch()
  with pytest.raises(UserError, match=r"'imagenet2012' needs ILSVRC2012_img_val\.tar in"):
    main(["--name=imagenet2012", f"--data_dir={tmp_path}"])
