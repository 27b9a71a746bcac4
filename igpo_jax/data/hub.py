"""Reading datasets of the Hugging Face hub, or of a folder, with the library `datasets`.

The library is not installed with this package: `pip install datasets`.
"""

from __future__ import annotations

from collections.abc import Iterator

from igpo_jax.data.tables import Row, plain_value
from igpo_jax.errors import UserError


def read(
  path: str, name: str | None = None, split: str = "train", revision: str | None = None
) -> Iterator[Row]:
  """Yields the rows of one split, in their order.

  Args:
    path: NAME or OWNER/NAME on the hub, or a folder of data files.
    name: name of the dataset's configuration, if it has several.
    split: in the library's notation, slices included ("train[:100]").
    revision: branch, tag or commit on the hub.

  Raises:
    UserError: the library is missing, there is no such dataset or split, or it cannot be fetched.
  """
  if not path:
    raise UserError("hf: expected hf:OWNER/NAME?split=train, for example hf:openai/gsm8k?name=main")
  try:
    import datasets
  except ImportError as error:
    raise UserError(
      f"hf:{path} needs the library datasets: pip install datasets; or download the files and read"
      " them with jsonl: or parquet:"
    ) from error
  try:
    # Never with remote code: a dataset is data.
    table = datasets.load_dataset(path, name, split=split, revision=revision)
  except Exception as error:  # the library's, the hub's and the network's have no common base
    line = " ".join(str(error).split())[:300]
    raise UserError(f"hf:{path}: cannot be read ({type(error).__name__}: {line})") from error
  return ({key: plain_value(value) for key, value in row.items()} for row in table)
