"""Tasks by name: what a generated task registers, and what the rest of the package asks for.

The package's own tasks are in `igpo_jax.tasks`, a file each. A task of a user's own is registered
from a config file, or from a file named by `--plugins`, by one call of `register_task`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from igpo_jax.data.records import Record
from igpo_jax.errors import UserError
from igpo_jax.plugins import load_built_in

Count = Callable[[str], int]
TrimRules = Callable[[str, str, Count, int], str]


@dataclasses.dataclass(frozen=True)
class Task:
  """One task, under one name everywhere.

  Attributes:
    name: of the source `synthetic:NAME`, the tokenizer `char:NAME` or `words:NAME`, the trim rules
      `--rules=NAME`, and the `Record.task` of its records.
    verifier: the name of the verifier that grades its records where `reward.verifier` is "task".
    make_records: `(split, n, seed, **options) -> records`, `split` being "train" or "test"; None
      for a task whose problems are read from files.
    alphabet: the characters of its texts, for the character tokenizer; "" where it has none.
    words: the words of its texts, for the word tokenizer; () where it has none.
    trim: `(trace, answer, count, max_tokens) -> trace`, a shorter trace by rules; "" stands for one
      that cannot be trimmed. None where there are no rules.
    aliases: further names under which it is found.
  """

  name: str
  verifier: str
  make_records: Callable[..., Iterable[Record]] | None = None
  alphabet: str = ""
  words: tuple[str, ...] = ()
  trim: TrimRules | None = None
  aliases: tuple[str, ...] = ()


_TASKS: dict[str, Task] = {}


def register_task(task: Task) -> Task:
  """Makes a task known under its name and its aliases; returns it.

  Raises:
    ValueError: one of the names is taken.
  """
  load_built_in()
  for name in (task.name, *task.aliases):
    if find_task(name):
      raise ValueError(f"task {name!r} is already registered")
  _TASKS[task.name] = task
  return task


def find_task(name: str) -> Task | None:
  """The task of that name or alias; None if there is none."""
  load_built_in()
  return next((t for t in _TASKS.values() if name == t.name or name in t.aliases), None)


def all_tasks() -> list[Task]:
  """Every task, in the order of their names."""
  load_built_in()
  return sorted(_TASKS.values(), key=lambda task: task.name)


def task_with(attribute: str, name: str, asked: str) -> Task:
  """The task of that name, which must have an attribute such as "make_records" or "words".

  Args:
    asked: what the user wrote; the error's message begins with it.

  Raises:
    UserError: there is no such task; says which there are.
  """
  task = find_task(name)
  if task is None or not getattr(task, attribute):
    known = ", ".join(t.name for t in all_tasks() if getattr(t, attribute))
    raise UserError(f"{asked}: no task {name!r}; known: {known}")
  return task
