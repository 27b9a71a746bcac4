"""The launch scripts: what they would do, what they do, and that they see a run through."""

from __future__ import annotations

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

from tests.launch_world import WORKERS, World
from tests.paths import REPO

if not (sys.platform == "linux" and shutil.which("git") and shutil.which("setsid")):
  pytest.skip("the workers are Linux machines: needs Linux, git, setsid", allow_module_level=True)

TPU = {"IGPO_PROJECT": "proj", "IGPO_ZONE": "zone-a", "IGPO_NAME": "pod"}
ALL = {**TPU, "IGPO_SLICE": "v5e-64", "IGPO_WORKDIR": "gs://bucket/run"}
PROGRAM = ("--", "--config=configs/math500.py:data,v5e-64", "--config.seed=1")
SCRIPTS = ("create", "install", "run", "status", "logs", "stop", "fetch", "delete", "resume")


@pytest.fixture
def make_world(tmp_path):
  worlds = []

  def make(plan=("wait",)):
    worlds.append(World(tmp_path / f"world{len(worlds)}", plan))
    return worlds[-1]

  yield make
  for world in worlds:
    world.close()


@pytest.fixture
def world(make_world):
  return make_world()


def call(script, world, *args, **settings):
  """Runs a script of launch/tpu, with the program's arguments where it takes any."""
  program = PROGRAM if script in ("run", "resume") else ()
  return world.launch(f"tpu/{script}.sh", *args, *program, **settings)


def shown(done):
  """The words of every command that a dry run printed."""
  lines = [line for line in done.stdout.splitlines() if not line.startswith("#")]
  assert lines and all(line.startswith("+ ") for line in lines), done.stdout
  return [shlex.split(line)[1:] for line in lines]


def until(condition, seconds=20):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, "it did not happen"
    time.sleep(0.02)


def one_line_error(done, *words):
  assert done.returncode == 2, done
  assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
  assert all(word in done.stderr for word in words), done.stderr


@pytest.mark.slow
def test_shellcheck_finds_nothing():
  shellcheck = shutil.which("shellcheck") or shutil.which(
    "shellcheck", path=str(pathlib.Path(sys.executable).parent)
  )
  if shellcheck is None:
    pytest.skip("shellcheck is not installed; the extra [test] brings it")
  files = sorted([*(REPO / "launch").rglob("*.sh"), REPO / "launch" / "slurm.sbatch"])
  assert len(files) == len(SCRIPTS) + 4
  subprocess.run([shellcheck, "-x", "-P", str(REPO), *map(str, files)], cwd=REPO, check=True)


SAYS = {
  "create": ["gcloud compute tpus queued-resources create pod", "v5litepod-64", "--zone=zone-a",
             "v2-alpha-tpuv5-lite", "--node-id=pod", "--project=proj"],
  "install": ["git", "archive", "scp", "--worker=all", "worker.sh install"],
  "run": ["--worker=all", "start gs://bucket/run --config=configs/math500.py:data,v5e-64"],
  "status": ["queued-resources describe pod", "tpu-vm describe pod", "worker.sh state"],
  "logs": ["--worker=0", "tail", "run.log"],
  "stop": ["--worker=all", "worker.sh stop"],
  "fetch": ["gcloud storage rsync gs://bucket/run", "--exclude=^checkpoints/"],
  "delete": ["gcloud compute tpus queued-resources delete pod", "--force", "--quiet"],
  "resume": ["queued-resources create", "worker.sh install", "worker.sh start",
             "queued-resources delete"],
}  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_tells_all_and_does_nothing(world, script):
  world.tell("forbidden")
  before = sorted(world.folder.rglob("*"))
  done = call(script, world, "--dry-run", **ALL)
  assert done.returncode == 0 and done.stderr == ""
  for words in SAYS[script]:
    assert words in done.stdout
  assert world.calls() == []
  assert sorted(world.folder.rglob("*")) == before
  shown(done)


def without_gcloud(folder):
  """A PATH with what the scripts need and nothing else."""
  tools = folder / "tools"
  tools.mkdir()
  for tool in ("bash", "env", "awk", "basename", "cat", "dirname", "grep", "sed", "git"):
    (tools / tool).symlink_to(shutil.which(tool))
  return str(tools)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_needs_no_gcloud_and_a_real_one_says_so(world, tmp_path, script):
  path = without_gcloud(tmp_path)
  assert call(script, world, "--dry-run", path=path, **ALL).returncode == 0
  one_line_error(call(script, world, path=path, **ALL), "gcloud is not installed")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_the_script_and_the_settings(world, script):
  done = world.launch(f"tpu/{script}.sh", "--help")
  assert done.returncode == 0
  assert f"launch/tpu/{script}.sh" in done.stdout and "IGPO_PROJECT" in done.stdout
  assert "shellcheck" not in done.stdout


NEEDS = [(script, name) for script in SCRIPTS for name in TPU]
NEEDS += [("create", "IGPO_SLICE"), ("resume", "IGPO_SLICE")]
NEEDS += [(script, "IGPO_WORKDIR") for script in ("run", "fetch", "resume")]


@pytest.mark.parametrize(("script", "name"), NEEDS)
@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_a_missing_setting_is_one_line_and_exit_2(world, script, name, dry):
  settings = {key: value for key, value in ALL.items() if key != name}
  done = call(script, world, *dry, **settings)
  if name == "IGPO_SLICE":
    name = "IGPO_ACCELERATOR"
  one_line_error(done, name)
  assert world.calls() == []


@pytest.mark.parametrize(
  ("script", "args", "word"),
  [
    ("create", ["--slice=v9-3"], "v9-3"),
    ("create", ["--wiat"], "--wiat"),
    ("create", ["--follow"], "--follow"),
    ("run", ["--workdir=runs/here", *PROGRAM], "gs://"),
    ("run", [], "--config"),
    ("run", ["--", "--config=x", "--workdir=gs://other"], "--workdir"),
    ("run", ["--", "--config=x", "--distributed"], "--distributed"),
    ("resume", ["--max-crashes=many", *PROGRAM], "many"),
    ("resume", [], "--config"),
    ("install", ["--data=here"], "gs://"),
    ("install", ["--ref=no_such_commit"], "no_such_commit"),
    ("logs", ["--lines=ten"], "ten"),
  ],
)
def test_a_mistake_is_one_line_and_exit_2(world, script, args, word):
  one_line_error(world.launch(f"tpu/{script}.sh", *args, **ALL), word)
  assert world.calls() == []


@pytest.mark.parametrize(
  ("slice_", "accelerator", "runtime"),
  [
    ("v5e-64", "v5litepod-64", "v2-alpha-tpuv5-lite"),
    ("v5e-8", "v5litepod-8", "v2-alpha-tpuv5-lite"),
    ("v5p-32", "v5p-32", "v2-alpha-tpuv5"),
    ("v6e-8", "v6e-8", "v2-alpha-tpuv6e"),
    ("v4-8", "v4-8", "tpu-ubuntu2204-base"),
  ],
)
def test_a_slice_is_an_accelerator_and_its_runtime(world, slice_, accelerator, runtime):
  settings = {**ALL, "IGPO_SLICE": slice_}
  (queued,) = shown(call("create", world, "--dry-run", **settings))
  assert f"--accelerator-type={accelerator}" in queued and f"--runtime-version={runtime}" in queued
  (direct,) = shown(call("create", world, "--dry-run", "--direct", "--spot", **settings))
  assert direct[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "create"]
  assert f"--version={runtime}" in direct and "--spot" in direct and "--spot" not in queued


@pytest.mark.slow
def test_what_is_done_is_what_the_dry_run_showed(world):
  """The life of a TPU, command by command; only looking at states comes on top."""
  steps = [("create", "--wait"), ("install", "--data=gs://bucket/data"), ("run",), ("logs",),
           ("stop",), ("fetch",), ("delete",)]  # fmt: skip
  promised = []
  for script, *args in steps:
    promised += shown(call(script, world, "--dry-run", *args, **ALL))
  for script, *args in steps:
    done = call(script, world, *args, **ALL)
    assert done.returncode == 0, done
    if script == "run":
      until(lambda: len(list(world.folder.glob("waiting_*"))) == WORKERS)
  promised = [words[1:] for words in promised if words[0] == "gcloud" and "describe" not in words]
  # The workers call gcloud, too: they fetch the data and leave their logs.
  of_workers = [
    c for c in world.calls() if c[0] == "storage" and c[1:3] != ["rsync", ALL["IGPO_WORKDIR"]]
  ]
  done = [c for c in world.calls() if c not in of_workers and "describe" not in c]
  assert done == promised
  assert sorted(c[1] for c in of_workers) == ["cp"] * WORKERS + ["rsync"] * WORKERS
  assert {c[-1] for c in of_workers if c[1] == "cp"} == {
    f"gs://bucket/run/logs/worker{k}.log" for k in range(WORKERS)
  }


@pytest.mark.slow
def test_the_programs_arguments_arrive_as_given(world):
  odd = ["--config=configs/math500.py:a dir", "--config.x=it's", '--config.y="$HOME" * ;', "--z="]
  call("create", world, "--wait", **ALL)
  call("install", world, **ALL)
  done = world.launch("tpu/run.sh", "--", *odd, **ALL)
  assert done.returncode == 0, done
  until(lambda: all(world.starts(k) for k in range(WORKERS)))
  for k in range(WORKERS):
    assert world.starts(k) == [["--distributed", "--workdir=gs://bucket/run", *odd]]


@pytest.mark.slow
def test_a_program_that_runs_is_not_started_twice_and_saves_when_stopped(world):
  call("create", world, "--wait", **ALL)
  call("install", world, **ALL)
  assert "none" in call("status", world, **ALL).stdout
  call("run", world, **ALL)
  until(lambda: len(list(world.folder.glob("waiting_*"))) == WORKERS)
  again = call("run", world, **ALL)
  assert again.stdout.count("already running") == WORKERS
  assert call("status", world, **ALL).stdout.count(" running") == WORKERS
  done = call("stop", world, **ALL)
  assert done.stdout.count(" stopped") == WORKERS
  assert len(list(world.folder.glob("saved_*"))) == WORKERS
  assert [len(world.starts(k)) for k in range(WORKERS)] == [1] * WORKERS


@pytest.mark.slow
def test_a_machine_that_goes_down_leaves_the_programs_exit_code(world):
  """A shut-down ends all processes at once; the one that watches has to be the last."""
  call("create", world, "--wait", **ALL)
  call("install", world, **ALL)
  call("run", world, **ALL)
  until(lambda: len(list(world.folder.glob("waiting_*"))) == WORKERS)
  for pid in world.folder.glob("worker*/igpo_run/pid"):
    os.killpg(int(pid.read_text()), signal.SIGTERM)
  until(lambda: call("status", world, **ALL).stdout.count(" exit 143") == WORKERS)
  assert len(list(world.folder.glob("saved_*"))) == WORKERS


@pytest.mark.slow
def test_uncommitted_changes_are_told_and_stay_here(world):
  call("create", world, "--wait", **ALL)
  (world.repo / "new.txt").write_text("x")
  assert "uncommitted" in call("install", world, **ALL).stderr
  assert not (world.folder / "worker0" / "igpo_jax" / "new.txt").exists()


UP = ["queued-resources create", "tpu-vm scp", "ssh install", "ssh start"]


@pytest.mark.slow
def test_resume_goes_on_after_a_preemption(make_world):
  """The same command with the same workdir, on a TPU made anew; then it is deleted."""
  world = make_world(plan=["wait", 0])
  world.tell("preempt_at_look", "4")
  done = call("resume", world, "--spot", "--delete-when-done", **ALL)
  assert done.returncode == 0, done.stderr
  deleted = "queued-resources delete"
  actions = [a for a in world.actions() if not a.startswith("storage")]
  assert actions == [*UP, deleted, *UP, deleted]
  first, second = world.starts(0)
  assert first == second == ["--distributed", "--workdir=gs://bucket/run", *PROGRAM[1:]]
  assert not (world.folder / "queue").exists()
  creates = [c for c in world.calls() if "create" in c]
  assert creates[0] == creates[1] and "--spot" in creates[0]


@pytest.mark.slow
def test_resume_installs_the_same_commit_after_a_preemption(make_world):
  world = make_world(plan=["wait", 0])
  world.tell("preempt_at_look", "4")
  world.tell("commit_at_start")
  done = call("resume", world, **ALL)
  assert done.returncode == 0, done.stderr
  lines = [line for line in done.stderr.splitlines() if "installs commit" in line]
  assert len(lines) == 2 and len(set(lines)) == 1


@pytest.mark.slow
def test_resume_starts_again_what_was_interrupted_on_a_living_tpu(make_world):
  world = make_world(plan=[143, 0])
  assert call("resume", world, **ALL).returncode == 0
  assert [a for a in world.actions() if not a.startswith("storage")] == [*UP, "ssh start"]
  assert (world.folder / "queue").exists()  # not asked to delete it


@pytest.mark.slow
def test_resume_gives_up_on_a_program_that_crashes(make_world):
  world = make_world(plan=[1])
  done = call("resume", world, "--max-crashes=3", **ALL)
  assert done.returncode == 1 and "costs" in done.stderr
  assert len(world.starts(0)) == 3


@pytest.mark.slow
def test_resume_gives_up_on_an_installation_that_fails(world):
  world.tell("no_packages")
  done = call("resume", world, "--max-crashes=2", **ALL)
  assert done.returncode == 1 and "costs" in done.stderr
  assert world.actions().count("ssh install") == 2 and world.starts(0) == []


@pytest.mark.slow
def test_resume_ends_at_once_at_a_mistake_in_the_arguments(make_world):
  world = make_world(plan=[2])
  done = call("resume", world, **ALL)
  assert done.returncode == 2 and "costs" in done.stderr
  assert len(world.starts(0)) == 1


@pytest.mark.slow
def test_resume_ends_when_the_run_was_stopped(world):
  call("create", world, "--wait", **ALL)
  call("install", world, **ALL)
  call("run", world, **ALL)
  until(lambda: len(list(world.folder.glob("waiting_*"))) == WORKERS)
  call("stop", world, **ALL)
  done = call("resume", world, **ALL)
  assert done.returncode == 0 and "was stopped" in done.stderr
  assert len(world.starts(0)) == 1


def test_resume_ends_when_the_request_failed(world):
  world.tell("queue", "FAILED")
  done = call("resume", world, **ALL)
  assert done.returncode == 1 and "failed" in done.stderr
  assert world.actions() == []


@pytest.mark.slow
def test_gcloud_out_of_reach_is_not_taken_for_no_tpu(world):
  """Creating beside, or believing deleted, what still costs would be the worst answers."""
  world.tell("unreachable")
  assert "unknown" in call("status", world, **ALL).stdout
  assert call("delete", world, **ALL).returncode != 0
  with pytest.raises(subprocess.TimeoutExpired):
    subprocess.run(
      ["bash", str(world.repo / "launch/tpu/resume.sh"), *PROGRAM],
      env={**os.environ, **ALL, "PATH": f"{world.bin}:/usr/bin:/bin", "IGPO_POLL": "0.05",
           "FAKE_WORLD": str(world.folder), "FAKE_WORKERS": "2"},
      capture_output=True, timeout=2, stdin=subprocess.DEVNULL,
    )  # fmt: skip
  assert not any("create" in call for call in world.calls())


def test_deleting_nothing_is_fine(world):
  done = call("delete", world, **ALL)
  assert done.returncode == 0 and "no pod" in done.stderr
  assert world.actions() == []


DOCS = (REPO / "docs" / "launch.md").read_text()
DOCUMENTED = re.findall(r"^(launch/tpu/.*|bash launch/slurm.*)$", DOCS, re.MULTILINE)


def test_the_documents_name_files_that_exist():
  for text in (DOCS, (REPO / "README.md").read_text()):
    names = set(re.findall(r"\blaunch/[\w/]+\.\w+", text))
    assert names
    for name in names:
      assert (REPO / name).is_file(), name
  assert len(DOCUMENTED) >= 10


@pytest.mark.parametrize("line", DOCUMENTED)
def test_the_commands_of_the_documents_work_with_their_settings(world, line):
  block = DOCS.partition("# pod.env\n")[2].partition("```")[0]
  settings = dict(w.split("=", 1) for w in block.replace("export", "").split())
  words = shlex.split(line, comments=True)
  words = [w for w in words if w not in ("bash", "--dry-run")]
  done = world.launch(words[0].removeprefix("launch/"), "--dry-run", *words[1:], **settings)
  assert done.returncode == 0, done
  assert shown(done)


def test_one_gpu(world):
  done = world.launch("gpu.sh", "--dry-run", "--config=configs/quickstart.py", "--workdir=a b")
  assert done.returncode == 0
  *_, last = shown(done)
  assert last == [".venv/bin/python", "-m", "igpo_jax.main", "--config=configs/quickstart.py",
                  "--workdir=a b"]  # fmt: skip
  assert any(".[cuda]" in words for words in shown(done))
  assert not (world.repo / ".venv").exists()
  one_line_error(world.launch("gpu.sh"), "--config")


def environment_of(world, *packages, gpu=True):
  """A .venv in the repository that records what is done with it."""
  binary = world.repo / ".venv" / "bin"
  binary.mkdir(parents=True)
  for package in packages:
    (world.repo / ".venv" / "lib" / "python3.11" / "site-packages" / package).mkdir(parents=True)
  note = f'echo "$(basename "$0") $*" >> {world.folder}/done'
  looks = f'case "$1" in -c) {"exit 0" if gpu else "exit 1"} ;; esac'
  for name in ("python", "pip"):
    (binary / name).write_text(f"#!/bin/sh\n{note}\n{looks}\n")
    (binary / name).chmod(0o755)
  return lambda: (world.folder / "done").read_text().splitlines()


def test_an_environment_without_the_cuda_plugin_gets_it(make_world):
  """README's first command makes .venv without: everything would run on the CPU, unnoticed."""
  run = ("gpu.sh", "--config=configs/quickstart.py")
  world = make_world()
  done_with = environment_of(world, "jax")
  assert world.launch(*run).returncode == 0
  assert [line.split()[0] for line in done_with()] == ["pip", "python", "python"]
  assert "install" in done_with()[0] and ".[cuda]" in done_with()[0]
  world = make_world()
  done_with = environment_of(world, "jax", "jax_cuda12_plugin")
  assert world.launch(*run).returncode == 0
  assert [line.split()[0] for line in done_with()] == ["python", "python"]
  assert done_with()[-1] == "python -m igpo_jax.main --config=configs/quickstart.py"
  # A dry run says what would be done here.
  dry = shown(world.launch("gpu.sh", "--dry-run", run[1]))
  assert not any(".[cuda]" in words for words in dry)


def test_a_machine_without_a_gpu_is_told(world):
  done_with = environment_of(world, "jax", "jax_cuda12_plugin", gpu=False)
  one_line_error(world.launch("gpu.sh", "--config=configs/quickstart.py"), "finds no GPU")
  assert len(done_with()) == 1


def test_slurm_refuses_an_environment_without_the_cuda_plugin(world):
  environment_of(world, "jax")
  world.program("srun", f"#!/bin/sh\ntouch {world.folder}/started\n")
  job = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(world.repo)}
  one_line_error(world.launch("slurm.sbatch", *JOB, **job), "CUDA", ".[cuda]")
  assert not (world.folder / "started").exists()


JOB = ("--config=configs/math500.py", "--workdir=shared/run")


def test_slurm_starts_a_process_a_gpu(world):
  done = world.launch("slurm.sbatch", "--dry-run", *JOB)
  (words,) = shown(done)
  assert words[0] == "srun" and words[-3:] == ["--distributed", *JOB]
  text = (REPO / "launch" / "slurm.sbatch").read_text()
  assert "#SBATCH --gpus-per-node=8\n#SBATCH --ntasks-per-node=8\n" in text
  one_line_error(world.launch("slurm.sbatch", JOB[0]), "--workdir")
  one_line_error(world.launch("slurm.sbatch", JOB[1]), "--config")
  one_line_error(world.launch("slurm.sbatch", *JOB), "sbatch")


@pytest.mark.parametrize(("code", "again"), [(0, False), (143, True), (1, False), (2, False)])
def test_slurm_queues_a_job_again_that_was_told_to_stop(world, code, again):
  world.program("srun", f"#!/bin/sh\npwd > {world.folder}/where\nexit {code}\n")
  world.program("scontrol", f'#!/bin/sh\necho "$@" > {world.folder}/scontrol\n')
  done = world.launch(
    "slurm.sbatch", *JOB, SLURM_JOB_ID="7", SLURM_SUBMIT_DIR=str(world.repo)
  )  # fmt: skip
  assert done.returncode == code
  assert (world.folder / "where").read_text().strip() == str(world.repo)
  told = world.folder / "scontrol"
  assert told.exists() == again and (not again or told.read_text() == "requeue 7\n")
