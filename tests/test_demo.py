"""The page to try a model: what each kind of model offers, what is refused, the queue, and a real browser."""

import base64
import io
import json
import socket
import threading
import urllib.request
import weakref

import browser
import numpy as np
import pytest
import test_classify
import test_diffusion
import test_image_words
import test_mage_conditional
import test_vilex
import tiny
from PIL import Image
from werkzeug.test import Client

import maskgen
from maskgen import images, objectives
from maskgen.demo import abilities, gallery, pictures, server
from maskgen.demo.jobs import Queue
from maskgen.errors import TransientError, UserError
from maskgen.serving import loading
from maskgen.tools import demo

trained = tiny.trained
images_as_words = test_image_words.model

SIZE = tiny.SIZE
OPTIONS = dict(steps=2, temperature=1.0)
LOCAL = {"Host": "localhost:8188"}
JSON = {**LOCAL, "Content-Type": "application/json"}


@pytest.fixture(scope="module")
def mage(trained):
  return maskgen.load(trained / "mage")


@pytest.fixture(scope="module")
def app(mage):
  return server.App(mage, "tiny")


@pytest.fixture(scope="module")
def closed(mage):
  """An app whose queue takes nothing: what it does not refuse before is answered with 503."""
  return server.App(mage, "tiny", queue=Queue(most=0))


def picture(seed=0, size=SIZE):
  return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def box(size=SIZE):
  hole = np.zeros((*size, 3), np.uint8)
  hole[4:9, 4:9] = 255
  return hole


def read_png(text):
  return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def ask(app, method, **fields):
  """The last line of the answer to a request of the page."""
  answer = Client(app).post(f"/{method}", data=json.dumps(fields), headers=JSON)
  assert answer.status_code == 200, answer.text
  *states, last = map(json.loads, answer.text.splitlines())
  assert all("result" not in state for state in states)
  return last


FILL = dict(image=pictures.encode(picture()), hole=pictures.encode(box()))


def test_a_fill_changes_only_the_hole(app, mage):
  made = [
    read_png(text) for text in ask(app, "inpaint", count=2, seed=5, **FILL, **OPTIONS)["result"]["images"]
  ]
  expected = mage.inpaint(np.stack([picture()] * 2), box()[..., 0], seed=5, **OPTIONS)
  np.testing.assert_array_equal(made, expected)
  kept = box()[..., 0] == 0
  assert all((one[kept] == picture()[kept]).all() and (one[~kept] != picture()[~kept]).any() for one in made)


def test_generated_pictures_and_their_steps(app, mage):
  made = ask(app, "generate", count=2, seed=3, **OPTIONS)["result"]["images"]
  np.testing.assert_array_equal(read_png(made[1]), images.to_uint8(mage.generate(3, 2, **OPTIONS)[1]))
  steps = ask(app, "trajectory", count=2, seed=3, which=1, **OPTIONS)["result"]["images"]
  assert len(steps) == OPTIONS["steps"] and steps[-1] == made[1] != steps[0]


def test_a_hole_that_grows_over_the_picture_is_refused(app):
  assert "no pixel of the picture is left" in ask(app, "inpaint", grow=max(SIZE), **FILL)["error"]


def test_large_answers_are_sent_in_slices(app, monkeypatch):
  monkeypatch.setattr(server, "SLICE", 100)
  answer = Client(app).post("/generate", data=json.dumps(OPTIONS), headers=JSON)
  parts = [*answer.iter_encoded()]
  assert max(map(len, parts)) == 100 and "result" in json.loads(b"".join(parts).splitlines()[-1])


def test_pictures_are_cropped_to_be_reconstructed(app, mage):
  wide = np.repeat(picture(), 2, axis=1)
  (made,) = ask(app, "reconstruct", image=pictures.encode(wide))["result"]["images"]
  np.testing.assert_array_equal(read_png(made), mage.reconstruct(wide[None, :, 8:24])[0])


def test_images_in_a_prompt(images_as_words):
  app = server.App(images_as_words, "vilex")
  image = picture(size=(test_vilex.SIZE,) * 2)
  given = dict(images=[pictures.encode(image)], num_tokens=2)
  (made,) = ask(app, "generate", seed=4, **given)["result"]["images"]
  expected = images_as_words.generate(4, 1, images=[image], num_tokens=2)[0]
  np.testing.assert_array_equal(read_png(made), images.to_uint8(expected))
  assert "has 2 places {} for 1 image" in ask(app, "generate", prompt="{} on {}", **given)["error"]
  number = test_vilex.TOKENS + 1
  for wrong in (dict(given, num_tokens=number), dict(given, images=given["images"] * 9), dict(images=["a"])):
    assert Client(app).post("/generate", data=json.dumps(wrong), headers=JSON).status_code == 400


def test_classes_of_a_picture():
  objective = test_classify.build()
  model = model_of(objective, test_classify.make_parts(objective), classes=[*"abcdefghij"])
  wide = np.repeat(picture(), 2, axis=1)
  guesses = ask(server.App(model, "letters"), "classify", image=pictures.encode(wide))["result"]["guesses"]
  shares = model.classify(wide[None, :, 8:24])[0]
  assert [guess["name"] for guess in guesses] == ["abcdefghij"[i] for i in np.argsort(-shares)[:5]]
  np.testing.assert_allclose([guess["share"] for guess in guesses], -np.sort(-shares)[:5], rtol=1e-6)


def test_similar_pictures_of_a_folder(mage, tmp_path, caplog):
  (tmp_path / ".hidden").mkdir()
  for name, seed in (("a.png", 1), ("b.png", 2), (".hidden/c.png", 0)):
    images.write_png(tmp_path / name, picture(seed))
  (tmp_path / "damaged.png").write_bytes(b"\x89PNG")
  app = server.App(mage, "tiny", gallery=gallery.Gallery(mage, str(tmp_path)))
  assert "damaged.png cannot be read" in caplog.text and app.offered["methods"][-1] == "nearest"
  found = ask(app, "nearest", image=pictures.encode(picture(2)))["result"]["guesses"]
  assert [one["name"] for one in found] == ["b.png", "a.png"]
  np.testing.assert_array_equal(read_png(found[1]["image"]), picture(1))
  np.testing.assert_allclose(found[0]["share"], 1.0, rtol=1e-5)
  with pytest.raises(UserError, match="has no readable pictures"):
    gallery.Gallery(mage, str(tmp_path / "none"))


def test_errors_of_the_model_are_told_and_others_are_logged(mage, monkeypatch, caplog):
  app = server.App(mage, "tiny")
  for error, told in (
    (UserError("say less"), "say less"),
    (RuntimeError("secret"), "the server's log says why"),
  ):

    def fail(*_, error=error, **__):
      raise error

    monkeypatch.setattr(mage, "generate", fail, raising=False)
    assert told in ask(app, "generate")["error"]
  assert "secret" in caplog.text


# What each kind of model offers


def model_of(objective, variables=None, **config):
  return loading.find_class(objective)({"objective": {}, **config}, objective, variables or {})


OFFERS = {
  "tokenizer": (lambda: objectives.build(tiny.stage("tokenizer")["objective"]), "reconstruct", ""),
  "mage": (
    lambda: objectives.build(tiny.stage("mage")["objective"]),
    "generate trajectory inpaint reconstruct",
    "steps temperature",
  ),
  "mage_conditional": (
    test_mage_conditional.build,
    "generate trajectory inpaint reconstruct",
    "classes steps temperature guidance",
  ),
  "diffusion": (test_diffusion.build, "generate", "prompt negative_prompt steps guidance"),
  "vilex": (
    lambda: objectives.build(test_vilex.SECTION),
    "generate",
    "prompt negative_prompt images steps image_guidance text_guidance",
  ),
  "classify": (test_classify.build, "reconstruct classify", ""),
}


@pytest.mark.parametrize("kind", OFFERS)
def test_every_kind_of_model_offers_what_it_can(kind):
  build, methods, rest = OFFERS[kind]
  offered = abilities.describe(model_of(build()), kind)
  assert offered["methods"] == methods.split()
  conditions = [name for name in ("classes", "prompt", "negative_prompt", "images") if offered[name]]
  assert conditions + [option["name"] for option in offered["options"]] == rest.split()
  server.render(offered)


def test_names_of_classes_are_offered():
  model = model_of(test_mage_conditional.build(), classes=["cat", *"abcdefgh", "dog"])
  assert abilities.describe(model, "pets")["classes"][::9] == ["cat", "dog"]


def test_requests_that_share_a_program():
  served = abilities.Served(model := model_of(test_mage_conditional.build()), abilities.describe(model, ""))

  def program(**given):
    return abilities.read(served, "generate", given).program

  assert program(guidance=2.5, temperature=1.0) == program(guidance=3.0, temperature=4.0)
  for other in (dict(guidance=0.0), dict(guidance=2.5, label=1), dict(guidance=2.5, count=2)):
    assert program(**other) != program(guidance=2.5)
  assert program(steps=3) != program(steps=4)


def test_the_page_needs_nothing_else_and_no_name_leaves_its_place(mage):
  page = server.render(abilities.describe(mage, "</script><script>alert(1)//"))
  assert page.count("</script>") == 2 and "$$" not in page
  assert not {"http:", "https:", "src=", "@import"} & {*page.replace('src = "data', "").split()}


# What is refused


def post(body=b"{}", path="/generate", **headers):
  names = {name.replace("_", "-"): value for name, value in headers.items()}
  return dict(method="POST", path=path, data=body, headers={**JSON, **names})


def request(path="/generate", **fields):
  return post(json.dumps(fields).encode(), path)


def png(width, height):
  return pictures.encode(np.zeros((height, width, 3), np.uint8))


BOMB = "iVBORw0KGgoAAAANSUhEUgABhqAAAYagCAYAAACoUgvIAAAAAElEQVQ1rwYe"
DAMAGED = "iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAQAAAGvuPU5AAAAAklEQVRhAAAd51wAAAAAaUNDUKWJGT4="  # IndexError
SITE = "http://evil.example"
HOSTILE = {
  "another site's name for this machine": (403, post(Host="evil.example:8188")),
  "a name that only begins as a local one": (403, post(Host="localhost.evil.example")),
  "no name": (403, post(Host="")),
  "a name that is none": (403, post(Host="[::1")),
  "the page under another name": (403, dict(path="/", headers={"Host": "evil.example"})),
  "a script of another site": (403, post(Origin=SITE)),
  "a sandboxed frame": (403, post(Origin="null")),
  "another port of this machine": (403, post(Origin="http://localhost:9999")),
  "a request that a browser marks": (403, post(Sec_Fetch_Site="cross-site")),
  "a request of a neighbouring name": (403, post(Sec_Fetch_Site="same-site")),
  "a form": (415, post(b"count=1", Content_Type="application/x-www-form-urlencoded")),
  "text, which needs no preflight": (415, post(Content_Type="text/plain")),
  "a preflight": (403, dict(method="OPTIONS", path="/generate", headers={**LOCAL, "Origin": SITE})),
  "an image that asks": (405, dict(path="/generate", headers=LOCAL)),
  "a file": (404, dict(path="/../../etc/passwd", headers=LOCAL)),
  "a file of the package": (404, dict(path="/page.html", headers=LOCAL)),
  "a method of Python": (404, post(path="/__init__")),
  "a method that is not offered": (404, post(path="/call")),
  "no JSON": (400, post(b"{")),
  "no object": (400, post(b"[]")),
  "a deep nest": (400, post(b"[" * 200_000)),
  "a number that is none": (400, post(b'{"temperature": NaN}')),
  "bytes that are no text": (400, post(b"\xff\xfe")),
  "too many bytes": (413, post(b" " * (server.LARGEST + 1))),
  "too many pictures": (400, request(count=10**6)),
  "a negative number of pictures": (400, request(count=-1)),
  "a truth for a number": (400, request(count=True)),
  "a text for a number": (400, request(seed="0")),
  "too many steps": (400, request(steps=10**9)),
  "an option that is not offered": (400, request(order="random")),
  "a class of a model without": (400, request(label=0)),
  "a path": (400, request("/inpaint", **{**FILL, "image": "/etc/passwd"})),
  "an address": (400, request("/inpaint", **{**FILL, "image": "file:///etc/passwd"})),
  "a picture that is too large": (
    400,
    request("/inpaint", **{**FILL, "image": png(pictures.MOST_SIDE + 1, 1)}),
  ),
  "a damaged picture": (400, request("/inpaint", **{**FILL, "image": DAMAGED})),
  "a bomb": (400, request("/inpaint", **{**FILL, "image": BOMB})),
  "another format": (
    400,
    request("/inpaint", **{**FILL, "image": base64.b64encode(b"GIF89a" * 99).decode()}),
  ),
  "a hole of another size": (400, request("/inpaint", **{**FILL, "hole": png(3, 3)})),
  "no hole": (400, request("/inpaint", **{**FILL, "hole": png(*SIZE)})),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_refusals(closed, name):
  status, sent = HOSTILE[name]
  answer = Client(closed).open(**sent)
  assert answer.status_code == status
  assert "Access-Control-Allow-Origin" not in answer.headers
  error = json.loads(answer.text)["error"]
  assert error and not error.endswith(".")


def test_own_requests_reach_the_queue(closed):
  own = {**JSON, "Origin": "http://localhost:8188", "Sec-Fetch-Site": "same-origin"}
  for host in (own, {**JSON, "Host": "[::1]:8188"}, {**JSON, "Host": "127.0.0.1"}):
    answer = Client(closed).post("/generate", data="{}", headers=host)
    assert answer.status_code == 503 and "try again later" in answer.text
  page = Client(closed).get("/", headers={**LOCAL, "Sec-Fetch-Site": "cross-site"})  # a link to it
  assert page.status_code == 200 and "frame-ancestors 'none'" in page.headers["Content-Security-Policy"]


def test_other_addresses_need_the_token(mage):
  app = server.App(mage, "tiny", token="key", queue=Queue(most=0))
  there = {"Host": "gpu.example:8188"}
  statuses = [
    Client(app).get(path, headers=there).status_code for path in ("/", "/?token=kez", "/?token=key")
  ]
  assert statuses == [401, 401, 200]
  for shown, status in (("", 401), ("Bearer kez", 401), ("Bearer ké", 401), ("Bearer key", 503)):
    headers = {**JSON, **there, "Authorization": shown}
    assert Client(app).post("/generate?token=key", data="{}", headers=headers).status_code == status
  other = {**JSON, **there, "Authorization": "Bearer key", "Origin": SITE}
  assert Client(app).post("/generate", data="{}", headers=other).status_code == 403


# The queue


def test_requests_wait_for_each_other():
  queue, gate, done = Queue(most=3), threading.Event(), []

  def work(name):
    assert gate.wait(60)
    done.append(name)
    return {"name": name}

  first, second, third = (queue.submit(lambda name=name: work(name)) for name in "abc")
  with pytest.raises(TransientError, match="3 requests are waiting"):
    queue.submit(dict)
  while not first.running():
    pass
  following, abandoned = queue.follow(third), queue.follow(second)
  assert next(abandoned) == {"ahead": 1} and next(following) == {"ahead": 2}
  assert next(queue.follow(first)).keys() == {"seconds"}
  abandoned.close()  # its browser went away
  assert second.cancelled() and next(following) == {"ahead": 1}
  gate.set()
  assert [*following][-1] == {"result": {"name": "c"}} and done == ["a", "c"]


def test_a_queue_forgets_what_is_done_and_cancels_what_waits():
  queue, gate = Queue(), threading.Event()
  first = queue.submit(lambda: {"opened": gate.wait(60)})
  kept = weakref.ref(first)
  second = queue.submit(lambda: {"kept": kept() is not None})
  del first
  gate.set()
  assert second.result() == {"kept": False}
  gate.clear()
  third, fourth = queue.submit(lambda: {"opened": gate.wait(60)}), queue.submit(dict)
  while not third.running():
    pass
  queue.close()
  assert fourth.cancelled() and not third.done()
  gate.set()


# The server


@pytest.fixture
def address(app):
  """Where a real server of the model listens."""
  with server.listen("localhost", 0) as listener:
    listening = server.build(app, listener)
  thread = threading.Thread(target=listening.serve_forever, daemon=True)
  thread.start()
  yield f"http://localhost:{listening.port}/"
  listening.shutdown()
  thread.join()
  listening.server_close()


def test_the_server_streams(app, address):
  asked = urllib.request.Request(f"{address}generate", b'{"steps": 2, "temperature": 1.0, "count": 2}')
  asked.add_header("Content-Type", "application/json")
  direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
  with direct.open(asked) as answer:
    assert len(json.loads(answer.readlines()[-1])["result"]["images"]) == 2
  with pytest.raises(UserError, match="cannot listen there"):
    server.listen("localhost", int(address.rstrip("/").rpartition(":")[2]))


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6: `::` is not tested")
def test_all_addresses_include_those_of_ipv4():
  with server.listen("::", 0) as listener:
    socket.create_connection(("127.0.0.1", listener.getsockname()[1])).close()


def test_the_command(mage, monkeypatch, capsys):
  class Listening:
    port = 1

    def serve_forever(self):
      pass

  loaded = []
  monkeypatch.setattr(maskgen, "load", lambda path: loaded.append(path) or mage, raising=False)
  monkeypatch.setattr(server, "build", lambda *_: Listening())
  name = f"http://{socket.gethostname()}:1/?token="
  for host, expected in (("localhost", "http://localhost:1/ in"), ("0.0.0.0", name), ("", name)):
    demo.main(["--port=0", f"--host={host}"])
    assert expected in capsys.readouterr().out
  with socket.create_server(("localhost", 0)) as other, pytest.raises(UserError, match="cannot listen"):
    demo.main([f"--port={other.getsockname()[1]}"])
  assert loaded == ["emoji"] * 3
  with pytest.raises(UserError, match="--port=65536"):
    demo.main(["--port=65536"])


@pytest.mark.slow
@pytest.mark.skipif(browser.FOUND is None, reason="no Chromium: the page is not tested in a browser")
def test_the_page_in_a_browser(address, tmp_path):
  with browser.Browser(tmp_path) as page:
    page.open(address)
    page.wait("now && !running")  # it begins with pictures
    state = "({image: [...now.image.data], hole: [...now.hole]})"
    start = page.run(state)
    left, top, width, height = page.run(
      "(({left, top, width, height}) => [left, top, width, height])($('hole').getBoundingClientRect())"
    )

    def at(x, y):
      return left + x * width, top + y * height

    page.drag(at(0.6, 0.3), at(0.6, 0.7))
    painted = page.run(state)
    assert 10 < sum(painted["hole"]) < 128 and painted["image"] == start["image"]
    page.key("e")
    page.drag(at(0.6, 0.3), at(0.6, 0.4))
    assert 0 < page.run("now.hole.reduce((a, b) => a + b)") < sum(painted["hole"])
    page.key("z", modifiers=2)
    assert page.run(state) == painted
    page.key("Enter")
    page.wait("made?.method === 'inpaint' && !running")
    filled = page.run(state)
    before, after = (np.reshape(one["image"], (-1, 4)) for one in (start, filled))
    hole = np.array(painted["hole"], bool)
    assert (before[~hole] == after[~hole]).all() and (before[hole] != after[hole]).any()
    page.key("2")
    assert page.run("now.image === made.images[1]")
    page.run("made.old = true")
    page.key("r")
    page.wait("made && !made.old && !running")
    page.key("z", modifiers=2)
    page.key("z", modifiers=2)
    assert page.run(state) == painted
    page.key("Delete")
    page.wait("made?.body.grow && !running")
    x, y = page.run(
      "(({left, right, top, bottom}) => [(left + right) / 2, (top + bottom) / 2])"
      "(document.querySelector('.edge.right').getBoundingClientRect())"
    )
    page.drag((x, y), (x + width / 4, y), (x + width / 2, y))
    assert page.run("[now.image.width, now.hole.reduce((a, b) => a + b)]") == [24, 8 * 16]
    page.key("Enter")
    page.wait("made?.images[0].width === 24 && !running")
    page.key("g")
    page.wait("made?.method === 'generate' && !running")
    page.run("$('watch').click()")
    page.wait("made?.frames && $('frame').value == made.frames.length - 1")
    page.run("now.hole[0] = 1")
    page.key("2")
    assert not page.run("now.hole.some(Boolean)")
    page.key("z", modifiers=2)
    assert page.run("now.hole[0]")
    page.run(
      "document.body.dispatchEvent(new KeyboardEvent('keydown', {key: 'g', repeat: true, bubbles: true}))"
    )
    assert page.run("running === null && $('error').hidden")
