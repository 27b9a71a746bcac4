"""TFDS builders for the mathematics datasets that people download as files.

The files are in MANUAL_DIR/NAME/, under the names that they have where they come from. Rows keep
their order and the fields that are used, unchanged; `formats` turns them into records.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from igpo_jax.data import formats, tables
from igpo_jax.errors import UserError


class FilesBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A dataset of rows in JSON or Parquet files. A subclass describes it by class attributes.

  Attributes:
    FILES: split -> glob pattern under MANUAL_DIR/NAME/.
    FORMAT: name in `formats.FORMATS`.
    TEXT: text fields; "" where a row has none.
    LISTS: fields that are lists, and their kind (str or bool).
  """

  VERSION = tfds.core.Version("1.0.0")
  FILES: ClassVar[dict[str, str]]
  FORMAT: ClassVar[str]
  TEXT: ClassVar[tuple[str, ...]]
  LISTS: ClassVar[dict[str, type]] = {}

  def _info(self) -> tfds.core.DatasetInfo:
    kinds = {str: tfds.features.Text(), bool: np.bool_}
    features = {name: tfds.features.Text() for name in self.TEXT}
    features |= {name: tfds.features.Sequence(kinds[kind]) for name, kind in self.LISTS.items()}
    return tfds.core.DatasetInfo(
      builder=self,
      description=type(self).__doc__,
      disable_shuffling=True,
      features=tfds.features.FeaturesDict(features),
    )

  @classmethod
  def check_files(cls, manual_dir: epath.Path) -> dict[str, list[epath.Path]]:
    """Finds the files of each split.

    Raises:
      UserError: one is missing; the message says where to get it and where to put it.
    """
    directory = epath.Path(manual_dir) / cls.name
    found = {split: sorted(directory.glob(pattern)) for split, pattern in cls.FILES.items()}
    missing = [pattern for split, pattern in cls.FILES.items() if not found[split]]
    if missing:
      raise UserError(
        f"tfds:{cls.name} needs {directory / missing[0]}, which is not there: get"
        f" {formats.FORMATS[cls.FORMAT].origin}, and put it in {directory}; or give another"
        f" parent of that folder with manual_dir="
      )
    return found

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
    found = self.check_files(dl_manager.manual_dir)
    return {split: self._generate_examples(files) for split, files in found.items()}

  def _generate_examples(self, files: list[epath.Path]) -> Iterator[tuple[int, dict[str, Any]]]:
    parquet = files[0].suffix == ".parquet"
    wanted = (*self.TEXT, *self.LISTS)
    rows = tables.read_parquet(files, wanted) if parquet else tables.read_json(files)
    for number, row in enumerate(rows):
      example: dict[str, Any] = {name: formats.answer_of(row, name) for name in self.TEXT}
      example |= {
        name: [kind(item) for item in row.get(name) or ()] for name, kind in self.LISTS.items()
      }
      yield number, example


def _instructions(name: str, file_format: str) -> str:
  return f"Put in MANUAL_DIR/{name}/: {formats.FORMATS[file_format].origin}."


class Metamathqa(FilesBuilder, skip_registration=True):
  """MetaMathQA: questions of GSM8K and MATH, rephrased and answered anew."""

  FILES: ClassVar = {"train": "MetaMathQA-395K.json"}
  FORMAT = "metamath"
  TEXT = ("query", "response", "type", "original_question")
  MANUAL_DOWNLOAD_INSTRUCTIONS = _instructions("metamathqa", "metamath")


class Openr1Math(FilesBuilder, skip_registration=True):
  """OpenR1-Math: problems with reference solutions and long verified generations."""

  VERSION = tfds.core.Version("1.1.0")  # 1.0.0 had two of the four lists
  FILES: ClassVar = {"train": "train-*.parquet"}
  FORMAT = "openr1"
  TEXT = ("uuid", "problem", "solution", "answer")
  LISTS: ClassVar = {
    "generations": str,
    "correctness_math_verify": bool,
    "correctness_llama": bool,
    "is_reasoning_complete": bool,
  }
  MANUAL_DOWNLOAD_INSTRUCTIONS = _instructions("openr1_math", "openr1")


class Math500(FilesBuilder, skip_registration=True):
  """MATH-500: the 500 held-out problems of the MATH dataset that are in common use."""

  FILES: ClassVar = {"test": "test.jsonl"}
  FORMAT = "math500"
  TEXT = ("unique_id", "problem", "solution", "answer")
  MANUAL_DOWNLOAD_INSTRUCTIONS = _instructions("math500", "math500")


class Amc23(FilesBuilder, skip_registration=True):
  """AMC 2023: 40 competition problems with numeric answers."""

  FILES: ClassVar = {"test": "test.jsonl"}
  FORMAT = "amc"
  TEXT = ("id", "problem", "answer")
  MANUAL_DOWNLOAD_INSTRUCTIONS = _instructions("amc23", "amc")


class MinervaMath(FilesBuilder, skip_registration=True):
  """Minerva: 272 undergraduate physics and chemistry problems with solutions."""

  FILES: ClassVar = {"test": "test.jsonl"}
  FORMAT = "minerva"
  TEXT = ("idx", "problem", "solution")
  MANUAL_DOWNLOAD_INSTRUCTIONS = _instructions("minerva_math", "minerva")
