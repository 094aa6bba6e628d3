"""Models on the Hugging Face Hub, by a stand-in that answers the routes of its HTTP interface."""

import base64
import hashlib
import http.server
import json
import re
import shutil
import sys
import threading

import numpy as np
import pytest
import tiny
from test_errors import assert_clear

import maskgen
from maskgen import hub, pretrained
from maskgen.errors import TransientError, UserError
from maskgen.tools import publish

TOKEN = "hf_secret"


class Hub(http.server.ThreadingHTTPServer):
  """Repositories with commits, Git LFS, private ones, and a switch that makes it fail."""

  def __init__(self):
    super().__init__(("127.0.0.1", 0), Handler)
    self.address = f"http://127.0.0.1:{self.server_port}"
    self.private: dict[str, bool] = {}
    self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
    self.blobs: dict[str, bytes] = {}
    self.failing = False

  def files(self, name, revision):
    commits = self.commits[name]
    return next(((oid, files) for oid, files in reversed(commits) if revision in (oid, "main")), None)

  def add(self, name, files):
    before = self.commits[name][-1][1] if self.commits[name] else {}
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
    if self.server.failing:
      self.refuse(500, "Broken")
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
      files = {}
      for line in map(json.loads, body.splitlines()):
        value = line["value"]
        if line["key"] == "file":
          files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
          files[value["path"]] = self.server.blobs[value["oid"]]
      oid = self.server.add(found[1], files)
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
  (oid, files), *_ = stand_in.commits["me/digits"]
  assert files.keys() == {"config.json", "weights.safetensors", "manifest.json", "results.json", "README.md"}
  assert files.keys() - {"README.md", "manifest.json"} == json.loads(files["manifest.json"]).keys()
  card = files["README.md"].decode()
  assert card.startswith("---\nlibrary_name: maskgen\nlicense: apache-2.0\ntags:\n- maskgen\n- mage\n---\n")
  assert "| images | 16 x 16 pixels, 3 channels |" in card and "| `probe/top1` | 0.95 |" in card
  publish.main([*flags, "--half"])
  ours, theirs = maskgen.load("digits"), maskgen.load(first)
  tiny.assert_same_bits(ours.variables, theirs.variables)
  assert theirs.preprocessing == ours.preprocessing and theirs.folder.name == oid
  assert pretrained.find("hf://me/digits").name == stand_in.commits["me/digits"][1][0] != oid
  stand_in.failing = True  # what is in the cache needs no Hub
  np.testing.assert_array_equal(maskgen.load(first).generate(batch=2), ours.generate(batch=2))
  monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "other"))
  with pytest.raises(TransientError) as error:
    maskgen.load(first)
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


def test_a_changed_file_is_noticed(stand_in, tmp_path):
  folder = tmp_path / "export"
  maskgen.load("digits").save(folder)
  publish._add_checksums(hub.epath.Path(folder))
  files = {file.name: file.read_bytes() for file in folder.iterdir()}
  stand_in.private["me/b"], stand_in.commits["me/b"] = False, []
  stand_in.add("me/b", files | {"config.json": files["config.json"] + b" "})
  with pytest.raises(
    UserError, match=r"config\.json is damaged .*: remove .* from the cache and load"
  ) as error:
    maskgen.load("hf://me/b")
  assert_clear(error)
  stand_in.add("me/b", files | {"weights.safetensors": files["weights.safetensors"][:-1] + b"?"})
  with pytest.raises(UserError, match=r"weights\.safetensors is damaged"):
    maskgen.load("hf://me/b")


def test_a_hub_that_cannot_be_reached(stand_in, monkeypatch):
  monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{tiny.free_port()}")
  with pytest.raises(TransientError, match="not in the cache, and the Hub cannot be reached: conn") as error:
    maskgen.load("hf://me/digits")
  assert_clear(error)


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
