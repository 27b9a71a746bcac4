"""Reading TFDS datasets by name, preparing them first if necessary. Does not need TensorFlow.

The datasets of `BUILDERS` are made from files that the user has downloaded. Any other name is a
dataset of TFDS, which downloads it by itself.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

from etils import epath

from igpo_jax.data.builders import math_files
from igpo_jax.data.names import one_name
from igpo_jax.data.tables import Row, plain_value
from igpo_jax.errors import UserError

BUILDERS = {
  one_name(builder.name): builder
  for builder in (
    math_files.Metamathqa,
    math_files.Openr1Math,
    math_files.Math500,
    math_files.Amc23,
    math_files.MinervaMath,
  )
}


def format_of(name: str) -> str:
  """The format (`formats.FORMATS`) of a dataset's rows."""
  if one_name(name) in BUILDERS:
    return BUILDERS[one_name(name)].FORMAT
  return "gsm8k" if name == "gsm8k" else "plain"


def read(
  name: str, split: str, data_dir: str | None = None, manual_dir: str | None = None
) -> Iterator[Row]:
  """Yields the rows of a dataset, which is prepared if it is not yet.

  Args:
    name: one of `BUILDERS`, another name of its data set (`data.names`), or a dataset of TFDS.
    split: in TFDS's notation, slices included ("train[:100]").
    data_dir: folder of prepared datasets; None is TFDS's default.
    manual_dir: folder of the downloaded files; None is `data_dir`/downloads/manual.

  Raises:
    UserError: an unknown name or split, a missing file, or no network.
  """
  builder = _prepared(name, data_dir, manual_dir)
  try:
    source = builder.as_data_source(split=split)
  except ValueError as error:
    raise UserError(
      f"tfds:{name} has no split {split!r}: it has {', '.join(sorted(builder.info.splits))}"
    ) from error
  return (plain_value(source[k]) for k in range(len(source)))


def _prepared(name: str, data_dir: str | None, manual_dir: str | None) -> Any:
  import tensorflow_datasets as tfds

  ours = BUILDERS.get(one_name(name))
  if ours:
    builder = ours(data_dir=data_dir, file_format="array_record")
  else:
    builder = _library_builder(name, data_dir)
  if (builder.data_path / "dataset_info.json").exists():
    return builder
  config = tfds.download.DownloadConfig()
  if ours:
    directory = manual_dir or epath.Path(builder.data_dir_root) / "downloads" / "manual"
    config.manual_dir = epath.Path(directory)
    builder.check_files(config.manual_dir)
  try:
    builder.download_and_prepare(download_config=config)
  except OSError as error:
    raise UserError(f"tfds:{name} cannot be prepared in {builder.data_dir}: {error}") from error
  return builder


def _library_builder(name: str, data_dir: str | None) -> Any:
  import tensorflow_datasets as tfds

  # Importing its module is what makes the library know a dataset.
  with contextlib.suppress(ImportError):
    importlib.import_module(f"tensorflow_datasets.text.{name}")
  try:
    return tfds.builder(name, data_dir=data_dir, file_format="array_record")
  except (tfds.core.DatasetNotFoundError, ValueError) as error:
    raise UserError(
      f"no TFDS dataset {name!r}: of this package there are"
      f" {', '.join(sorted(BUILDERS))}, of TFDS for example gsm8k"
    ) from error
