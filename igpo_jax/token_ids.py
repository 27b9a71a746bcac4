"""Token ids that a model has no embedding for, found before anything runs."""

from __future__ import annotations

from typing import Any

import numpy as np

from igpo_jax.errors import UserError


def check_ids(ids: Any, rows: int, what: str) -> None:
  """Checks that a model has an embedding for every token id.

  On the host: JAX fills what is past a table's end with NaN and raises no error.

  Args:
    ids: integers, an array of any shape.
    rows: of the embedding; ids are from 0 to rows - 1.
    what: has these ids, for the message.

  Raises:
    UserError: names the first id that has none.
  """
  ids = np.asarray(ids)
  wrong = ids[(ids < 0) | (ids >= rows)]
  if wrong.size:
    raise UserError(
      f"{what} has the token id {wrong[0]}, but the model's embedding has {rows} rows; is it the "
      "tokenizer of another model, or were tokens added without resizing the model?"
    )
