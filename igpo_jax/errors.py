"""The one error that a user is meant to read."""

from __future__ import annotations


class UserError(ValueError):
  """A mistake that the user can mend; its text is the one line they will read.

  A command prints it as `error: TEXT` and exits with code 2 (`cli.run`). The text says what is
  wrong, where, and what to do.
  """
