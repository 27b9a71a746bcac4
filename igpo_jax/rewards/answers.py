"""Finding the answer in a completion, and the gold answer in a data set's field."""

from __future__ import annotations

END_OF_TEXT = ("<|endoftext|>", "<|eot_id|>", "<|eot|>", "</s>", "<|im_end|>", "<eos>",
               "<|end_of_text|>")


def truncate(text: str) -> str:
  """The text before its first end-of-text marker."""
  ends = [at for at in map(text.find, END_OF_TEXT) if at >= 0]
  return text[: min(ends)] if ends else text


def extract_marked(text: str, marker: str = "=>") -> str | None:
  """What follows the last `marker`, up to the end of its line; None without one."""
  head, found, tail = truncate(text).rpartition(marker)
  return tail.strip().split("\n")[0].strip() if found else None


def extract_boxed(text: str) -> str | None:
  r"""The content of the last \boxed{...} with its braces matched; None without one."""
  start = text.rfind("\\boxed{")
  if start < 0:
    return None
  depth = 0
  for at in range(start + len("\\boxed"), len(text)):
    depth += (text[at] == "{") - (text[at] == "}")
    if not depth:
      return text[start + len("\\boxed{"): at].strip()
  return None
