"""Builds the package; pyproject.toml describes it. What is here is what that file cannot say.

A wheel also holds the files of configs/, as igpo_jax/presets/, so that `--config=configs/X.py`
names something where there is no checkout (igpo_jax/flags.py).
"""

import pathlib

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
  """The package's modules, and beside them a copy of configs/."""

  def run(self):
    super().run()
    if self.editable_mode:  # the checkout itself is what is installed
      return
    target = pathlib.Path(self.build_lib, "igpo_jax", "presets")
    self.mkpath(str(target))
    for file in sorted(pathlib.Path("configs").glob("*.py")):
      self.copy_file(str(file), str(target / file.name))


setup(cmdclass={"build_py": BuildWithConfigs})
