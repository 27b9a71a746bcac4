"""igpo COMMAND ...: the commands of this package under one name, once it is installed.

igpo train ...        is  python -m igpo_jax.main ...
igpo COMMAND ...      is  python -m igpo_jax.COMMAND ...
igpo configs [DIR]    lists the package's configs, or copies them to DIR
"""

from __future__ import annotations

import importlib
import pathlib
import shutil
import sys
from typing import NoReturn

from igpo_jax import __version__, cli
from igpo_jax.config.fields import meant
from igpo_jax.config.file import own_configs
from igpo_jax.errors import UserError

# command -> the module whose main() it is, and what it does
COMMANDS = {
  "train": ("main", "runs a config's stages: SFT, RL, evaluation"),
  "generate": ("generate", "answers prompts; hints show inpainting"),
  "chat": ("chat", "answers many prompts in one session"),
  "serve": ("serve.__main__", "an endpoint for OpenAI's clients, and a page to fill in answers"),
  "convert": ("convert.__main__", "Hugging Face weights to Orbax and back"),
  "grade": ("grade", "grades existing generations"),
  "report": ("report", "one HTML file of one or several runs"),
  "show": ("show", "the rollouts of a run in the terminal"),
  "replay": ("replay", "makes the rollout of a step again"),
  "rewrite": ("rewrite.__main__", "rewrites long traces into concise ones"),
  "lm_eval": ("lm_eval.__main__", "the LM Evaluation Harness with a model of this package"),
  "rehearse": ("rehearse", "checks whether a run could start on given devices"),
  "aot": ("aot", "compiles a config's programs for a TPU that is not here"),
}


def usage() -> str:
  """What `igpo --help` prints."""
  lines = [f"  {name:<10}{what}" for name, (_, what) in COMMANDS.items()]
  lines.append("  configs   lists the package's configs; with a folder, copies them there")
  return "\n".join(
    [f"igpo {__version__}: igpo COMMAND ...", "", *lines, "", "igpo COMMAND --help tells more."]
  )


def configs(words: list[str]) -> None:
  """`igpo configs [DIR]`.

  Raises:
    UserError: more than one word, or the folder holds one of the files already.
  """
  if len(words) > 1 or any(word.startswith("-") for word in words):
    raise UserError(f"igpo configs takes a folder, or nothing; not {' '.join(words)!r}")
  files = own_configs()
  if not words:
    print("\n".join(f"configs/{file.name}" for file in files))
    return
  folder = pathlib.Path(words[0])
  if there := [file.name for file in files if (folder / file.name).exists()]:
    raise UserError(f"igpo configs: {folder / there[0]} exists: nothing is overwritten")
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"igpo configs: {folder}: {error.strerror}") from error
  for file in files:
    shutil.copyfile(file, folder / file.name)
  cli.say(f"written: {len(files)} configs to {folder}")


def dispatch() -> int | None:
  """Runs the command that the process's command line names; returns its exit code."""
  name, words = next(iter(sys.argv[1:]), "--help"), sys.argv[2:]
  if name in ("--help", "-h", "help"):
    print(usage())
    return 0
  if name == "--version":
    print(__version__)
    return 0
  if name == "configs":
    return configs(words)
  if name not in COMMANDS:
    known = [*COMMANDS, "configs"]
    raise UserError(f"igpo: there is no command {name!r}{meant(name, known) or ' (see --help)'}")
  module = importlib.import_module(f"igpo_jax.{COMMANDS[name][0]}")
  return module.main(words)


def main() -> NoReturn:
  """The program `igpo`; what it returns to the shell: see `cli.run`."""
  cli.run(dispatch)


if __name__ == "__main__":
  main()
