"""ViLex with Stable Diffusion: layouts without a folder, wrong folders, and a tiny one from end to end."""

import io
import json
import shutil
import tarfile

import jax
import numpy as np
import pytest
import test_text_to_image
import tiny
from etils import epath
from PIL import Image

import maskgen
from maskgen import config as config_lib
from maskgen import main, objectives, storage, tree
from maskgen.benchmarks import dataless
from maskgen.errors import UserError
from maskgen.importers import diffusers, torch_tensors
from maskgen.importers.diffusers_layouts import LAYOUTS
from maskgen.importers.published import PUBLISHED
from maskgen.tools import convert, export, generate
from maskgen.training.pretrained import complete, stored_first

folders, trained = test_text_to_image.folders, tiny.trained
CONFIGS = {f"configs/vilex_{family}.py": family for family in LAYOUTS}


@pytest.fixture(scope="module")
def converted(folders, tmp_path_factory):
  """Converted models, whose folders of diffusers are gone."""
  root = tmp_path_factory.mktemp("converted")
  for name in ("sd", "xl"):
    given = shutil.copytree(folders / name, root / "given")
    (given / "LICENSE.md").write_text("some terms")
    convert.main(["--format=diffusers", f"--weights={given}", f"--out={root / name}"])
    shutil.rmtree(given)
  return root


def load(config, **overrides):
  return config_lib.to_dict(config_lib.load(config, overrides))


# Without folders


@pytest.mark.parametrize(("config", "family"), CONFIGS.items())
def test_shapes_need_no_folder(config, family):
  objective = objectives.build(load(config)["objective"])
  assert diffusers.family_of(objective.text_to_image.model) == family
  shapes = objective.pretrained_shapes()
  for part, leaves in shapes["decoder"]["params"]["main"].items():
    expected = np.dtype("float32" if part == "vae" else "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(leaves)} == {expected}, part
  assert 410e6 < tree.count(shapes["encoder"]) < 415e6  # SigLIP's So400m/14 without its head
  assert objective.tokens == 75 == objective.text_to_image.max_prompt_tokens
  assert objective.captions is None and objective.texts.length == 77


@pytest.mark.parametrize("family", LAYOUTS)
def test_layouts_are_of_their_family_and_published(family):
  layout = LAYOUTS[family]
  assert diffusers.family_of(diffusers.published_model(family)) == family
  assert PUBLISHED[layout.published].format == "diffusers"
  assert len(layout.padding_ids) == len(layout.text_encoders)


@pytest.mark.parametrize(("config", "stage"), [("vilex_digits.py:debug", "vilex"), ("vilex_sd15.py:", None)])
def test_the_encoder_may_be_that_of_a_mage(config, stage, trained):
  """Before training, its features are those of the MAGE model."""
  path = str(trained / "mage")
  plain = complete(load(f"configs/{config},encoder=mage:{path}"))
  plain = plain[stage] if stage else plain
  assert plain["pretrained"]["encoder"] == path
  objective = objectives.build(plain["objective"])
  encoder = storage.load_variables(path, objective.pretrained_shapes()["encoder"])
  main, frozen = {"encoder": encoder["params"]["main"]}, {"tokenizer": encoder["frozen"]["tokenizer"]}
  model, fns = maskgen.load(path), objectives.compile_predict_fns(objective)
  images = np.random.default_rng(0).integers(0, 256, (2, *model.objective.image_shape), np.uint8)
  found = fns["features"]({"params": {"main": main}, "frozen": frozen}, {"image": images}, None)
  np.testing.assert_allclose(found, model.features(images), atol=1e-5)
  with pytest.raises(UserError, match="give mage:PATH, with a trained MAGE model"):
    config_lib.load("configs/vilex_digits.py:encoder=runs/mage")


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_a_step_can_be_traced_without_data_or_weights(config):
  built = dataless.build(load(config, batch_size="64"))
  target = built.targets
  metrics = jax.eval_shape(
    built.update, target["state"], target["frozen"], dataless.batch_spec(built, "synthetic")
  )[1]
  assert metrics["loss/main"].shape == ()


@pytest.mark.slow
def test_training_without_weights_says_what_to_download(tmp_path):
  with pytest.raises(UserError) as error:
    main.main(["--config=configs/vilex_sd15.py:source=synthetic", "--mode=check", f"--workdir={tmp_path}"])
  message = str(error.value)
  assert message.startswith(
    "config.pretrained.decoder=stable_diffusion_15 is not on this machine: fetch http"
  )
  assert "OpenRAIL" in message and "maskgen.tools.convert --format=diffusers" in message
  assert "\n" not in message


# Other folders


@pytest.mark.parametrize("converts", [True, False])
def test_a_folder_of_another_family(folders, converted, converts):
  path = (converted if converts else folders) / "xl"
  with pytest.raises(
    UserError, match=r"xl is Stable Diffusion XL .* but Stable Diffusion 1 .* is needed: give its folder$"
  ):
    config_lib.load(f"configs/vilex_sd15.py:decoder={path}")


def test_folders_that_are_not_decoders(folders, tmp_path):
  with pytest.raises(
    UserError, match=r"is a folder of diffusers: convert it with .*--format=diffusers .*give DIR"
  ):
    config_lib.load(f"configs/vilex_sd15.py:decoder={folders / 'sd'}")
  with pytest.raises(UserError, match=r"model .*nowhere does not exist"):
    config_lib.load(f"configs/vilex_sd15.py:decoder={tmp_path / 'nowhere'}")
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(UserError, match=r"is not a text-to-image model from maskgen\.tools\.convert"):
    config_lib.load(f"configs/vilex_sd15.py:decoder={tmp_path}")


def test_words_win_by_one_switch(converted):
  given = f"configs/vilex_sd15.py:decoder={converted / 'sd'},words_win"
  words = load(given)["objective"]["words"]
  assert words["share"] == 0.65 and words["place"] == "within" and words["recoloured"] == 0.4
  assert "tokenize" in load(given)["data"]["preprocess"] and len(words["templates"]) > 10
  named = load(f"{given},subject=cat+dog,recoloured=0.2,template_share=0")["objective"]["words"]
  assert named["subject"] == ["cat", "dog"] and named["recoloured"] == 0.2 and not named["templates"]
  with pytest.raises(UserError, match=r"template_share and caption_share are 1\.5 in total: lower one"):
    load(f"{given},template_share=0.5,caption_share=1.0")


def test_the_pretrained_decoder_is_of_the_family_too(converted):
  objective = objectives.build(load("configs/vilex_sd15.py")["objective"])
  with pytest.raises(UserError, match=r"is Stable Diffusion XL .* but Stable Diffusion 1"):
    objective.check_pretrained("decoder", storage.load_config(converted / "xl"))
  with pytest.raises(UserError, match=r"it has .*, config.objective has .*: make them equal"):
    objective.check_pretrained("decoder", storage.load_config(converted / "sd"))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(family=""), "give the folder of a text-to-image model, or the family of one"),
    (dict(family="sd14"), "family 'sd14' does not exist"),
    (dict(param_dtype="bf16"), "dtype 'bf16' does not exist"),
    (dict(image_size=(500, 512)), r"image_size is \(500, 512\): give \(height, width\), multiples of 64"),
  ],
)
def test_wrong_sections(changes, message):
  with pytest.raises(UserError, match=message):
    diffusers.read_frozen(dict(name="diffusers", family="sd15", image_size=(512, 512)) | changes)


# From pictures to a trained ViLex model


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  """An archive of pictures with captions in either form."""
  path = tmp_path_factory.mktemp("pictures") / "some.tar"
  rng = np.random.default_rng(0)
  with tarfile.open(path, "w") as archive:

    def add(name, content):
      member = tarfile.TarInfo(name)
      member.size = len(content)
      archive.addfile(member, io.BytesIO(content))

    for i in range(40):
      data = io.BytesIO()
      Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(data, "PNG")
      add(f"{i:03}.png", data.getvalue())
      add(f"{i:03}.txt", b"ab\nc") if i % 2 else add(f"{i:03}.json", json.dumps({"caption": "a b"}).encode())
  return path


def test_clean_text_is_that_of_data_and_prompts(converted):
  plain = load(f"configs/vilex_sd15.py:decoder={converted / 'sd'},words_win,template_share=0.0,clean_text")
  plain["objective"] |= dict(encoder=SMALL, pretrained_encoder=False)
  spec = objectives.build(plain["objective"] | {"tokens": 3}).captions.text_tokenizer
  assert spec.startswith("bpe_clean:/") and f"|tokenize('{spec}', 77)" in plain["data"]["preprocess"]


SMALL = dict(
  name="vit", image_size=(16, 16), patch=8, width=16, depth=2, heads=2, hidden=32, scan=True, remat="dots"
)


@pytest.mark.parametrize(
  ("name", "config", "share"),
  [("sd", "vilex_sd15", 0.5), pytest.param("xl", "vilex_sdxl", 0.0, marks=pytest.mark.slow)],
  ids=["sd", "xl"],
)
def test_pictures_and_captions_to_a_vilex_model(converted, pictures, tmp_path, name, config, share):
  """With the config itself except for its sizes: two steps, then a prompt of images."""
  decoder = shutil.copytree(converted / name, tmp_path / "decoder")
  (tmp_path / "templates.txt").write_text("a {}\n\n{} b\n")
  given = f"decoder={decoder},source=tar:{pictures},caption_share={share},templates={tmp_path}/templates.txt"
  plain = load(f"configs/{config}.py:{given},batch_size=8,accumulation=1")
  data, words = plain["data"], plain["objective"]["words"]
  assert words["templates"] == ["a {}", "{} b"] and words["share"] == share + 0.25
  np.testing.assert_allclose(words["templated"], 0.25 / words["share"])
  for key in ("preprocess", "eval_preprocess"):
    assert "_crop(16" in data[key]  # the size of this decoder
    assert ("tokenize('bpe:" in data[key]) == bool(share)
    data[key] = data[key].replace(", 77)", ", 6)")
  plain["objective"] |= dict(encoder=SMALL, pretrained_encoder=False, tokens=3)
  plain["objective"] |= dict(pool_width=16, pool_depth=1, pool_heads=2)
  plain["pretrained"] = {"decoder": str(decoder)}
  plain |= dict(total_steps=2, evals={}, mesh=dict(data=-1, fsdp=1, tensor=1))
  plain["optimizer"]["main"]["warmup_steps"] = 0
  file = tmp_path / "config.py"
  file.write_text(
    f"import ml_collections\ndef get_config(arg=None):\n  return ml_collections.ConfigDict({plain})\n"
  )
  workdir = tmp_path / "run"
  main.main([f"--config={file}", f"--workdir={workdir}"])
  frozen = storage.read_frozen_arrays(workdir)
  stored = {name.split("/")[2]: array.dtype.name for name, array in frozen.items()}
  assert stored.pop("vae") == "float32" and set(stored.values()) == {"bfloat16"}
  shutil.rmtree(decoder)
  # The run goes on without it, and so does its config.
  (workdir / "results.json").unlink()
  main.main([f"--config={file}", f"--workdir={workdir}", "--config.log_every_steps=1"])
  assert (workdir / "results.json").exists()
  with stored_first(epath.Path(workdir)):
    again = load(f"configs/{config}.py:{given},batch_size=8,accumulation=1")
  assert again["objective"]["decoder"] == plain["objective"]["decoder"]
  with pytest.raises(UserError, match="decoder does not exist: give the workdir of a run"):
    load(f"configs/{config}.py:{given}")
  workdir = shutil.move(workdir, tmp_path / "moved")
  export.main([f"--model={workdir}", f"--out={tmp_path / 'export'}"])
  exported = maskgen.load(shutil.move(tmp_path / "export", tmp_path / "elsewhere"))
  assets = tmp_path / "elsewhere" / "assets"
  assert (assets / "0" / "LICENSE.md").read_text() == "some terms"
  for file in (
    tmp_path / "elsewhere" / "config.json",
    assets / "index.json",
    converted / "sd" / "config.json",
  ):
    assert str(tmp_path.parent) not in file.read_text()  # nor where the files were
  image = np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)
  made, same = (
    model.generate(prompt="{} b", images=[image], num_tokens=2, steps=2, batch=1)
    for model in (maskgen.load(workdir), exported)
  )
  assert made.shape == (1, 16, 16, 3) and np.isfinite(made).all()
  np.testing.assert_array_equal(made, same)


# The decoder itself


def test_a_converted_decoder_generates(converted, folders, tmp_path, monkeypatch):
  """As its functions do, in other sizes too, and from the command line."""
  model, loaded = maskgen.load(converted / "sd"), diffusers.load(folders / "sd")
  noise = np.random.default_rng(0).normal(size=(2, 8, 16, 2)).astype(np.float32)
  texts, away = ["a b", ""], "c"

  def condition(given):
    ids, end = loaded.tokenize(given)
    return loaded.model.condition(loaded.params, loaded.model.embed(loaded.params, ids), end)

  expected = loaded.model.generate(
    loaded.params, noise, condition(texts), condition([away] * 2), guidance=3.0, sampler="ddim", steps=2
  )
  request = model.request(0, 2, texts, away) | {"noise": noise}
  size = dict(height=16, width=32)
  found = model.call("generate", request, guidance=3.0, sampler="ddim", steps=2, **size)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  assert model.generate(prompt="a", batch=1, steps=1, **size).shape == (1, 16, 32, 3)
  with monkeypatch.context() as patch:
    patch.setattr(torch_tensors, "read_json", None)  # what was read and checked is not read again
    model.generate(prompt="a", batch=1, steps=1, **size)
  with pytest.raises(UserError, match=r"image_size is \(15, 16\): give \(height, width\), multiples of 4"):
    model.generate(prompt="a", batch=1, height=15)
  with pytest.raises(UserError, match="negative_prompt has no effect at guidance=1"):
    model.generate(prompt="a", batch=1, negative_prompt="b", guidance=1)
  flags = [f"--model={converted / 'sd'}", "--prompt=a", "--negative_prompt=b", "--steps=1", "--count=1"]
  generate.main([*flags, "--width=32", f"--out={tmp_path / 'one.png'}"])
  generate.main([*flags, "--width=32", f"--out_dir={tmp_path / 'many'}"])
  with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "many" / "00000000.png") as many:
    assert one.size == many.size == (32, 16)
    np.testing.assert_allclose(np.asarray(one, int), np.asarray(many, int), atol=1)
