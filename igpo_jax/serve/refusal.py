"""What a client is told when a request is not answered, in the form that OpenAI's clients read."""

from __future__ import annotations

from typing import Any

KINDS = {
  401: "authentication_error",
  404: "not_found_error",
  429: "rate_limit_error",
  500: "server_error",
  503: "server_error",
  504: "timeout_error",
}


class Refusal(Exception):
  """A request that is not answered.

  Args:
    status: HTTP's number for the reason.
    message: one line for the client.
    param: the field of the request that is at fault; None if it is none.
    code: a name for programs, such as "context_length_exceeded"; None for none.
  """

  def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
    super().__init__(message)
    self.status, self.message, self.param, self.code = status, message, param, code

  def as_json(self) -> dict[str, Any]:
    """The body of the answer."""
    return {
      "error": {
        "message": " ".join(self.message.split())[:2000],
        "type": KINDS.get(self.status, "invalid_request_error"),
        "param": self.param,
        "code": self.code,
      }
    }
