"""Where compiled programs are kept between runs, and what happens where they cannot be."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys

import jax
import pytest

from igpo_jax.config import Config
from igpo_jax.errors import UserError
from igpo_jax.parallel.compile_cache import cache_folder, cpu_name, use_cache
from igpo_jax.train.workdir import open_workdir
from tests.paths import REPO

PROGRAM = """
import sys, jax, jax.numpy as jnp
from igpo_jax.parallel.compile_cache import use_cache
print(use_cache(*sys.argv[1:]))
hits = []
jax.monitoring.register_event_listener(
  lambda event, **_: event == "/jax/compilation_cache/cache_hits" and hits.append(event))
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8))).block_until_ready()
print(len(hits))
"""


def run_program(*arguments, **environment):
  """(folder in use, programs read from it, what was said) of a fresh process."""
  env = {k: v for k, v in os.environ.items() if "COMPILATION_CACHE" not in k}
  env |= {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", **environment}
  done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], cwd=REPO, env=env,
                        capture_output=True, text=True)  # fmt: skip
  assert done.returncode == 0, done.stderr
  folder, hits = done.stdout.split()
  return folder, int(hits), done.stderr


@pytest.mark.slow
def test_a_second_process_reads_the_programs_of_the_first(tmp_path):
  folder, hits, _ = run_program(XDG_CACHE_HOME=str(tmp_path))
  assert folder == str(tmp_path / "igpo_jax" / "xla" / cpu_name()) and hits == 0
  assert os.listdir(folder)
  assert run_program(XDG_CACHE_HOME=str(tmp_path))[1] > 0


@pytest.mark.slow
def test_jaxs_own_variable_wins_and_off_is_off(tmp_path):
  own = str(tmp_path / "own")
  assert run_program(JAX_COMPILATION_CACHE_DIR=own, XDG_CACHE_HOME=str(tmp_path))[0] == own
  assert os.listdir(own)
  folder, hits, _ = run_program("off", JAX_COMPILATION_CACHE_DIR=own)
  assert (folder, hits) == ("None", 0)
  assert os.listdir(tmp_path) == ["own"]


def test_a_folder_that_cannot_be_written_is_said_in_one_line(tmp_path):
  (tmp_path / "file").write_text("")
  folder, _, said = run_program(str(tmp_path / "file"))
  assert folder == "None"
  assert re.fullmatch(r"compiled programs are not kept: .*file.*\n", said)


def test_tests_keep_nothing_in_the_users_folder():
  own = os.environ["IGPO_TEST_CACHE"]
  assert use_cache() == jax.config.jax_compilation_cache_dir == own
  assert str(cache_folder()) not in own


def test_no_setting_at_all_is_told():
  with pytest.raises(UserError, match="compilation_cache"):
    use_cache("")


def test_a_run_may_go_on_with_another_folder(tmp_path):
  open_workdir(tmp_path, Config(stages=()))
  (tmp_path / "metrics.jsonl").write_text('{"stage": "init", "step": 0}\n')
  open_workdir(tmp_path, dataclasses.replace(Config(stages=()), compilation_cache="off"))
