"""The rehearsal: presets and documented commands start on devices that are not there, or say why.

Every case goes through one process of 64 fake devices (tests/rehearse_program.py).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys

import pytest

from igpo_jax import cli
from igpo_jax.config import freeze, load_config_file
from igpo_jax.errors import UserError
from igpo_jax.rehearse import machine_for, missing_files
from igpo_jax.rehearse import main as command
from igpo_jax.train.costs import evaluations
from tests.paths import REPO

PRESETS = ("v5e-64", "v5p-32", "v5e-8", "gpu", "h100-1", "h100-8", "h100-16", "h200-1",
           "h100-8-full", "h100-16-full")  # fmt: skip
# A source for configs that take theirs by flag; a model that brings a vocabulary.
SOURCE = "--config.data.rl=synthetic:chains"
OTHERS = {
  "quickstart.py": [], "quickstart.py:smoke": [], "sft_tiny.py": [], "gsm8k_tiny.py": [],
  "stories.py": [],
  "llada_8b.py": [SOURCE, "--chip=h100", "--devices=8"],
  "illada_8b.py": [SOURCE, "--chip=h100", "--devices=8"],
  **{f"{file}.py:data,{hardware}": [] for file in ("dream_7b", "llada_moe")
     for hardware in ("v5e-64", "v5p-32", "h100-8")},
  **{f"a2d_gsm8k.py:data,{hardware}": [] for hardware in ("v5e", "v5e-8", "t4", "a100", "gpu-8")},
  "a2d_sft.py": ["--chip=h100", "--devices=8"],
}  # fmt: skip

# Lowering is what takes time. Presets that are not lowered have the programs of one that is, but
# for sizes, and for as many axes of the mesh or fewer (h100-8-full: h100-16-full).
LOWERED = {
  "llada_math": ("v5e-64", "v5e-8", "h100-1", "h100-8", "h100-16-full"),
  "sft_openr1": ("v5e-64", "gpu", "h100-8", "h100-8-full"),
}
# So do these; gsm8k_tiny.py has the quickstart's with the estimator of the others.
LIKE_ANOTHER = {
  "quickstart.py:smoke", "dream_7b.py:data,v5p-32", "llada_moe.py:data,v5p-32", "llada_8b.py",
  "a2d_gsm8k.py:data,v5e", "a2d_gsm8k.py:data,t4", "a2d_gsm8k.py:data,a100", "gsm8k_tiny.py",
}  # fmt: skip

# docs/launch.md: on how many GPUs each of its commands makes sense, one process a GPU beyond 8.
GPUS = (1, 8, 16, 32)
DOCUMENTED = {
  "configs/math500.py:data,gpu": GPUS,
  "configs/math500.py:data,h100-8": (8, 16, 32),
  "configs/math500.py:data,h100-16": (16, 32),
  "configs/math500.py:data,h100-16-full": (16, 32),
  "configs/math500.py:data,h100-1": (1, 8, 16),
  "configs/math500.py:data,h100-8-full": (8, 16, 32),
  "configs/quickstart.py": (1, 8),  # 16 prompts a step
  # On a TPU: as many chips as the slice has.
  "configs/math500.py:data,v5e-64": (),
  "configs/math500.py:data,v5p-32": (),
  "configs/math500.py:data,v5e-8": (),
}


PAGES = tuple(REPO / "docs" / name for name in ("one_gpu.md", "eight_gpus.md", "tpu_slice.md"))
BLOCK = re.compile(
  r"```bash\npython -m igpo_jax\.rehearse (--config[^\n]*)\n```\n\n```text\n(.*?)```", re.DOTALL
)


def shown(page):
  """What the documents show of a page: neither checkpoints nor what is missing here."""
  return page.partition("\ncheckpoints")[0].rstrip() + "\n"


def cases():
  """(name, words, whether the programs are lowered) of every case."""
  out = []
  for hardware in PRESETS:
    for file, lowered in LOWERED.items():
      words = [f"--config=configs/{file}.py:data,{hardware}"]
      out.append((f"{file} {hardware}", words, hardware in lowered))
    for file in ("math500", "gsm8k", "amc", "minerva"):  # llada_math's programs
      out.append((f"{file} {hardware}", [f"--config=configs/{file}.py:data,{hardware}"], False))
  for file, words in OTHERS.items():
    lowered = file not in LIKE_ANOTHER
    out.append((file, [f"--config=configs/{file}", *words], lowered))
  for config, counts in DOCUMENTED.items():
    for count in counts:
      words = [f"--config={config}", f"--devices={count}"]
      words += ["--chip=h100"] if "quickstart" in config else []
      out.append((f"{config} on {count}", words, False))
  for count in (1, 2, 4, 8, 16, 32):
    words = ["--config=configs/sft_openr1.py:data,gpu", f"--devices={count}"]
    out.append((f"sft gpu on {count}", words, False))
  for page in PAGES:
    for words, _ in BLOCK.findall(page.read_text()):
      out.append((words, shlex.split(words), True))
  refused = "--config=configs/math500.py:data,h100-8-full"
  out += [
    ("too few", [refused, "--devices=4"], False),
    ("too small", [refused, "--devices=1", "--config.mesh.devices=0"], False),
    ("uneven", ["--config=configs/math500.py:data,gpu", "--devices=3"], False),
    ("unshared", ["--config=configs/math500.py:data,gpu", "--devices=8", "--processes=3"], False),
    ("Slurm, 1 x 8", ["--config=configs/math500.py:data,gpu", "--devices=8", "--processes=8"],
     False),
  ]  # fmt: skip
  return out


def rehearse_all():
  done = subprocess.run(
    [sys.executable, "-m", "tests.rehearse_program"],
    input=json.dumps(cases()), text=True, capture_output=True, cwd=REPO, check=False,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


rehearsed = pytest.fixture(scope="module")(rehearse_all)


REFUSED = ("too few", "too small", "uneven", "unshared")


@pytest.mark.slow
def test_every_preset_and_every_documented_command_starts(rehearsed):
  failed = {k: v["error"] for k, v in rehearsed.items() if "error" in v and k not in REFUSED}
  assert not failed and len(rehearsed) == len(cases())


def test_every_config_of_the_repository_is_rehearsed():
  ours = {path.stem for path in (REPO / "configs").glob("*.py")}
  seen = {re.search(r"configs/(\w+)", " ".join(words))[1] for _, words, _ in cases()}
  assert ours == seen


def test_the_table_has_every_command_of_the_document():
  text = (REPO / "docs" / "launch.md").read_text()
  named = set(re.findall(r"--config=(configs/[\w/.]+(?::[\w,-]+)?)", text))
  assert named and named <= set(DOCUMENTED)


@pytest.mark.slow
def test_what_could_not_start_is_one_line_that_says_why(rehearsed):
  errors = {name: rehearsed[name]["error"] for name in REFUSED}
  assert "is sized for 8 devices, and there are 4" in errors["too few"]
  assert re.search(r"update needs about \d+\.\d GiB on each device", errors["too small"])
  assert "64 does not share out over 3 devices" in errors["uneven"]
  assert "8 device(s) cannot be shared by 3 process(es)" in errors["unshared"]


@pytest.mark.slow
def test_programs_for_gpus_and_tpus_have_fused_attention(rehearsed):
  programs = {"llada_math": {"rollout", "likelihood", "update"}, "sft_openr1": {"sft"}}
  for file, lowered in LOWERED.items():
    for hardware in lowered:
      kernels = rehearsed[f"{file} {hardware}"]["kernels"]
      assert set(kernels) == programs[file] and all(kernels.values()), (file, hardware, kernels)


@pytest.mark.slow
def test_the_page_fits_a_page_and_says_what_a_start_would(rehearsed):
  text = rehearsed["llada_math h100-8"]["page"]
  lines = text.partition("not here")[0].splitlines()
  assert len(lines) < 50 and max(map(len, lines)) <= 100
  for part in (
    "8 x NVIDIA H100 80GB HBM3", "nothing was run or measured", "rl.sample_slices=4",
    "335,544,320 (LoRA, rank 128)", "lowered for cuda", "GiB on each device, of 72.8 usable",
    "at 40% of 989 TFLOP/s", "rl: 200 steps", "evaluation gsm8k        1319 problems",
    "40 problems x 16", "a kill without notice loses at most",
  ):  # fmt: skip
    assert part in text, part
  assert "data.rl: data/MetaMathQA-395K.json: no such file; get " in text


@pytest.mark.slow
def test_hours_follow_from_flops_and_the_share_of_the_peak(rehearsed):
  """64 x 8 rows of 768 positions in 128 steps, by docs/scaling.md's formula and by the page."""
  page = rehearsed["llada_math h100-8-full"]["page"]
  (pflop, _, _, seconds, unit) = re.search(
    r"rl rollout +([\d.]+) +([\d.]+) (\w+) +([\d.]+) (\w+)", page
  ).groups()
  assert float(pflop) == pytest.approx(707, rel=0.01)
  expected = 707e15 / (8 * 989e12 * 0.4)
  assert float(seconds) * {"s": 1, "min": 60}[unit] == pytest.approx(expected, rel=0.02)


def test_processes_follow_from_the_devices_as_the_scripts_start_them():
  def of(hardware, devices=0):
    config = freeze(load_config_file(REPO / "configs" / "math500.py", f"data,{hardware}"))
    machine = machine_for(config, devices)
    return machine.platform, machine.devices, machine.processes

  assert of("gpu") == ("gpu", 1, 1) and of("gpu", 8) == ("gpu", 8, 1)
  assert of("h100-16") == ("gpu", 16, 16) and of("gpu", 32) == ("gpu", 32, 32)
  assert of("v5e-8") == ("tpu", 8, 1) and of("v5e-64") == ("tpu", 64, 16)
  assert of("v5p-32") == ("tpu", 16, 4)


def test_evaluations_are_counted():
  assert evaluations(200, 0, True) == 2
  assert evaluations(200, 50, True) == 5
  assert evaluations(200, 60, False) == 4
  assert evaluations(0, 50, True) == 1


def test_a_source_of_an_unknown_kind_is_a_mistake_and_a_missing_file_is_not():
  config = freeze(load_config_file(REPO / "configs" / "math500.py", "nowhere,gpu"))
  assert set(missing_files(config)) == {"data.rl", "data.eval math500", "init_from"}
  wrong = load_config_file(REPO / "configs" / "math500.py", "nowhere,gpu")
  wrong.data.rl = "tsv:x"
  with pytest.raises(UserError, match="tsv"):
    missing_files(freeze(wrong))


@pytest.mark.slow
def test_the_command_prints_a_page():
  options = ("--config=configs/math500.py:data,gpu", "--devices=2", "--nolower")
  done = subprocess.run(
    [sys.executable, "-m", "igpo_jax.rehearse", *options],
    text=True, capture_output=True, cwd=REPO, check=False,
  )  # fmt: skip
  assert done.returncode == 0 and done.stdout.startswith("configs/math500.py:data,gpu on 2 x"), done


def test_the_command_refuses_with_one_line_and_exit_2(monkeypatch, capsys):
  monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # the command adds devices to them
  monkeypatch.chdir(REPO)
  with pytest.raises(SystemExit) as end:
    cli.run(lambda: command(["--config=configs/math500.py:data,gpu", "--devices=3"]))
  said = capsys.readouterr()
  assert end.value.code == 2 and said.err.count("\n") == 1 and not said.out
  assert said.err.startswith("error: config: rl.prompts_per_step=64 does not share out")


@pytest.mark.slow
def test_the_documents_show_what_the_rehearsal_says(rehearsed):
  """`python -m tests.rehearse_test` writes the blocks anew."""
  for page in PAGES:
    blocks = BLOCK.findall(page.read_text())
    assert blocks, page
    for words, block in blocks:
      assert block == shown(rehearsed[words]["page"]), f"{page.name}: {words}"


if __name__ == "__main__":
  pages = rehearse_all()
  for path in PAGES:
    new = lambda match: match[0].replace(
      f"```text\n{match[2]}```", f"```text\n{shown(pages[match[1]]['page'])}```"
    )
    path.write_text(BLOCK.sub(new, path.read_text()))
