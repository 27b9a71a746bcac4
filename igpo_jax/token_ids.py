"""A check for token ids outside a model's embedding, made before anything runs."""

from __future__ import annotations

from typing import Any

import numpy as np

from igpo_jax.errors import UserError


def check_ids(ids: Any, rows: int, what: str) -> None:
  """Checks that a model has an embedding for every token id.

  It is done on the host, since JAX raises no error: a lookup past the table's end gives NaN.

  Args:
    ids: integers, an array of any shape.
    rows: rows of the embedding; valid ids are 0 to rows - 1.
    what: the text that the ids belong to, for the message, such as "the prompt".

  Raises:
    UserError: an id is outside the embedding; the message names the first one.
  """
  ids = np.asarray(ids)
  wrong = ids[(ids < 0) | (ids >= rows)]
  if wrong.size:
    raise UserError(
      f"{what} has the token id {wrong[0]}, but the model's embedding has {rows} rows; is it the "
      "tokenizer of another model, or were tokens added without resizing the model?"
    )
