"""The page for Spaces, without gradio."""

import importlib.util
import sys

import numpy as np
import pytest
from PIL import Image

import maskgen
from maskgen.errors import UserError


@pytest.fixture
def app(repository, monkeypatch):
  monkeypatch.setitem(sys.modules, "gradio", None)
  spec = importlib.util.spec_from_file_location("app", repository / "launch/spaces/app.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_buttons_generate_and_fill(app):
  model = maskgen.load("emoji")
  made = app.generate(model, 1.0, prompt="woman cook, dark skin tone", label=None, steps=2)
  assert [picture.size for picture in made] == [(256, 256)] * app.COUNT
  layer = np.zeros((256, 256, 4), np.uint8)
  layer[64:192, 128:] = 255
  drawing = {"background": made[0].convert("RGBA"), "layers": [Image.fromarray(layer)]}
  filled = np.stack(app.fill(model, drawing, 2.0, steps=2))
  hole, before = layer[..., 3] > 0, np.asarray(made[0])
  assert filled.dtype == np.uint8
  assert (filled[:, ~hole] == before[~hole]).all()
  assert (filled[:, hole] != before[hole]).any()
  assert (filled[0] != filled[1]).any()


@pytest.mark.parametrize(
  "drawing", [{"background": None}, {"background": Image.new("RGB", (8, 8)), "layers": []}]
)
def test_nothing_to_fill(app, drawing):
  with pytest.raises(UserError, match="picture"):
    app.fill(maskgen.load("digits"), drawing, 0)


def test_the_hub_finds_the_page(repository):
  folder = repository / "launch/spaces"
  _, front, _ = (folder / "README.md").read_text().split("---\n", 2)
  facts = dict(line.split(": ", 1) for line in front.splitlines())
  assert facts["sdk"] == "gradio" and (folder / facts["app_file"]).is_file()
  assert "maskgen[hub]" in (folder / "requirements.txt").read_text().split()
