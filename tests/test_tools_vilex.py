"""The command-line tool of ViLex models."""

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from test_vilex import DECODER, SECTION, SIZE, setup

import maskgen
from maskgen import images, sheet, storage
from maskgen.errors import UserError
from maskgen.serving import token_files
from maskgen.tools import vilex

COMMANDS = tuple(vilex.COMMANDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A model with random weights, two pictures of its size, and unusable files."""
  folder = tmp_path_factory.mktemp("vilex")
  _, variables, _ = setup()
  storage.write_export(folder / "model", {"objective": SECTION}, variables)
  decoder = {"params": {"main": variables["frozen"]["decoder"]}, "frozen": {}, "extra": {}}
  storage.write_export(folder / "decoder", {"objective": DECODER}, decoder)
  for seed, name in enumerate(("a.png", "b.png")):
    Image.fromarray(picture(SIZE, SIZE, seed)).save(folder / name)
  Image.new("I;16", (SIZE, SIZE)).save(folder / "deep.png")
  (folder / "text.png").write_text("no picture")
  (folder / "text.safetensors").write_text("{" * 20)
  save_file({"tokens": np.zeros((1, 2, 9), np.float32)}, folder / "other.safetensors")
  token_files.write_tokens(folder / "two.safetensors", np.zeros((2, 2, 8)))
  return folder


@pytest.fixture(scope="module")
def model(folder):
  return maskgen.load(folder / "model")


def picture(height, width, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def run(folder, command, *arguments):
  given = [argument.replace("@", f"{folder}/") for argument in arguments]
  vilex.main([command, f"--model={folder / 'model'}", *given])


def read(path):
  with Image.open(path) as opened:
    return np.asarray(opened)


def files(folder):
  return sorted(path.name for path in folder.iterdir())


def test_reconstructions(folder, model, tmp_path, capsys):
  run(folder, "reconstruct", "--image=@a.png", "--image=@b.png:3", "--count=2", f"--out={tmp_path}/x.png")
  # 1, 2 and 4 tokens of one, 3 of the other, of two seeds.
  assert files(tmp_path) == ["x.png", *(f"x_{i}.png" for i in range(8))]
  assert f"{tmp_path}/x_0.png to {tmp_path}/x_7.png" in capsys.readouterr().out
  a, b = (picture(SIZE, SIZE, seed)[None] for seed in (0, 1))
  for i, (image, k, seed) in {0: (a, 1, 0), 2: (a, 4, 0), 4: (a, 2, 1), 6: (b, 3, 0), 7: (b, 3, 1)}.items():
    np.testing.assert_array_equal(read(tmp_path / f"x_{i}.png"), model.reconstruct(image, k, seed)[0])
  run(folder, "reconstruct", "--image=@a.png", "--num_tokens=2", "--seed=1", f"--out={tmp_path}/one.png")
  np.testing.assert_array_equal(read(tmp_path / "one.png"), read(tmp_path / "x_4.png"))


def test_prompts(folder, model, tmp_path):
  """The tool is the API; picture i of a seed is picture 0 of seed + i."""
  prompt = "a {} on {}"
  given = [f"--prompt={prompt}", "--image=@a.png:1", "--image=@b.png"]
  options = ["--image_guidance=1.5", "--text_guidance=3", "--negative_prompt=blue", "--steps=3"]
  run(folder, "prompt", *given, *options, "--seed=4", "--count=2", f"--out={tmp_path}/x.png")
  assert files(tmp_path) == ["x.png", "x_0.png", "x_1.png"]
  expected = model.generate(
    5,
    1,
    prompt=prompt,
    images=[picture(SIZE, SIZE, seed) for seed in (0, 1)],
    num_tokens=[1, None],
    image_guidance=1.5,
    text_guidance=3.0,
    negative_prompt="blue",
    steps=3,
  )
  np.testing.assert_array_equal(read(tmp_path / "x_1.png"), images.to_uint8(expected[0]))
  run(folder, "prompt", *given, *options, "--seed=5", f"--out={tmp_path}/y.png")
  np.testing.assert_array_equal(read(tmp_path / "y.png"), read(tmp_path / "x_1.png"))
  run(folder, "prompt", "--prompt=a red cat", f"--out={tmp_path}/words.png")
  expected = model.generate(0, 1, prompt="a red cat")
  np.testing.assert_array_equal(read(tmp_path / "words.png"), images.to_uint8(expected[0]))


def test_interpolations(folder, model, tmp_path):
  run(folder, "interpolate", "--image=@a.png", "--image=@b.png", "--count=3", f"--out={tmp_path}/x.png")
  ends = [picture(SIZE, SIZE, seed) for seed in (0, 1)]
  for i, expected in enumerate(images.to_uint8(model.interpolate(*ends, count=3))):
    np.testing.assert_array_equal(read(tmp_path / f"x_{i}.png"), expected)


def test_tokens_replace_images(folder, model, tmp_path, capsys):
  out = f"{tmp_path}/ab.safetensors"
  run(folder, "encode", "--image=@a.png", "--image=@b.png", "--num_tokens=3", f"--out={out}")
  assert "wrote 3 tokens of 8 numbers for each of 2 images" in capsys.readouterr().out
  ends = np.stack([picture(SIZE, SIZE, seed) for seed in (0, 1)])
  np.testing.assert_allclose(load_file(out)["tokens"], model.encode(ends, 3), atol=1e-6)
  pictures = ["--image=@a.png:3", "--image=@b.png:3"]
  for command, name in (("prompt", "x.png"), ("interpolate", "x_1.png")):
    made = []
    for given in (pictures, [f"--image={out}"]):
      run(folder, command, *given, "--count=2", f"--out={tmp_path}/x.png")
      made.append(read(tmp_path / name.replace("x.png", "x_1.png")))
    np.testing.assert_array_equal(*made)


def test_embeddings(folder, model, tmp_path):
  out = f"{tmp_path}/a.safetensors"
  run(folder, "embedding", "--image=@a.png:2", f"--out={out}")
  tokens = model.encode(picture(SIZE, SIZE)[None], 2)
  np.testing.assert_array_equal(load_file(out)["emb_params"], tokens[0])
  for name, image in (("x", f"--image={out}"), ("y", "--image=@a.png:2")):  # it is read as well
    run(folder, "prompt", "--prompt=a {}", image, f"--out={tmp_path}/{name}.png")
  np.testing.assert_array_equal(read(tmp_path / "x.png"), read(tmp_path / "y.png"))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "LA"])
def test_pictures_of_any_kind(mode, folder, model, tmp_path):
  """The model sees their centre, upright and on white."""
  wide = Image.fromarray(picture(SIZE, 3 * SIZE)).convert(mode)
  exif = Image.Exif()
  exif[0x0112] = 3  # upside down
  wide.save(tmp_path / "in.tif", exif=exif)
  run(folder, "encode", f"--image={tmp_path}/in.tif", f"--out={tmp_path}/out.safetensors")
  middle = np.asarray(wide.convert("RGB"))[::-1, ::-1][:, SIZE : 2 * SIZE]
  found = load_file(tmp_path / "out.safetensors")["tokens"]
  np.testing.assert_allclose(found, model.encode(middle[None]), atol=1e-6)


def test_pictures_of_any_size(folder, model, tmp_path):
  for i, size in enumerate(((100, 70), (5, 3))):
    Image.new("RGB", size, (10, 200, 60)).save(tmp_path / f"{i}.png")
    run(folder, "encode", f"--image={tmp_path}/{i}.png", f"--out={tmp_path}/{i}.safetensors")
    found = load_file(tmp_path / f"{i}.safetensors")["tokens"]
    plain = np.full((1, SIZE, SIZE, 3), (10, 200, 60), np.uint8)
    np.testing.assert_allclose(found, model.encode(plain), atol=1e-6)


def test_what_tokens_say_and_where_the_pooling_looks(folder, model, tmp_path, capsys):
  objective, variables, _ = setup()
  words = ["red", "cat"]
  ids = objective.texts.read([" ".join(words)])
  vectors = objective.text_to_image.caption(variables["frozen"]["decoder"], ids).vectors
  nearest = model.nearest_words(3.0 * np.asarray(vectors)[0, :2], count=2)
  assert [one[0][0] for one in nearest] == words and [len(one) for one in nearest] == [2, 2]
  assert all(abs(one[0][1] - 1) < 1e-5 and one[1][1] < 1 for one in nearest)
  weights = model.look(picture(SIZE, SIZE)[None])
  assert weights.shape == (1, 4, 2, 2) and weights.min() > 0
  np.testing.assert_allclose(weights.sum(axis=(2, 3)), 1.0, rtol=1e-5)
  # One patch of four is red.
  shown = sheet.heat(np.full((8, 8, 3), 90, np.uint8), np.array([[0.0, 0.0], [0.0, 0.5]]))
  assert tuple(shown[7, 7]) == (225, 30, 30) and len(set(shown[0, 0])) == 1
  for command in ("words", "look"):
    run(folder, command, "--image=@a.png:3", f"--out={tmp_path}/{command}.png")
    assert read(tmp_path / f"{command}.png").ndim == 3
  printed = capsys.readouterr().out.splitlines()
  assert len(printed) == 5 and printed[0].startswith(f"{folder}/a.png, token 1: ")


@pytest.mark.parametrize(
  ("command", "arguments", "message"),
  [
    ("prompt", ["--prompt=a {}"], r"the prompt 'a \{\}' has 1 place \{\} for 0 images"),
    ("prompt", ["--prompt=a {} {}", "--image=@a.png"], r"has 2 places \{\} for 1 image:"),
    ("prompt", ["--prompt=a {}", "--image=@two.safetensors"], r"has 1 place \{\} for 2 images"),
    ("prompt", ["--prompt=a {} dog", "--image=@a.png"], r"out-of-vocabulary word 'dog'"),
    ("prompt", ["--prompt=a {} a a a a a a a", "--image=@a.png"], r"leaves no room for 1 image: shorten"),
    ("prompt", ["--prompt=a {} a a a a a", "--image=@a.png:3"], r"asks for 3 tokens.* at most 2 fit"),
    ("prompt", ["--prompt=a {}", "--image=@a.png:5"], r"num_tokens is 5: this model has 1 to 4"),
    ("prompt", ["--prompt=a {}", "--image=@a.png", "--num_tokens=0"], r"num_tokens is 0: this model has"),
    ("prompt", ["--image=@a.png:-1"], r"num_tokens is -1: this model has 1 to 4"),
    (
      "prompt",
      ["--image=@two.safetensors:3"],
      r"two\.safetensors:3: the file has 2 tokens per image, give 1 to 2",
    ),
    ("prompt", [], r"neither --prompt nor --image is given"),
    ("prompt", ["--prompt=a", "--count=0"], r"--count=0: give at least 1"),
    ("prompt", ["--prompt=a", "--sampler=euler"], r"sampler 'euler' does not exist"),
    ("prompt", ["--prompt=a", "--text_guidance=-1"], r"text_guidance is -1\.0"),
    ("prompt", ["--prompt=a", "--negative_prompt=a dog"], r"out-of-vocabulary word 'dog'"),
    ("prompt", ["--prompt=a", "--steps=many"], r"--steps: invalid int value: 'many' \(see --help\)"),
    ("reconstruct", [], r"required: --image \(see --help\)"),
    ("reconstruct", ["--image=@a.png", "--num_tokens=1,x"], r"--num_tokens=1,x: give whole numbers"),
    ("reconstruct", ["--image=@a.png", "--num_tokens=1,9"], r"num_tokens is 9: this model has 1 to 4"),
    ("reconstruct", ["--image=@two.safetensors", "--num_tokens=4"], r"only 2 tokens of the image are given"),
    ("reconstruct", ["--image=@missing.png"], r"--image=.*missing\.png: there is no such file"),
    ("reconstruct", ["--image=@missing.safetensors:2"], r"missing\.safetensors: there is no such file"),
    ("reconstruct", ["--image=@text.png"], r"text\.png cannot be read as a picture"),
    ("reconstruct", ["--image=@deep.png"], r"deep\.png has more than 8 bits per channel"),
    ("reconstruct", ["--image=@text.safetensors"], r"text\.safetensors is not an intact "),
    (
      "reconstruct",
      ["--image=@other.safetensors"],
      r"tokens of shape \[2, 9\], this model's have \[1 to 4, 8\]",
    ),
    ("reconstruct", ["--image=@a.png", "--out=a.jpg"], r"--out=a\.jpg: give the name of a \.png file"),
    ("interpolate", ["--image=@a.png"], r"--image gives 1 image: give the two images to interpolate"),
    ("interpolate", ["--image=@two.safetensors", "--prompt={} and {}"], r"has 2 places"),
    ("encode", ["--image=@a.png", "--out=a.png"], r"give the name of a \.safetensors file"),
    ("encode", ["--image=@a.png:1", "--image=@b.png"], r"--image gives 1, 4 tokens: give the same number"),
    ("embedding", ["--image=@two.safetensors"], r"--image gives 2 images: give one"),
    ("embedding", ["--image=@a.png", "--count=2"], r"unrecognized arguments: --count=2"),
    ("look", ["--image=@two.safetensors"], r"two\.safetensors is a file of tokens: give the picture"),
    ("words", ["--image=@a.png", "--count=0"], r"--count=0: give at least 1"),
    ("draw", [], r"invalid choice: 'draw'"),
  ],
)
def test_wrong_arguments(command, arguments, message, folder, tmp_path):
  kind = "safetensors" if command in ("encode", "embedding") else "png"
  with pytest.raises(UserError, match=message) as error:
    run(folder, command, f"--out={tmp_path}/out.{kind}", *arguments)
  assert "\n" not in str(error.value)
  assert not files(tmp_path)


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("decoder", r"--model=.*decoder is of objective 'diffusion': give one of objective 'vilex'"),
    ("missing", r"missing"),
  ],
)
def test_other_models(name, message, folder, tmp_path):
  with pytest.raises(UserError, match=message) as error:
    run(folder, "encode", "--image=@a.png", f"--out={tmp_path}/a.safetensors", f"--model={folder / name}")
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(command, capsys):
  with pytest.raises(SystemExit) as stop:
    vilex.main([command, "--help"])
  assert stop.value.code == 0
  assert f"example:\n  python -m maskgen.tools.vilex {command} --model=" in capsys.readouterr().out


def test_the_tool_explains_itself(capsys):
  with pytest.raises(SystemExit) as stop:
    vilex.main(["--help"])
  text = capsys.readouterr().out
  assert stop.value.code == 0
  assert all(f"\n  {command} " in text for command in COMMANDS)
