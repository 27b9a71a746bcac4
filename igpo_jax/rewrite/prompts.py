"""The prompts with which a language model is asked to rewrite a trace, and to try again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from igpo_jax.data.records import Message, Record

SYSTEM = """\
You turn long solutions of mathematics problems into short ones. You are given a problem, a
long solution of it and its final answer. Write one concise solution that a careful reader can
check line by line.

- Keep the chain of reasoning that leads to the answer, in its order.
- Leave out false starts, second thoughts, repeated checks, and remarks about the thinking itself.
- Take short, rigorous steps: each line follows from the lines before it and shows the numbers or
  formulas it needs.
- Do not introduce results that the long solution does not use, unless a gap has to be closed.
- Write as the one who solves the problem. Never mention a given solution or a known answer.
- End with the final answer inside \\boxed{}, once, and write nothing after it.
- The whole text may have at most {max_tokens} tokens; about {words} words are safe."""

USER = """\
Problem:
{question}

Long solution:
{trace}

Final answer: {answer}

The concise solution:"""

AGAIN = "{complaint} Write the whole concise solution again, under the same rules."


class Attempt(NamedTuple):
  """A text that was refused, and what is wrong with it, in words for the model."""

  text: str
  complaint: str


def fill(template: str, **values: str) -> str:
  """Replaces each {name} in a template. Braces of TeX, there or in the values, stay as they are."""
  for name in values:
    template = template.replace("{" + name + "}", f"\x00{name}\x00")
  for name, value in values.items():
    template = template.replace(f"\x00{name}\x00", value)
  return template


def first_messages(record: Record, max_tokens: int) -> list[Message]:
  """The chat that asks for one trace to be rewritten.

  Args:
    record: its problem, trace and gold answer are sent.
    max_tokens: the largest number of tokens of the result, by the tokenizer of the model to be
      trained. The writer has another tokenizer, so it is told a number of words.
  """
  system = fill(SYSTEM, max_tokens=str(max_tokens), words=str(max(max_tokens // 2, 1)))
  user = fill(USER, question=record.question, trace=record.trace, answer=record.answer)
  return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def messages(record: Record, max_tokens: int, attempts: Sequence[Attempt] = ()) -> list[Message]:
  """`first_messages`, followed by each refused answer and the reason why it was refused."""
  out = first_messages(record, max_tokens)
  for attempt in attempts:
    out.append({"role": "assistant", "content": attempt.text or "(nothing)"})
    out.append({"role": "user", "content": fill(AGAIN, complaint=attempt.complaint)})
  return out


def digest() -> str:
  """A name for the wording of the prompts. One output has results of one wording only."""
  text = "\x00".join((SYSTEM, USER, AGAIN))
  return hashlib.blake2s(text.encode(), digest_size=8).hexdigest()
