"""Finds the answer in a completion, and the gold answer in a field of a data set.

The default rules (`find_answer`, `DEFAULT_RULES`). They look at the text before its first
end-of-text marker, and the first rule that finds something decides:

1. "boxed": the content of the last `\\boxed{...}` or `\\fbox{...}`, with braces matched. A box
   that never closes ends at the end of its line or at a closing tag. Boxes in a row, such as
   "\\boxed{2} and \\boxed{3}", are one list. A box that is empty, or only mentioned ("as \\boxed
   asks"), is passed over. If all boxes are empty, there is no answer, and the other rules are
   not tried.
2. "tag": the content of the last `<answer>`, whether it is closed or not.
3. "hashes": what follows the last `####`.
4. "phrase": what follows the last "The answer is", on its line or on the next.

The rule "last_number", the last number of the text, is used only if the caller names it. Every
pattern here takes linear time: they run in the caller's process, on whole completions.
"""

from __future__ import annotations

import collections
import math
import re

# What ends a model's turn in the chat templates of current model families.
END_OF_TEXT = (
  "<|endoftext|>",
  "<|eot_id|>",
  "<|eom_id|>",
  "<|eot|>",
  "<|end_of_text|>",
  "<|im_end|>",
  "<|end|>",
  "<|return|>",
  "<|eos|>",
  "<eos>",
  "[eos]",
  "<eod>",
  "<|eod|>",
  "<end_of_turn>",
  "<turn|>",
  "<|end_of_turn|>",
  "<|endofturn|>",
  "<|end_of_turn_token|>",
  "<|role_end|>",
  "<end_of_utterance>",
  "<\uff5cend\u2581of\u2581sentence\uff5c>",
  "<|end_of_sentence|>",
  "<pad>",
  "<|pad|>",
  "</s>",
)
# What begins the next turn. At the start of a completion it is the header of the model's own.
NEXT_TURN = (
  "<|im_start|>",
  "<|start_header_id|>",
  "<|start_of_role|>",
  "<start_of_turn>",
  "<|turn>",
  "<|user|>",
  "<|assistant|>",
  "<|system|>",
  "<|start|>",
  "<\uff5cuser\uff5c>",
  "<role>",
  "[inst]",
  "[/inst]",
  "<|begin_of_text|>",
  "<|startoftext|>",
  "<bos>",
)
RULES = ("boxed", "tag", "hashes", "phrase", "last_number")
DEFAULT_RULES = ("boxed", "tag", "hashes", "phrase")

MAX_BOX = 20_000  # characters between a box's braces; a longer box counts as one never closed
MAX_BOXES = 16  # how many boxes are looked at, beginning with the last
MAX_DIGITS = 4000  # of a whole number in a data set; Python prints at most 4,300

_END = re.compile("|".join(map(re.escape, END_OF_TEXT)), re.IGNORECASE)
_NEXT = re.compile("|".join(map(re.escape, NEXT_TURN)), re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])[ \t]*+")
_BARE_BOX = re.compile(r"(?<![A-Za-z\\])boxed[ \t]*+(?=\{)")
_BARE_TOKEN = re.compile(
  r"-?[0-9][0-9.,]*+"  # \boxed 7
  r"|-?[A-Za-z](?![A-Za-z])(?=[$.,;:)\s\\]|$)(?! [a-z])"  # \boxed x, and no word of a sentence
  r"|-?\\(?!boxed|fbox|\W)[A-Za-z]++(?:\{[^{}]{0,200}+\}){0,2}+"  # \boxed \frac{1}{2}
)
_PLACEHOLDER = re.compile(
  r"(?:\\text\{)?(?:the |your |final ){0,3}+answer\}?|\.{2,3}|\\[lc]?dots", re.I
)
_BETWEEN_BOXES = re.compile(r"(?:[\s$]|\\[()\[\],; ]|\\text\{|\}|,|;|and\b|or\b|[A-Za-z] ?=)*+")
_SEPARATES = re.compile(r"[,;]|and|or")
_MARK = r"[*_`]*+"
_PHRASE = re.compile(
  rf"\b(?:the|final){_MARK}[ \t]++{_MARK}answer{_MARK}[ \t]++{_MARK}is\b[ \t*_`]*+(?::[ \t*_`]*+)?",
  re.IGNORECASE,
)
_HASHES = re.compile(r"(?<!#)####(?!#)[ \t]*+")
_NUMBER = re.compile(r"[-+]?\$?(?:[0-9]++(?:,[0-9]{3})*+(?:\.[0-9]++)?|\.[0-9]++)%?")
# Where a sentence ends: a full stop and a capital letter, but not in "St. Louis" or "(A. B)".
_SENTENCE_END = re.compile(r"(?<=[^A-Z.\s])[.!?]['\")*_$]*+\s++(?=[A-Z\"*]|\\boxed)")
_ABBREVIATION = re.compile(r"\b(?:St|Mt|Mr|Mrs|Ms|Dr|Jr|Sr|Prof|No|vs|approx|Fig|Eq)$")
_OPENERS = {"$$": "$$", "\\[": "\\]"}  # of displayed formulas, which may span lines


def truncate(text: str) -> str:
  """The text before its first end-of-text marker or the header of a next turn."""
  end = _END.search(text)
  text = text[: end.start()] if end else text
  for header in _NEXT.finditer(text):
    if text[: header.start()].strip():
      return text[: header.start()]
  return text


def extract_marked(text: str, marker: str = "=>") -> str | None:
  """The text between the last `marker` and the end of its line; None without a marker."""
  _, found, tail = truncate(text).rpartition(marker)
  return tail.strip().split("\n")[0].strip() if found else None


def _last(pattern: re.Pattern, text: str) -> re.Match | None:
  found = collections.deque(pattern.finditer(text), maxlen=1)
  return found[0] if found else None


def _line(text: str) -> str:
  """The first line, up to a closing tag, without a full stop at its end."""
  text = text.lstrip(" \t").split("\n", 1)[0].split("</", 1)[0].strip()
  return text[:-1].rstrip() if text.endswith(".") else text


def _loose(text: str) -> str:
  """The answer at the start of a text, where neither braces nor tags mark its end.

  It reaches from the first line that is not blank to the end of the sentence. A formula displayed
  by $$ or \\[ may span lines. Markdown's bold marks around it are dropped.
  """
  text = text.lstrip()
  for left, right in _OPENERS.items():
    if text.startswith(left):
      inside, closed, _ = text[len(left) :].partition(right)
      if closed and inside.strip():
        return " ".join(inside.split()).rstrip(".")
  line = _line(text)
  for end in _SENTENCE_END.finditer(line):
    if not _ABBREVIATION.search(line[max(0, end.start() - 8) : end.start()]):
      line = line[: end.start()]
      break
  # By places and not by shorter and shorter copies, which take quadratic time.
  first, last = 0, len(line)
  while line.endswith((".", "*", "_", "`"), 0, last) and not line.endswith(("..", "\\_"), 0, last):
    last -= 1
    while last and line[last - 1].isspace():
      last -= 1
  while first < last and line[first] in "*_`":
    first += 1
    while first < last and line[first].isspace():
      first += 1
  return line[first:last]


def _group(text: str, start: int) -> tuple[str, int]:
  """The group that the brace at `start` opens: (content, index after the group).

  An escaped brace neither opens nor closes. A group that never closes ends at the end of its line.
  """
  depth, at, end = 0, start, min(len(text), start + MAX_BOX)
  while at < end:
    char = text[at]
    if char == "\\":
      at += 1
    elif char == "{":
      depth += 1
    elif char == "}":
      depth -= 1
      if not depth:
        return text[start + 1 : at].strip(), at + 1
    at += 1
  return _line(text[start + 1 : start + MAX_BOX]), len(text)


def _box(text: str, match: re.Match) -> tuple[str, int] | None:
  """`(content, end)` of a box; None if it is only mentioned, as in "use \\boxed here"."""
  at = match.end()
  if text[at : at + 1] == "{":
    return _group(text, at)
  token = _BARE_TOKEN.match(text, at)
  return (token.group().rstrip(".,"), token.end()) if token else None


def extract_boxed(text: str) -> str | None:
  r"""The content of the last box.

  "7" for `\boxed{7}`, `\boxed 7` and an unclosed `\boxed{7`; "2, 3" for `\boxed{2} and \boxed{3}`.

  Returns:
    The content; None without a box, "" if all boxes are empty.
  """
  matches = collections.deque(_BOX.finditer(text), maxlen=MAX_BOXES)
  empty, found, start = None, [], 0
  while matches:
    match = matches.pop()
    box = _box(text, match)
    if box is None:
      continue
    content, end = box
    if found:
      between = text[end:start] if end <= start <= end + 60 else "\n\n"
      if (
        "\n\n" in between
        or not _SEPARATES.search(between)
        or not _BETWEEN_BOXES.fullmatch(between)
        or not content
      ):
        break
    elif not content or _PLACEHOLDER.fullmatch(content):
      empty = empty if empty is not None else content
      continue
    found.append(content)
    start = match.start()
  return ", ".join(dict.fromkeys(reversed(found))) if found else empty


def extract_tag(text: str, tag: str = "answer") -> str | None:
  """The content of the last `<tag>`, which may lack its end; None without one, or if it is blank.

  If the content has a box without its backslash ("boxed{7}"), only the box's content counts.
  """
  _, found, tail = text.rpartition(f"<{tag}>")
  inside = tail.split(f"</{tag}", 1)[0].strip()
  if not found or not inside:
    return None
  bare = _last(_BARE_BOX, inside)
  return _group(inside, bare.end())[0] if bare else inside


def _hashes(text: str) -> str | None:
  last = _last(_HASHES, text)
  return _loose(text[last.end() :]) if last else None


def _phrase(text: str) -> str | None:
  last = _last(_PHRASE, text)
  return _loose(text[last.end() :]) if last else None


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
  """The final answer of a completion, by the first of `rules` that finds one.

  Args:
    completion: text as the model wrote it. It is cut at its first end-of-text marker.
    rules: some of `RULES`, in order of preference.

  Returns:
    The answer; "" if all boxes are empty, None if no rule finds an answer.
  """
  text = truncate(completion)
  for rule in rules:
    found = _FINDERS[rule](text)
    if found is not None:
      return found
  return None


def gold_answer(field: object) -> str:
  """The gold answer in the answer field of a data set.

  GSM8K's "... #### 72" gives "72", AMC's 27.0 gives "27", and a solution with a box gives the
  content of its last box. Any other text is the answer itself.

  Raises:
    ValueError: the field is neither text nor a finite number of at most `MAX_DIGITS` digits.
  """
  if isinstance(field, bool) or not isinstance(field, (str, int, float)):
    raise ValueError(f"an answer is text or a number, not {type(field).__name__}: {field!r:.80}")
  if isinstance(field, float) and not math.isfinite(field):
    raise ValueError(f"an answer is text or a finite number, not {field!r}")
  if isinstance(field, float) and field.is_integer():
    field = int(field)
  if isinstance(field, int) and abs(field) >= 10**MAX_DIGITS:
    raise ValueError(f"an answer of more than {MAX_DIGITS} digits")
  if not isinstance(field, str):
    return repr(field)
  boxed = extract_boxed(field)
  if boxed is not None:
    return boxed
  _, found, tail = field.rpartition("####")
  return (tail if found else field).strip()
