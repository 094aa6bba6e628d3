"""ViLex: what is trained and what is not, tokens as words, guidance."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_text_to_image
import tiny
from flax.core import FrozenDict

from maskgen import images, objectives, storage, tree
from maskgen.costs import flops
from maskgen.errors import UserError
from maskgen.numerics.prompts import Segment
from maskgen.serving import ImageWords
from maskgen.tools import convert
from maskgen.training import optim
from maskgen.training.state import TrainState
from maskgen.training.step import make_update

folders = test_text_to_image.folders
SIZE, TOKENS, LENGTH = 8, 4, 10
DECODER = dict(
  name="diffusion",
  image_size=(SIZE, SIZE),
  patch=2,
  captions=dict(text_tokenizer="list:a red blue cat on background", length=LENGTH),
  text_encoder=dict(width=8, depth=1, heads=2, hidden=8),
  unet=dict(channels=(4,), layers=1, depths=(1,), heads=(2,), groups=2),
  schedule=dict(prediction="v", betas="cosine"),
  sampling=dict(steps=2, guidance=1.0),
)
SECTION = dict(
  name="vilex",
  decoder=DECODER,
  encoder=dict(name="vit", image_size=(8, 8), patch=4, width=8, depth=1, heads=2),
  tokens=TOKENS,
  pool_width=8,
  pool_depth=1,
  pool_heads=2,
  sampling=dict(steps=2),
)


@functools.cache
def setup(**changes):
  """The objective and its variables, with random frozen parameters."""
  objective = objectives.build(SECTION | changes)
  rng = np.random.default_rng(0)

  def draw(leaf):
    return rng.normal(size=leaf.shape).astype(leaf.dtype) / np.sqrt(max(leaf.shape[0], 4))

  pretrained = jax.tree.map(draw, objective.pretrained_shapes())
  parts = jax.jit(objective.init)(jax.random.key(0), pretrained)
  return objective, parts, objectives.compile_predict_fns(objective)


def batch(size=4, seed=0):
  rng = np.random.default_rng(seed)
  images = rng.integers(0, 256, (size, SIZE, SIZE, 3), np.uint8)
  captions = objectives.build(DECODER).captions.read(["a red cat", "a cat on blue background", "", "blue"])
  return {"image": images, "caption": captions[np.arange(size) % 4]}


def keys(size, seed=0):
  return jax.random.split(jax.random.key(seed), size)


def training_loss(objective, variables):
  """A compiled function of a batch that returns the training loss and the metrics."""
  compute = jax.jit(functools.partial(objective.losses, train=True))

  def loss(given, seed=0, step=0):
    key = jax.random.key(seed)
    found, metrics, _ = compute(variables["params"], variables["frozen"], {}, given, key, step)
    return found["main"], metrics

  return loss


@functools.cache
def gradient(**changes):
  objective, parts, _ = setup(**changes)

  def loss(params, frozen, step):
    values, metrics, _ = objective.losses(
      params, frozen, {}, batch() | {"key": keys(4)}, jax.random.key(1), step, train=True
    )
    return values["main"], metrics

  return jax.jit(jax.value_and_grad(loss, has_aux=True)), parts


def test_gradients_reach_everything_that_is_trained():
  compute, parts = gradient(words=FrozenDict(share=0.5))
  (loss, metrics), slopes = compute(parts["params"], parts["frozen"], 0)
  assert np.isfinite(loss)
  flat = tree.flatten(slopes["main"])
  assert {name.split("/")[0] for name in flat} == {"encoder", "pool"}
  # A bias of keys changes no softmax.
  zero = [name for name, slope in flat.items() if not np.abs(slope).max() > 0]
  assert not [name for name in zero if not name.endswith("key/bias")], zero
  assert metrics["token_spread"] > 0 and 1 <= metrics["kept_tokens"] <= TOKENS
  np.testing.assert_allclose(metrics["token_scale"], 1, rtol=1e-3)  # as long as words, at first


def test_gradients_in_bfloat16_are_near_those_in_float32():
  """Of networks that compute in bfloat16, and with the frozen weights stored in it, too.

  `pytest -s` prints the numbers, of which docs/vilex.md has those of one machine.
  """
  half, words = dict(dtype="bfloat16"), FrozenDict(share=0.5)
  decoder = DECODER | {part: DECODER[part] | half for part in ("text_encoder", "unet")}
  sections = dict(encoder=FrozenDict(SECTION["encoder"] | half), decoder=FrozenDict(decoder))
  (plain, parts), (rounding, _) = gradient(words=words), gradient(words=words, **half, **sections)
  frozen = parts["frozen"]
  exact = plain(parts["params"], frozen, 0)[1]["main"]
  stored = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), frozen)
  for what, weights in (("computed in bfloat16", frozen), ("frozen weights in bfloat16, too", stored)):
    found = rounding(parts["params"], weights, 0)[1]["main"]
    for group in ("encoder", "pool"):
      a, b = (
        np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree[group])]) for tree in (exact, found)
      )
      cosine, error = a @ b / np.linalg.norm(a) / np.linalg.norm(b), np.linalg.norm(a - b) / np.linalg.norm(a)
      print(f"{what}: {group} cosine {cosine:.5f}, relative error {error:.4f}")
      assert cosine > 0.99 and 0 < error < 0.15


def test_only_encoder_and_pool_are_trained():
  objective, parts, _ = setup()
  optimizer = optim.Optimizer(learning_rate=1e-2, schedule="constant", multipliers=(("^encoder/", 0.0),))
  schedule = optimizer.make_schedule(3, 4, 100)
  transform = optimizer.make_transform(schedule, parts["params"]["main"])
  update = jax.jit(
    make_update(objective, {"main": transform}, {"main": schedule}, seed=0, ema={}, accumulation=1)
  )
  params = parts["params"]
  state = TrainState(jnp.int32(0), params, {"main": transform.init(params["main"])}, {}, {})
  frozen = jax.tree.map(np.array, parts["frozen"])
  for _ in range(2):
    state, metrics = update(state, parts["frozen"], {"image": batch()["image"]})
  tiny.assert_same_bits(frozen, parts["frozen"])
  tiny.assert_same_bits(state.params["main"]["encoder"], params["main"]["encoder"])  # by its multiplier
  moved = jax.tree.map(
    lambda a, b: float(np.abs(a - b).max()), state.params["main"]["pool"], params["main"]["pool"]
  )
  assert min(value for name, value in tree.flatten(moved).items() if not name.endswith("key/bias")) > 0
  assert np.isfinite(metrics["loss/main"])
  held = tree.count(state.params) + tree.count(state.opt_state)
  assert held < 3 * tree.count(params) + 10


def test_fewer_tokens_are_a_shorter_prompt():
  """Training with k of n tokens uses the same prompt as the first k tokens alone."""
  objective, variables, predict = setup()
  vectors = predict["encode"](variables, batch(), None)
  assert vectors.shape == (4, TOKENS, 8)
  condition = jax.jit(objective.text_to_image.condition)
  for k in range(1, TOKENS + 1):
    number = jnp.full((4,), k)
    dropped, end = condition(variables["frozen"]["decoder"], [Segment(vectors, number)])
    short, _ = condition(variables["frozen"]["decoder"], [Segment(vectors[:, :k], number)])
    np.testing.assert_allclose(dropped.context, short.context, atol=1e-6)
    np.testing.assert_array_equal(end, k + 1)


def test_other_numbers_of_tokens_do_not_recompile():
  _, variables, predict = setup()
  vectors = predict["encode"](variables, batch(), None)
  drawn, programs = [], set()
  for k in range(1, TOKENS + 1):
    number = np.full((4, 1), k, np.int32)
    images = [
      predict["generate"](variables, {"vectors": v[:, None], "number": number, "key": keys(4)}, None)
      for v in (vectors, vectors.at[:, k:].set(7.0))  # nothing is seen of the tail
    ]
    np.testing.assert_array_equal(*images)
    drawn.append(images[0])
    programs.add(predict["generate"].__wrapped__._cache_size())
  assert len(programs) == 1
  assert all(np.abs(more - less).max() > 0 for less, more in itertools.pairwise(drawn))


def words(*texts):
  """The words of one prompt for two examples, piece by piece."""
  tokenizer = objectives.build(DECODER).captions.opened
  ids = np.zeros((2, len(texts), LENGTH - 2), np.int32)
  for i, text in enumerate(texts):
    encoded = tokenizer.encode(text)
    ids[:, i, : len(encoded)] = encoded
  number = np.int32([[len(tokenizer.encode(text)) for text in texts]] * 2)
  return {"words": ids, "num_words": number}


@functools.cache
def mixed(text):
  """A prompt of an image, and words beside it if there is a text."""
  _, variables, predict = setup()
  vectors = predict["encode"](variables, {"image": batch(2)["image"]}, None)
  given = {"vectors": vectors[:, None], "number": np.full((2, 1), 2, np.int32), "key": keys(2)}
  return given | (words("a", text) if text is not None else {})


@functools.cache
def drawn(text, **guidance):
  _, variables, predict = setup()
  return np.asarray(predict["generate"](variables, mixed(text), None, **guidance))


def test_text_free_guidance():
  """Section 3.3: 0 ignores the words, 1 is the unchanged mixed prompt, and more strengthens the words."""
  alone = drawn(None, image_guidance=1.0)
  np.testing.assert_allclose(drawn("on blue", image_guidance=1.0, text_guidance=0.0), alone, atol=1e-5)
  both = drawn("on blue", image_guidance=1.0, text_guidance=1.0)
  assert np.abs(both - alone).max() > 1e-4
  stronger = drawn("on blue", image_guidance=1.0, text_guidance=2.0)
  assert np.abs(stronger - both).max() > 1e-4
  assert np.abs(drawn("on red", image_guidance=1.0, text_guidance=1.0) - both).max() > 1e-4


def test_guidance_evaluates_only_the_prompts_that_it_needs():
  _, variables, predict = setup()
  generate = predict["generate"]

  def cost(text, image, words):
    chosen = functools.partial(generate, image_guidance=image, text_guidance=words)
    return flops.count(chosen, variables, mixed(text), None)

  alone = cost(None, 1.0, 3.0)
  each = cost(None, 3.0, 3.0) - alone  # all prompts have the same length and cost
  assert each > alone / 2
  # The config's own scales are 2 and 2, where the image alone has no weight.
  evaluated = {(1, 0): 1, (1, 1): 1, (1, 3): 2, (3, 0): 2, (2, 2): 2, (0, 1): 3, (3, 3): 3}
  for scales, count in evaluated.items():
    assert cost("on blue", *scales) == alone + (count - 1) * each, scales
  chosen = [(1.0, 0.0), (1.0, 1.0), (1.0, 2.0)]
  found = [drawn("on blue", image_guidance=image, text_guidance=words) for image, words in chosen]
  before = generate.__wrapped__._cache_size()
  for exact, (image, words) in zip(found, chosen, strict=True):
    close = drawn("on blue", image_guidance=image + 1e-7, text_guidance=words + 1e-7)
    np.testing.assert_allclose(exact, close, atol=1e-5)
  # One program for all scales that are merely close.
  assert generate.__wrapped__._cache_size() <= before + 1


def test_a_prompt_of_words_alone_is_what_the_frozen_model_draws():
  _, variables, predict = setup()
  decoder = objectives.build(DECODER)
  text = "a blue cat"
  expected = objectives.compile_predict_fns(decoder)["generate"](
    {"params": {"main": variables["frozen"]["decoder"]}, "frozen": {}, "extra": {}},
    {"caption": decoder.captions.read([text] * 2), "key": keys(2)},
    None,
    guidance=jnp.float32(3.0),
  )
  found = predict["generate"](variables, words(text) | {"key": keys(2)}, None, text_guidance=3.0)
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_losses_of_prompts():
  _, variables, predict = setup()
  found = predict["loss"](variables, batch(), jax.random.key(0))
  assert found.keys() == {"loss", "loss_1_token", "loss_no_prompt", "loss_caption"}
  assert all(value.shape == (4,) and np.isfinite(value).all() for value in found.values())
  assert "loss_caption" not in predict["loss"](variables, {"image": batch()["image"]}, jax.random.key(0))


def test_alignment_with_captions_fades():
  compute, parts = gradient(alignment_steps=4)
  (plain, _), slopes = gradient()[0](parts["params"], parts["frozen"], 0)
  # Without a U-Net nothing but the alignment moves the encoder.
  blind = jax.tree.map(jnp.zeros_like, parts["frozen"]["decoder"]["unet"])
  frozen = {**parts["frozen"], "decoder": {**parts["frozen"]["decoder"], "unet": blind}}
  for step, weight in enumerate([1, 0.75, 0.5, 0.25, 0, 0]):
    (loss, metrics), _ = compute(parts["params"], parts["frozen"], step)
    np.testing.assert_allclose(loss, plain + weight * metrics["misalignment"], rtol=1e-5)
    _, aligning = compute(parts["params"], frozen, step)
    assert (max(np.abs(slope).max() for slope in jax.tree.leaves(aligning)) > 0) == (weight > 0)
  after = compute(parts["params"], parts["frozen"], 4)[1]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after, slopes)


def test_configs_with_earlier_names_are_read(caplog):
  old = objectives.build(SECTION | dict(first_step=3, warm_start_steps=4))
  assert old == objectives.build(SECTION | dict(min_timestep=3, alignment_steps=4))
  assert {record.getMessage() for record in caplog.records} == {
    "config.objective.first_step is now called 'min_timestep': rename the key",
    "config.objective.warm_start_steps is now called 'alignment_steps': rename the key",
  }


def test_timesteps_with_little_noise_are_skipped():
  """Predicting 0 costs the square of v = alpha e - sigma x, at the last timestep that of x: alpha is 0."""
  objective, variables, _ = setup(min_timestep=999)
  decoder = variables["frozen"]["decoder"]
  blind = {**decoder, "unet": jax.tree.map(jnp.zeros_like, decoder["unet"])}
  blinded = {**variables, "frozen": {**variables["frozen"], "decoder": blind}}
  loss, _ = training_loss(objective, blinded)(batch() | {"key": keys(4)}, seed=1)
  pictures = objective.text_to_image.model.encode(decoder, images.to_float(batch()["image"])).mean
  np.testing.assert_allclose(loss, jnp.square(pictures).mean(), rtol=1e-2)


def test_recoloured_images_have_captions_and_no_alignment():
  """With words, the target is unchanged and the encoder sees other hues."""
  plain, turned = (
    training_loss(*setup(words=FrozenDict(share=1.0, recoloured=recoloured), alignment_steps=4)[:2])
    for recoloured in (0.0, 1.0)
  )
  given = batch() | {"key": keys(4)}
  (loss, metrics), (other, fewer) = plain(given, seed=1), turned(given, seed=1)
  # One caption of four is empty, and says no hue.
  assert 0 < fewer["misalignment"] < metrics["misalignment"]
  assert np.isfinite(other) and other != loss
  # A picture without hues has none to turn.
  grey = given | {"image": np.repeat(given["image"][..., :1], 3, axis=-1)}
  np.testing.assert_allclose(plain(grey, step=4)[0], turned(grey, step=4)[0], rtol=1e-5)


def test_images_replace_their_subject():
  """Captions without the subject do not change anything."""
  losses = []
  for subject in (("cat",), ("dog",)):
    decoder = DECODER | dict(
      captions=dict(text_tokenizer="list:a red blue cat on background dog", length=LENGTH)
    )
    words = dict(share=1.0, place="within", subject=subject)
    objective, variables, _ = setup.__wrapped__(decoder=decoder, words=words)
    loss = training_loss(objective, variables)
    for captions in (["a red cat"] * 4, ["a blue background"] * 4):
      full = batch() | {"key": keys(4), "caption": objective.texts.read(captions)}
      losses.append(loss(full)[0])
  assert losses[0] != losses[2] and losses[1] == losses[3]


def test_a_frozen_encoder_is_only_read():
  """It computes the same, and has neither gradients nor a part in the state."""
  with pytest.raises(UserError, match="train_encoder=False freezes an encoder from scratch"):
    objectives.build(SECTION | dict(train_encoder=False))
  trained, parts, predict = setup(pretrained_encoder=True)
  objective, frozen, same = setup(pretrained_encoder=True, train_encoder=False)
  assert set(frozen["params"]["main"]) == {"pool"} and set(frozen["frozen"]) == {"decoder", "encoder"}
  tiny.assert_same_bits(frozen["frozen"]["encoder"], parts["params"]["main"]["encoder"])
  given = {"image": batch()["image"]}
  np.testing.assert_array_equal(same["encode"](frozen, given, None), predict["encode"](parts, given, None))
  assert objective.positions() == {} and objective.image_encoder.layers("main") == ()
  assert trained.positions() and trained.image_encoder.layers("main")


def test_templates_need_no_captions():
  """Words of a template are those of a caption."""
  objective, variables, _ = setup(words=FrozenDict(share=1.0, templates=("a red {}",), templated=1.0))
  assert objective.captions is None
  told, _, _ = setup(words=FrozenDict(share=1.0, place="behind"))
  given = {"image": batch()["image"], "key": keys(4)}
  captions = told.texts.read(["a red"] * 4)
  losses = [
    training_loss(objective, variables)(given)[0],
    training_loss(told, variables)(given | {"caption": captions})[0],
  ]
  assert losses[0] == losses[1]


def test_features_and_reconstructions():
  _, variables, predict = setup()
  given = {"image": batch()["image"]}
  assert predict["features"](variables, given, None).shape == (4, 8)
  images = predict["reconstruct"](variables, given, jax.random.key(0))
  assert images.shape == (4, SIZE, SIZE, 3) and images.min() >= 0 and images.max() <= 1


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(tokens=LENGTH - 1), f"tokens is {LENGTH - 1}: a prompt of this decoder holds 1 to {LENGTH - 2}"),
    (dict(encoder=dict(name="resnet")), "'resnet' does not exist"),
    (dict(encoder=DECODER), "encoder.name is 'diffusion', which has no image encoder: give a model that has"),
    (dict(words=dict(share=2.0)), "share is 2.0: give a share"),
    (dict(words=dict(share=0.5, templates=("a dog {}",))), "has the out-of-vocabulary word 'dog'"),
    (
      dict(words=dict(share=0.5, templates=("a " * 9 + "{}",))),
      "has 9 words .*shorten it, this model reads 8",
    ),
    (dict(words=dict(place="amid")), "place 'amid' does not exist"),
    (dict(words=dict(recoloured=0.5)), "recoloured is 0.5 but share is 0"),
    (
      dict(words=dict(place="within", subject=("cats",))),
      "'cats' is not a single word of the tokenizer",
    ),
    (dict(min_timestep=1000), "min_timestep is 1000: the decoder's timesteps are 0 to 999"),
    (dict(pool_heads=3), "does not divide into 3 heads"),
    (dict(sampling=dict(sampler="euler")), "sampler 'euler' does not exist"),
    (dict(tail_drop=dict(distribution="pow")), "distribution 'pow' does not exist"),
  ],
)
def test_wrong_configs(changes, message):
  with pytest.raises(UserError, match=message):
    objectives.build(SECTION | changes)


def test_pretrained_models_of_another_kind():
  objective, _, _ = setup()
  objective.check_pretrained("decoder", {"objective": DECODER})
  other = DECODER | dict(unet=DECODER["unet"] | dict(layers=2))
  with pytest.raises(UserError, match=r"it has model.unet.layers=2, config.objective has 1: make them equal"):
    objective.check_pretrained("decoder", {"objective": other})
  with pytest.raises(UserError, match="it does not generate images from texts"):
    objective.check_pretrained("decoder", {"objective": tiny.stage("tokenizer")["objective"]})


def test_a_mage_encoder():
  """Its tokenizer is frozen, its encoder is trained."""
  section = tiny.stage("mage")["objective"]
  objective, variables, predict = setup.__wrapped__(encoder=section)
  assert variables["frozen"]["tokenizer"].keys() >= {"encoder", "decoder"}
  assert "embedding" in variables["params"]["main"]["encoder"]
  assert predict["encode"](variables, {"image": batch()["image"]}, None).shape == (4, TOKENS, 8)
  objective.check_pretrained("encoder", {"objective": section})
  with pytest.raises(UserError, match=r"it has encoder.network.width=32, config.objective has 16"):
    objective.check_pretrained("encoder", {"objective": section | dict(width=32)})


def test_a_pretrained_vit():
  objective = objectives.build(SECTION | dict(pretrained_encoder=True))
  fields = {key: value for key, value in SECTION["encoder"].items() if key != "name"}
  objective.check_pretrained("encoder", {"network": "vit", "vit": fields | dict(hidden=32)})
  with pytest.raises(UserError, match=r"it has encoder.network.hidden=40, config.objective has 32"):
    objective.check_pretrained("encoder", {"network": "vit", "vit": fields | dict(hidden=40)})
  with pytest.raises(UserError, match=r"its objective\.name is 'diffusion', which has no image encoder"):
    objective.check_pretrained("encoder", {"objective": DECODER})
  ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), objective.pretrained_shapes())
  main = jax.jit(objective.init)(jax.random.key(0), ones)["params"]["main"]
  tiny.assert_same_bits(main["encoder"], ones["encoder"]["params"]["main"])
  with pytest.raises(UserError, match="an encoder with frozen parts is always pretrained"):
    objectives.build(SECTION | dict(pretrained_encoder=True, encoder=tiny.stage("mage")["objective"]))


@pytest.mark.parametrize(("name", "widths"), [("sd", (8,)), ("xl", (4, 8))])
def test_published_decoders(folders, tmp_path, name, widths):
  """With one and two text encoders."""
  convert.main(["--format=diffusers", f"--weights={folders / name}", f"--out={tmp_path / 'out'}"])
  config = storage.load_config(tmp_path / "out")
  assert config["decoder"]["image_size"] == [16, 16]
  section = SECTION | dict(decoder=config["decoder"] | dict(image_size=(8, 8)), tokens=3)
  objective = objectives.build(section)
  objective.check_pretrained("decoder", config)
  decoder = storage.load_variables(tmp_path / "out", objective.pretrained_shapes()["decoder"])
  variables = jax.jit(objective.init)(jax.random.key(0), {"decoder": decoder})
  tables = [
    decoder["params"]["main"][part]["embeddings"]["token_embedding"]["embedding"]
    for part in ("text_encoder", "text_encoder_2")[: len(widths)]
  ]
  expected = [np.full(len(table.T), np.sqrt(np.square(table).mean())) for table in tables]
  np.testing.assert_allclose(
    variables["params"]["main"]["pool"]["scale"], np.concatenate(expected), rtol=1e-5
  )
  predict = objectives.compile_predict_fns(objective)
  vectors = predict["encode"](variables, batch(2), None)
  assert vectors.shape == (2, 3, sum(widths))
  model = ImageWords({"objective": section}, objective, variables)
  given = model.lay_out("{} b", list(vectors[:1]))
  given = {name: np.stack([value] * 2) for name, value in given.items()} | {"key": keys(2)}
  images = predict["generate"](variables, given, None)
  assert images.shape == (2, 8, 8, 3) and np.isfinite(images).all()
  if name == "sd":
    with pytest.raises(UserError, match="crop_sizes is set, but this decoder takes no sizes: only SDXL does"):
      objectives.build(section | dict(crop_sizes=True))
    return
  told = objectives.build(section | dict(crop_sizes=True))
  assert told.batch_spec().arrays()["sizes"].shape == (6,)
  compute = jax.jit(functools.partial(told.losses, train=True))
  losses = []
  for sizes in ((8, 8, 0, 0, 8, 8), (90, 60, 3, 0, 8, 8)):
    given = batch(2) | {"key": keys(2), "sizes": np.array([sizes] * 2, np.int32)}
    args = (variables["params"], variables["frozen"], {}, given, jax.random.key(0), 0)
    losses.append(compute(*args)[0]["main"])
  whole = jax.jit(functools.partial(objective.losses, train=True))(*args)[0]["main"]
  np.testing.assert_allclose(losses[0], whole, rtol=1e-6)
  assert losses[1] != losses[0]
