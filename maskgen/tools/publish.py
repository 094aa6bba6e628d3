"""Publishes a model on the Hugging Face Hub: python -m maskgen.tools.publish --model=DIR --repo=OWNER/NAME"""

import json
import os
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from etils import epath

from maskgen import cli, files, hub

if TYPE_CHECKING:
  import maskgen

RESULTS, CARD = "results.json", "README.md"
_MOST_CLASSES = 20
# Sources whose argument is a path of this machine.
_LOCAL = ("folder", "tar", "parquet", "tokens")


def main(argv: Sequence[str]) -> None:
  """Parses the command line and publishes.

  Raises:
    UserError: if the model or the repository is wrong, or the Hub refuses.
  """
  parser = cli.Parser(
    "Uploads an export of a trained model to the Hugging Face Hub, with a model card from its config and "
    "results. maskgen.load('hf://OWNER/NAME@REVISION') loads it. It replaces the export and the README.md of "
    "an earlier upload, which stay in the repository's history. Needs the extra hub, and a token with the "
    "permission to write: 'hf auth login' or HF_TOKEN.",
    "python -m maskgen.tools.publish --model=runs/quickstart/mage --repo=me/digits --license=apache-2.0",
  )
  parser.add_model("workdir of a run, or an export")
  parser.add_argument(
    "--repo", required=True, help="OWNER/NAME on the Hub; it is created if it does not exist"
  )
  parser.add_argument("--private", action="store_true", help="create it so that only its owners see it")
  parser.add_argument("--license", help="identifier of a license, such as apache-2.0, for the card")
  parser.add_argument("--dtype", default="float32", choices=files.DTYPES, help="what float32 is stored as")
  args = parser.parse_args(argv)
  hub.check_name(args.repo, f"--repo={args.repo}")
  client = hub.module(f"--repo={args.repo}")

  import maskgen

  path = hub.local(args.model)
  model = maskgen.load(path)
  with tempfile.TemporaryDirectory() as folder:
    export = epath.Path(folder) / "export"
    model.save(export, dtype=args.dtype)
    results = _results(path)
    if results:
      files.replace(export / RESULTS, json.dumps(results, indent=2, sort_keys=True))
    _add_checksums(export)
    files.replace(export / CARD, card(model, args.repo, results, args.license))
    api = client.HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    with hub.errors(f"{hub.PREFIX}{args.repo}"):
      api.create_repo(args.repo, private=args.private, exist_ok=True)
      done = api.upload_folder(
        repo_id=args.repo,
        folder_path=os.fspath(export),
        commit_message="Upload a model",
        delete_patterns=hub.PARTS,  # of an earlier upload
      )
  print(f"published {hub.PREFIX}{args.repo}@{done.oid}")


def _results(path: epath.PathLike) -> dict[str, Any]:
  """The results of a model's run, if its folder has them; none for a step, as they are of the end."""
  from maskgen import storage

  folder, step = storage.locate(path)
  file = folder / RESULTS
  return files.read_json(file, "restore it from a copy") if step is None and file.exists() else {}


def _add_checksums(export: epath.Path) -> None:
  """Adds all other files to the manifest, which has the weights."""
  manifest = export / files.MANIFEST
  known = files.read_json(manifest, "")
  found = [file for file in pathlib.Path(export).rglob("*") if file.is_file()]
  names = {file.relative_to(export).as_posix(): file for file in found}
  others = {name: file.read_bytes() for name, file in names.items() if name not in (files.MANIFEST, *known)}
  files.replace(manifest, json.dumps(known | json.loads(files.make_manifest(others)), indent=2))


def card(model: "maskgen.Model", repo: str, results: Mapping[str, Any], license: str | None) -> str:  # noqa: A002
  """The model card, Markdown with the front matter of the Hub.

  Args:
    model: the model.
    repo: its name on the Hub.
    results: of its run, numbers by name, of one stage or by stage.
    license: an identifier, or None.
  """
  from maskgen import tree

  config, parameters = model.config, {**model.variables, "extra": {}}
  height, width, channels = model.objective.image_shape
  source, _, argument = str(config.get("data", {}).get("source", "")).partition(":")
  facts = {
    "kind": f"`{model.kind}`, loaded as `maskgen.serving.{type(model).__name__}`",
    "images": f"{height} x {width} pixels, {channels} channels",
    "parameters": f"{tree.count(parameters):,}",
    "preprocessing": f"`{files.hide_folders(model.preprocessing)}`",
    "classes": ", ".join((model.classes or ())[:_MOST_CLASSES]),
    "data": source if source in _LOCAL or "." in source or not argument else f"{source}:{argument}",
    "steps": f"{config['total_steps']:,} of {config['batch_size']}" if config.get("total_steps") else "",
    "seed": str(config.get("seed", "")),
    "maskgen": str(config.get("version", "")),
  }
  lines = ["---", "library_name: maskgen", *([f"license: {license}"] if license else [])]
  lines += ["tags:", "- maskgen", f"- {model.kind}", "---", "", f"# {repo.partition('/')[2]}", ""]
  lines += ["A model trained with maskgen:", "", "```python", "import maskgen", ""]
  lines += [f'model = maskgen.load("{hub.PREFIX}{repo}")', "print(model)", "```", "", "| | |", "|---|---|"]
  lines += ["| {} | {} |".format(name, value.replace("|", "\\|")) for name, value in facts.items() if value]
  numbers = {
    key: value
    for section in (results, *(part for part in results.values() if isinstance(part, Mapping)))
    for key, value in section.items()
    if isinstance(value, int | float) and "/" in key
  }
  if numbers:
    lines += ["", "## Results", "", "From the end of its run.", "", "| key | value |", "|---|---|"]
    lines += [f"| `{key}` | {value:.4g} |" for key, value in sorted(numbers.items())]
  objective = files.hide_folders(json.dumps(config["objective"], indent=2))
  lines += ["", "## Config", "", "```json", objective, "```", ""]
  return "\n".join(lines)


if __name__ == "__main__":
  cli.run(main)
