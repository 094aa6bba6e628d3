"""Models on the Hugging Face Hub, by a stand-in that answers the routes of its HTTP interface."""

import base64
import hashlib
import http.server
import importlib
import json
import re
import shutil
import sys
import threading

import numpy as np
import pytest
import tiny
from etils import epath
from test_errors import assert_clear

import maskgen
from maskgen import cli, hub, storage, tree
from maskgen.errors import TransientError, UserError
from maskgen.storage import assets
from maskgen.tools import publish
from maskgen.training import pretrained

TOKEN = "hf_secret"


class Hub(http.server.ThreadingHTTPServer):
  """Repositories with commits, Git LFS, private ones, and a status with which it fails.

  `asked` has the paths of all requests for names and contents.
  """

  def __init__(self):
    super().__init__(("127.0.0.1", 0), Handler)
    self.address = f"http://127.0.0.1:{self.server_port}"
    self.private: dict[str, bool] = {}
    self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
    self.blobs: dict[str, bytes] = {}
    self.failing = 0
    self.asked: list[str] = []

  def files(self, name, revision):
    commits = self.commits[name]
    return next(((oid, files) for oid, files in reversed(commits) if revision in (oid, "main")), None)

  def add(self, name, files, deleted=()):
    before = dict(self.commits[name][-1][1]) if self.commits[name] else {}
    for path in deleted:
      del before[path]
    oid = hashlib.sha1(f"{name} {len(self.commits[name])}".encode()).hexdigest()
    self.commits[name].append((oid, before | files))
    return oid


class Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  server: Hub

  def log_message(self, *args):
    pass

  def answer(self, content, code=200, **headers):
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    self.send_response(code)
    for name, value in {"Content-Length": len(data), **headers}.items():
      self.send_header(name.replace("_", "-"), str(value))
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(data)

  def refuse(self, code, kind):
    self.answer({"error": kind}, code, X_Error_Code=kind, X_Error_Message=kind)

  def may(self, name):
    known = name in self.server.commits
    return known and (not self.server.private[name] or self.headers.get("Authorization") == f"Bearer {TOKEN}")

  def do_GET(self):
    path = self.path.partition("?")[0]
    self.server.asked.append(path)
    if self.server.failing:
      self.refuse(self.server.failing, "Broken")
    elif found := re.fullmatch(r"/api/models/(\w+/\w+)/(revision|tree)/(\w+)", path):
      name, kind, revision = found.groups()
      if not self.may(name):
        self.refuse(401, "RepoNotFound")
      elif (commit := self.server.files(name, revision)) is None:
        self.refuse(404, "RevisionNotFound")
      elif kind == "revision":
        siblings = [{"rfilename": file} for file in commit[1]]
        self.answer({"id": name, "sha": commit[0], "siblings": siblings})
      else:
        oids = {file: hashlib.sha1(data).hexdigest() for file, data in commit[1].items()}
        entries = [(file, len(data), oids[file]) for file, data in commit[1].items()]
        self.answer([{"type": "file", "path": f, "size": size, "oid": oid} for f, size, oid in entries])
    elif found := re.fullmatch(r"/(\w+/\w+)/resolve/(\w+)/(.+)", path):
      name, revision, file = found.groups()
      if not self.may(name):
        self.refuse(401, "RepoNotFound")
        return
      oid, files = self.server.files(name, revision)
      etag = hashlib.sha1(files[file]).hexdigest()
      self.answer(files[file], X_Repo_Commit=oid, ETag=f'"{etag}"')
    else:
      self.refuse(404, "NotFound")

  do_HEAD = do_GET  # noqa: N815

  def do_PUT(self):
    oid = self.path.rpartition("/")[2]
    self.server.blobs[oid] = self.rfile.read(int(self.headers["Content-Length"]))
    self.answer(b"")

  def do_POST(self):
    body = self.rfile.read(int(self.headers["Content-Length"])).decode()
    if self.headers.get("Authorization") != f"Bearer {TOKEN}":
      self.refuse(401, "Unauthorized")
    elif self.path == "/api/validate-yaml":
      known = "license: nothing" not in json.loads(body)["content"]
      self.answer(
        {"errors": [] if known else [{"message": "no such license"}], "warnings": []}, 200 if known else 400
      )
    elif self.path == "/api/repos/create":
      given = json.loads(body)
      name = f"{given['organization']}/{given['name']}"
      if name in self.server.commits:
        self.answer({"url": f"{self.server.address}/{name}"}, 409)
        return
      self.server.private[name] = given.get("visibility") == "private" or bool(given.get("private"))
      self.server.commits[name] = []
      self.server.add(name, {".gitattributes": b""})
      self.answer({"url": f"{self.server.address}/{name}"})
    elif found := re.fullmatch(r"/api/models/(\w+/\w+)/preupload/main", self.path):
      paths = [file["path"] for file in json.loads(body)["files"]]
      modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
      self.answer({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})
    elif re.fullmatch(r"/\w+/\w+.git/info/lfs/objects/batch", self.path):
      objects = json.loads(body)["objects"]
      for each in objects:
        each["actions"] = {"upload": {"href": f"{self.server.address}/upload/{each['oid']}"}}
      self.answer({"transfer": "basic", "objects": objects})
    elif found := re.fullmatch(r"/api/models/(\w+/\w+)/commit/main", self.path):
      files, deleted = {}, []
      for line in map(json.loads, body.splitlines()):
        value = line["value"]
        if line["key"] == "file":
          files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
          files[value["path"]] = self.server.blobs[value["oid"]]
        elif line["key"] == "deletedFile":
          deleted.append(value["path"])
      oid = self.server.add(found[1], files, deleted)
      url = f"{self.server.address}/{found[1]}/commit/{oid}"
      self.answer({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})
    else:
      self.refuse(404, "NotFound")


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
  constants = pytest.importorskip(
    "huggingface_hub.constants", reason="huggingface_hub is not installed: no test of the Hub"
  )
  monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
  for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
    monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv(name.lower(), raising=False)
  server = Hub()
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  monkeypatch.setenv("HF_ENDPOINT", server.address)
  monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
  monkeypatch.setenv("HF_TOKEN", TOKEN)
  yield server
  server.shutdown()
  server.server_close()
  thread.join()


def test_a_published_model_is_loaded_by_its_address(stand_in, tmp_path, monkeypatch, capsys):
  flags = ["--model=digits", "--repo=me/digits"]
  publish.main([*flags, "--private", "--license=apache-2.0"])
  first = re.search(r"published (hf://me/digits@[0-9a-f]{40})", capsys.readouterr().out)[1]
  _, (oid, files) = stand_in.commits["me/digits"]
  parts = {"config.json", "weights.safetensors", "manifest.json", "results.json"}
  assert files.keys() == parts | {"README.md", ".gitattributes"}
  assert parts - {"manifest.json"} == json.loads(files["manifest.json"]).keys()
  card = files["README.md"].decode()
  assert card.startswith("---\nlibrary_name: maskgen\nlicense: apache-2.0\ntags:\n- maskgen\n- mage\n---\n")
  assert "| images | 16 x 16 pixels, 3 channels |" in card and "| `probe/top1` | 0.95 |" in card
  stand_in.add("me/digits", {"code/earlier.py": b"", "assets/0/words.txt": b"", "mine.txt": b""})
  publish.main([*flags, "--dtype=float16"])
  assert stand_in.commits["me/digits"][-1][1].keys() == files.keys() | {"mine.txt"}
  ours, theirs = maskgen.load("digits"), maskgen.load(first)
  tiny.assert_same_bits(ours.variables, theirs.variables)
  assert theirs.preprocessing == ours.preprocessing and theirs.folder.name == oid
  stand_in.asked.clear()
  assert maskgen.load("hf://me/digits").folder.name == stand_in.commits["me/digits"][-1][0] != oid
  assert stand_in.asked.count("/api/models/me/digits/revision/main") == 1  # a branch may move
  stand_in.failing = 501  # what is in the cache needs no Hub
  np.testing.assert_array_equal(maskgen.load(first).generate(batch=2), ours.generate(batch=2))
  monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "other"))
  with pytest.raises(TransientError) as error:
    maskgen.load("hf://me/digits")
  assert_clear(error)


def test_what_the_hub_does_not_have(stand_in, tmp_path, monkeypatch):
  stand_in.private |= {"me/a": True, "me/b": False}
  stand_in.commits |= {"me/a": [], "me/b": []}
  stand_in.add("me/b", {"config.json": b"{}", "weights.safetensors": b""})
  monkeypatch.setenv("HF_TOKEN", "hf_other")
  for address, message in (
    ("hf://me/none", "hf://me/none does not exist, or is private: .* 'hf auth login' or set HF_TOKEN"),
    ("hf://me/a", "hf://me/a does not exist, or is private"),
    ("hf://me/b@v2", "hf://me/b@v2 has no such revision: give a commit, tag or branch"),
    ("hf://me/b", "hf://me/b has no manifest.json, so is not an export of maskgen"),
    ("hf://me", "hf://me: give owner/name"),
  ):
    with pytest.raises(UserError, match=message) as error:
      maskgen.load(address)
    assert_clear(error)
  monkeypatch.setenv("HF_TOKEN", TOKEN)
  with pytest.raises(UserError, match=r"the Hub refuses hf://me/b .*no such license") as error:
    publish.main(["--model=digits", "--repo=me/b", "--license=nothing"])
  assert_clear(error)
  monkeypatch.setenv("HF_TOKEN", "hf_other")
  with pytest.raises(UserError, match="hf://me/c is refused by the Hub: log in") as error:
    publish.main(["--model=digits", "--repo=me/c"])
  assert_clear(error)


@pytest.fixture
def files(stand_in, tmp_path):
  """The files of an export; `me/b` is an empty repository."""
  folder = tmp_path / "export"
  maskgen.load("digits").save(folder)
  publish._add_checksums(epath.Path(folder))
  stand_in.private["me/b"], stand_in.commits["me/b"] = False, []
  return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_changed_file_is_noticed(stand_in, files):
  stand_in.add("me/b", files | {"config.json": files["config.json"] + b" "})
  with pytest.raises(
    UserError, match=r"config\.json is damaged .*: remove .* from the cache and load"
  ) as error:
    maskgen.load("hf://me/b")
  assert_clear(error)
  stand_in.add("me/b", files | {"weights.safetensors": files["weights.safetensors"][:-1] + b"?"})
  with pytest.raises(UserError, match=r"weights\.safetensors is damaged"):
    maskgen.load("hf://me/b")
  manifest = json.loads(files["manifest.json"])
  for name in ("../../../other", "/dev/zero", "code/missing.py"):
    stand_in.add("me/b", files | {"manifest.json": json.dumps(manifest | {name: {}}).encode()})
    with pytest.raises(UserError, match=f"manifest.json is damaged .*'{name}' is not a file") as error:
      maskgen.load("hf://me/b")
    assert_clear(error)


def test_assets_stay_in_their_folder(tmp_path):
  (tmp_path / "assets").mkdir()
  for path in ("../../etc", "/etc"):
    index = {"bpe:words": {"before": "bpe:", "path": path}}
    (tmp_path / "assets" / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index.json is damaged \(.* is not in its folder\)") as error:
      assets.use_assets({}, epath.Path(tmp_path))
    assert_clear(error)


def test_copies_stand_for_whole_paths_that_are_gone(tmp_path):
  (tmp_path / "assets").mkdir()
  index = {
    f"{tmp_path}/sd": {"before": "", "path": "0"},
    f"{tmp_path}/sd/merges": {"before": "", "path": "1"},
  }
  (tmp_path / "assets" / "index.json").write_text(json.dumps(index))
  texts = ["{}", "ops|tokenize('bpe:{}', 77)", "bpe:{}/vocab", "tar:{}|x", "a({},{})"]
  others = ["folder:{}_pictures", "{}_clip", "/old{}", "{}.tar"]
  gone, copy = f"{tmp_path}/sd", f"{tmp_path}/assets/0"
  config = {"texts": [text.replace("{}", gone) for text in (*texts, *others)], "more": f"{gone}/merges"}
  found = assets.use_assets_if_gone(config, epath.Path(tmp_path))
  assert found["texts"][: len(texts)] == [text.replace("{}", copy) for text in texts]
  assert found["texts"][len(texts) :] == config["texts"][len(texts) :]
  assert found["more"] == f"{tmp_path}/assets/1"


def test_tools_trust_the_code_of_a_published_model(stand_in, files, monkeypatch):
  stand_in.add("me/b", files | {"code/of_the_hub.py": b"ANSWER = 42"})
  monkeypatch.delitem(sys.modules, "of_the_hub", raising=False)
  parser = cli.Parser("", "")
  parser.add_model("")
  parser.parse_args(["--model=hf://me/b"])
  with pytest.raises(ImportError):
    importlib.import_module("of_the_hub")
  parser.parse_args(["--model=hf://me/b", "--trust_code"])
  assert importlib.import_module("of_the_hub").ANSWER == 42


def test_a_hub_that_cannot_be_reached(stand_in, monkeypatch):
  def find(address):
    config = {"objective": {"tokenizer": {"name": "pretrained"}}, "pretrained": {"tokenizer": address}}
    return pretrained.complete(config)

  monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{tiny.free_port()}")
  for read in (maskgen.load, storage.find_section, find):
    with pytest.raises(TransientError, match="in the cache, and the Hub cannot be reached: conn") as error:
      read("hf://me/digits")
    assert_clear(error)
  with pytest.raises(TransientError, match=r"cannot be reached for hf://me/a .*: start again") as error:
    publish.main(["--model=digits", "--repo=me/a"])
  assert_clear(error)


def test_a_busy_hub_is_asked_again_later(stand_in):
  from huggingface_hub import HfApi

  for status, kind in ((408, TransientError), (429, TransientError), (400, UserError), (503, TransientError)):
    stand_in.failing = status
    with pytest.raises(UserError) as error, hub.errors("hf://me/a"):
      HfApi(endpoint=stand_in.address).model_info("me/a")
    assert type(error.value) is kind, status
    assert_clear(error)


def test_a_card_is_a_table_without_folders_of_this_machine():
  model = maskgen.load("digits")
  model.config = model.config | {
    "classes": ["a|b", "c"],
    "data": {
      "source": "my.pictures:/home/me/secret",
      "eval_preprocess": "decode(3)|tokenize('bpe:/home/me/a', 4)",
    },
    "objective": model.config["objective"] | {"text_tokenizer": "bpe:/home/me/a", "folder": "~/me/b/"},
  }
  count = tree.count(model.variables)
  model.variables = model.variables | {"extra": {"steps": np.zeros(7)}}
  card = publish.card(model, "me/digits", {}, None)
  assert "| classes | a\\|b, c |" in card and "| data | my.pictures |" in card and f"| {count:,} |" in card
  assert "| preprocessing | `decode(3)\\|tokenize('bpe:a', 4)` |" in card
  assert (
    '"text_tokenizer": "bpe:a"' in card
    and '"folder": "b"' in card
    and "me/" not in card.replace("me/digits", "")
  )


def test_the_results_of_a_run_are_not_those_of_a_step(tmp_path):
  (tmp_path / "results.json").write_text('{"probe/top1": 0.5}')
  assert publish._results(tmp_path) == {"probe/top1": 0.5}
  assert publish._results(tmp_path / "checkpoints" / "20") == {}


def test_without_the_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  for act in (lambda: maskgen.load("hf://me/a"), lambda: publish.main(["--model=digits", "--repo=me/a"])):
    with pytest.raises(UserError, match=r"needs huggingface_hub .*: pip install 'maskgen\[hub\]'") as error:
      act()
    assert_clear(error)
  with pytest.raises(UserError, match="--repo=digits: give owner/name") as error:
    publish.main(["--model=digits", "--repo=digits"])
  assert_clear(error)


def test_a_loaded_model_is_saved(tmp_path):
  model = maskgen.load("digits")
  model.save(tmp_path / "export")
  shutil.move(tmp_path / "export", tmp_path / "elsewhere")
  other = maskgen.load(tmp_path / "elsewhere")
  tiny.assert_same_bits(other.variables, model.variables)
  assert other.preprocessing == model.preprocessing == "decode(3)|resize(16)"
  with pytest.raises(UserError, match="is not an empty folder"):
    model.save(tmp_path / "elsewhere")
