"""Finding the answer in a completion, and the gold answer in a data set's field.

The rule of every protocol that does not say otherwise (`find_answer`), on the text
before its first end-of-text marker:

1. the last `\\boxed{...}` or `\\fbox{...}`, braces matched; one that never closes
   ends at its line's end or at a closing tag. An empty box is no answer, and nothing
   else is looked for.
2. without a box: what is inside the last `<answer>`, closed or not.
3. without a tag: what follows the last `#### `.
4. without that: what follows the last "The answer is".

The last number of a text is never taken unless the caller asks for it by name.
"""

from __future__ import annotations

import collections
import re

END_OF_TEXT = (
  "<|endoftext|>",
  "<|eot_id|>",
  "<|eot|>",
  "<|end_of_text|>",
  "<|im_end|>",
  "<|end|>",
  "<eos>",
  "<end_of_turn>",
  "</s>",
)
RULES = ("boxed", "tag", "hashes", "phrase", "last_number")
DEFAULT_RULES = ("boxed", "tag", "hashes", "phrase")

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])[ \t]*")
_BARE_BOX = re.compile(r"(?<![A-Za-z\\])boxed[ \t]*(?=\{)")
_PHRASE = re.compile(r"\b(?:the|final) answer is[ \t]*:?[ \t]*", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?\$?(?:[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?|\.[0-9]+)%?")


def truncate(text: str) -> str:
  """The text before its first end-of-text marker."""
  ends = [at for at in map(text.find, END_OF_TEXT) if at >= 0]
  return text[: min(ends)] if ends else text


def extract_marked(text: str, marker: str = "=>") -> str | None:
  """What follows the last `marker`, up to the end of its line; None without one."""
  _, found, tail = truncate(text).rpartition(marker)
  return tail.strip().split("\n")[0].strip() if found else None


def _last(pattern: re.Pattern, text: str) -> re.Match | None:
  found = collections.deque(pattern.finditer(text), maxlen=1)
  return found[0] if found else None


def _line(text: str) -> str:
  """The first line of a loose answer, up to a closing tag, less its closing dot."""
  text = text.lstrip(" \t").split("\n", 1)[0].split("</", 1)[0].strip()
  return text[:-1].rstrip() if text.endswith(".") else text


def _group(text: str, start: int) -> str:
  """The group that the brace at `start` opens; an escaped brace is a character."""
  depth, at = 0, start
  while at < len(text):
    char = text[at]
    if char == "\\":
      at += 1
    elif char == "{":
      depth += 1
    elif char == "}":
      depth -= 1
      if not depth:
        return text[start + 1 : at].strip()
    at += 1
  return _line(text[start + 1 :])


def extract_boxed(text: str) -> str | None:
  r"""The content of the last box: "7" for `\boxed{7}`, `\boxed 7` and an unclosed `\boxed{7`.

  Returns:
    None without a box, "" for an empty one.
  """
  last = _last(_BOX, text)
  if last is None:
    return None
  if text[last.end() : last.end() + 1] == "{":
    return _group(text, last.end())
  token = re.match(r"-?[0-9][0-9.,]*|\S", text[last.end() : last.end() + 100])
  return token.group().rstrip(".,") if token else ""


def extract_tag(text: str, tag: str = "answer") -> str | None:
  """What is inside the last `<tag>`; it may lack its end. None without one, or if blank.

  A box whose backslash was lost ("boxed{7}") is opened.
  """
  _, found, tail = text.rpartition(f"<{tag}>")
  inside = tail.split(f"</{tag}", 1)[0].strip()
  if not found or not inside:
    return None
  bare = _last(_BARE_BOX, inside)
  return _group(inside, bare.end()) if bare else inside


def _hashes(text: str) -> str | None:
  _, found, tail = text.rpartition("#### ")
  return _line(tail) if found else None


def _phrase(text: str) -> str | None:
  last = _last(_PHRASE, text)
  return _line(text[last.end() :]) if last else None


def _last_number(text: str) -> str | None:
  numbers = _NUMBER.findall(text)
  return numbers[-1] if numbers else None


_FINDERS = {
  "boxed": extract_boxed,
  "tag": extract_tag,
  "hashes": _hashes,
  "phrase": _phrase,
  "last_number": _last_number,
}


def find_answer(completion: str, rules: tuple[str, ...] = DEFAULT_RULES) -> str | None:
  """The final answer of a completion by the first of `rules` that applies.

  Args:
    completion: raw text; it is cut at its first end-of-text marker.
    rules: names out of `RULES`, in order of preference.

  Returns:
    The answer; "" for an empty box, None where no rule applies.
  """
  text = truncate(completion)
  for rule in rules:
    found = _FINDERS[rule](text)
    if found is not None:
      return found
  return None


def gold_answer(field: object) -> str:
  """The gold answer in a data set's answer field.

  GSM8K's "... #### 72" gives "72", AMC's 27.0 gives "27", a solution gives its last
  box, anything else is the answer itself.
  """
  if isinstance(field, bool) or not isinstance(field, (str, int, float)):
    raise ValueError(f"an answer is text or a number, not {type(field).__name__}: {field!r:.80}")
  if isinstance(field, float) and field.is_integer():
    return str(int(field))
  if not isinstance(field, str):
    return repr(field)
  boxed = extract_boxed(field)
  if boxed is not None:
    return boxed
  _, found, tail = field.rpartition("####")
  return (tail if found else field).strip()
