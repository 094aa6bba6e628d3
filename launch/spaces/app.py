"""A page for Spaces of the Hugging Face Hub: generate pictures, paint holes into them, and fill these.

`MASKGEN_MODEL` is what `maskgen.load` takes: a name, a folder, or an address such as hf://owner/name@revision.
It must be a masked generative model.
"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

import maskgen
from maskgen.errors import UserError

COUNT = 4
LEAST_SIDE = 256  # pixels; smaller pictures are shown enlarged


def enlarge(picture: np.ndarray) -> Image.Image:
  """A picture, float in [0, 1] [h, w, c], large enough to paint on."""
  factor = -(-LEAST_SIDE // min(picture.shape[:2]))
  pixels = np.rint(255 * picture).astype(np.uint8).repeat(factor, 0).repeat(factor, 1)
  return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def generate(model: maskgen.Model, seed: float, **given: Any) -> list[Image.Image]:
  """New pictures; `given` has the class as `label` and the text as `prompt`, where the model takes them."""
  return [enlarge(picture) for picture in model.generate(seed=int(seed), batch=COUNT, **wanted(given))]


def fill(model: maskgen.Model, drawing: dict[str, Any], seed: float, **given: Any) -> list[Image.Image]:
  """Candidates for the painted parts of a picture, as `gradio.ImageEditor` describes them: Pillow images."""
  if drawing["background"] is None:
    raise UserError("there is no picture: open one, or generate some and choose one")
  grey = model.objective.image_shape[-1] == 1
  picture = np.asarray(drawing["background"].convert("L" if grey else "RGB"))
  hole = np.zeros(picture.shape[:2], bool)
  for layer in drawing["layers"]:
    hole |= np.asarray(layer.convert("RGBA"))[..., 3] > 0
  if not hole.any() or hole.all():
    raise UserError("paint over the part of the picture that should change")
  batch = np.stack([picture.reshape(*hole.shape, -1)] * COUNT)
  filled = model.inpaint(batch, hole, seed=int(seed), **wanted(given))
  return [Image.fromarray(one[..., 0] if grey else one) for one in filled]


def wanted(given: dict[str, Any]) -> dict[str, Any]:
  """Leaves out what a visitor left empty."""
  return {name: value for name, value in given.items() if value not in (None, "")}


def page(model: maskgen.Model) -> Any:
  """The page, a `gradio.Blocks`."""
  import gradio as gr

  classes = model.classes or tuple(map(str, range(model.objective.num_classes)))
  with gr.Blocks(title="maskgen") as blocks:
    with gr.Row():
      with gr.Column():
        editor = gr.ImageEditor(
          type="pil", label="Paint over what should change", brush=gr.Brush(colors=["#f0f"])
        )
        seed = gr.Number(0, label="Seed", precision=0)
        conditions = {}
        if model.objective.num_classes:
          conditions["label"] = gr.Dropdown([(name, i) for i, name in enumerate(classes)], label="Class")
        if model.objective.captions is not None:
          conditions["prompt"] = gr.Textbox(label="Prompt")
        make, mend = gr.Button("New pictures"), gr.Button("Fill the hole", variant="primary")
      gallery = gr.Gallery(label="Candidates; choose one to paint on it", format="png", columns=2)

    def answer(method: Callable[..., list[Image.Image]], *values: Any) -> list[Image.Image]:
      *first, number = values[: len(values) - len(conditions)]
      given = dict(zip(conditions, values[len(values) - len(conditions) :], strict=True))
      try:
        return method(model, *first, number, **given)
      except UserError as error:
        raise gr.Error(str(error)) from None

    inputs = [seed, *conditions.values()]
    make.click(lambda *values: answer(generate, *values), inputs, gallery, api_name="generate")
    mend.click(lambda *values: answer(fill, *values), [editor, *inputs], gallery, api_name="fill")

    def choose(chosen: gr.SelectData) -> str:
      return chosen.value["image"]["path"]

    gallery.select(choose, None, editor)
  return blocks


if __name__ == "__main__":
  page(maskgen.load(os.environ.get("MASKGEN_MODEL", "emoji"))).queue(max_size=16).launch()
