"""Named evaluation protocols: how published numbers were measured, so that ours can be compared.

The accuracy of one model differs by ten points between papers, because prompts, lengths and
graders differ. A protocol fixes all of them for each benchmark, and says what its source does not
state (`Setting.ours`). docs/evaluation.md explains each protocol. This module does not import jax.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from igpo_jax.config import Config, SamplerConfig
from igpo_jax.data.names import one_name
from igpo_jax.data.records import Message, Record
from igpo_jax.errors import UserError
from igpo_jax.plugins import known_values
from igpo_jax.rewards import answers

PLAIN = "plain"  # name for config.eval.protocol = "": prompts and settings come from the config


@dataclasses.dataclass(frozen=True)
class Setting:
  """How one benchmark is run.

  Attributes:
    sampler: completion length, steps, block length, temperature and the other sampling options.
    samples: k, the number of completions of each problem.
    template: the user's message, with "{question}" in it; "" keeps the prompts of the source.
    prefill: how the assistant's turn begins. It is part of the prompt: it does not count towards
      the completion's length.
    shots: number of solved examples that the source puts before the question.
    rules: how the answer is found (`rewards.answers.RULES`); it is then graded by the verifier
      "math". () grades with the run's own verifier.
    published: the published accuracy of LLaDA-8B-Instruct in [0, 1]; None if none is known.
    source: where `published` stands, and what it was measured on if not on this benchmark.
    ours: what the source does not state, so that we chose it.
  """

  sampler: SamplerConfig
  samples: int = 1
  template: str = ""
  prefill: str = ""
  shots: int = 0
  rules: tuple[str, ...] = ()
  published: float | None = None
  source: str = ""
  ours: tuple[str, ...] = ()

  def messages(self, question: str, examples: tuple[Record, ...] = ()) -> tuple[Message, ...]:
    """The prompt of a question: a turn for each solved example and its trace, then the question.

    Args:
      question: text of the question.
      examples: solved examples, in order.
    """

    def ask(text: str) -> Message:
      return {"role": "user", "content": self.template.replace("{question}", text)}

    turns: list[Message] = []
    for example in examples:
      turns += [ask(example.question), {"role": "assistant", "content": example.trace}]
    turns.append(ask(question))
    if self.prefill:
      turns.append({"role": "assistant", "content": self.prefill})
    return tuple(turns)


Protocol = dict[str, tuple[Setting, ...]]  # benchmark -> one setting, or one for each length


def _sampler(length: int, steps: int, block: int, temperature: float = 0.0) -> SamplerConfig:
  return SamplerConfig(gen_length=length, steps=steps, block_length=block, temperature=temperature)


IGPO_TEMPLATE = "{question}\n\nReason step by step, then give the final answer in \\boxed{}."


def _igpo() -> Protocol:
  """The IGPO paper's table 1. Its code has no evaluation, so we chose prompt and lengths."""

  def setting(published: float, temperature: float = 0.0, samples: int = 1) -> tuple[Setting]:
    return (
      Setting(
        sampler=_sampler(256, 128, 32, temperature),
        samples=samples,
        template=IGPO_TEMPLATE,
        rules=answers.DEFAULT_RULES,
        published=published,
        source="arXiv 2509.10396",
        ours=("prompt", "length, steps and block", "extraction"),
      ),
    )

  return {
    "gsm8k": setting(0.815),
    "math500": setting(0.390),
    "amc": setting(0.145, temperature=0.1, samples=16),
    "minerva": setting(0.092),
  }


# The exact wording is part of the protocol. The wordings for the two benchmarks differ in white
# space, and that for MATH500 has a quotation mark near its end.
_D1_SYSTEM = (
  "You are a math expert. You will be given a question to solve. Solve it step by step. "
  "Wrap the final answer in a \\boxed{}.%s\nRespond in the following format:\n<reasoning>\n"
  "Your reasoning here\n</reasoning>\n<answer>\n\\boxed{...}\n</answer>%s"
)
_D1_GSM8K = _D1_SYSTEM % (" ", "")
_D1_MATH500 = _D1_SYSTEM % ("", '" \n')


def _d1() -> Protocol:
  """d1 and SPG: no examples, instructions in the user's turn, the reasoning tag prefilled."""

  def setting(system: str, source: str, length: int, published: float) -> Setting:
    return Setting(
      sampler=_sampler(length, length // 2, 32),
      template=system + "\n\n{question}",
      prefill="<reasoning>",
      rules=("boxed", "tag"),
      published=published,
      source=source,
    )

  gsm8k = _D1_GSM8K, "d1's dumps, recomputed on 1,130 questions"
  math500 = _D1_MATH500, "arXiv 2504.12216"
  return {
    "gsm8k": tuple(setting(*gsm8k, *x) for x in ((128, 0.693), (256, 0.764), (512, 0.781))),
    "math500": tuple(setting(*math500, *x) for x in ((128, 0.260), (256, 0.324), (512, 0.362))),
  }


def _opencompass_block() -> Protocol:
  """LLaDA's own OpenCompass runs with blocks: four solved examples, one token in each step."""
  return {
    "gsm8k": (
      Setting(
        sampler=_sampler(256, 256, 8),
        template="Question: {question}\nLet's think step by step\nAnswer:",
        shots=4,
        rules=("last_number",),
        published=0.786,
        source="LLaDA's evaluation notes",
      ),
    ),
    "math500": (
      Setting(
        sampler=_sampler(512, 512, 64),
        template="Problem:\n{question}\nSolution:",
        shots=4,
        rules=("boxed", "phrase"),
        published=0.422,
        source="LLaDA's evaluation notes, on all of MATH",
        ours=("prompt",),
      ),
    ),
  }


PROTOCOLS: dict[str, Protocol] = {}


def register_protocol(name: str, protocol: Mapping[str, Setting | Sequence[Setting]]) -> None:
  """Registers a protocol, so that `eval.protocol=name` chooses it.

  Args:
    name: any name except "", which stands for the config's own settings, and "plain".
    protocol: name of a benchmark -> its setting, or several settings that differ in completion
      length. The items of `data.eval` must have the benchmarks' names.

  Raises:
    ValueError: the name is taken or reserved, there is no benchmark, or a benchmark has two
      settings of one length.
  """
  if name in ("", PLAIN) or name in PROTOCOLS:
    taken = "already registered" if name in PROTOCOLS else "reserved"
    raise ValueError(f"protocol {name!r} is {taken}")
  settings = {
    one_name(benchmark): (chosen,) if isinstance(chosen, Setting) else tuple(chosen)
    for benchmark, chosen in protocol.items()
  }
  if not settings:
    raise ValueError(f"protocol {name!r} defines no benchmark")
  for benchmark, chosen in settings.items():
    lengths = [setting.sampler.gen_length for setting in chosen]
    if not lengths or len(set(lengths)) < len(lengths):
      raise ValueError(
        f"protocol {name!r}: {benchmark}: one setting for each length, not {lengths}"
      )
  PROTOCOLS[name] = settings


register_protocol("igpo", _igpo())
register_protocol("d1", _d1())
register_protocol("opencompass_block", _opencompass_block())
known_values("eval.protocol", lambda: PROTOCOLS)


class Task(NamedTuple):
  """One evaluation to make.

  Attributes:
    name: used in metrics and files: the benchmark's name, followed by "@L" if its protocol has
      several lengths L.
    uri: source of the problems.
    examples: source of the solved examples, "" for none.
    protocol: name of the protocol.
    setting: how the benchmark is run.
  """

  name: str
  uri: str
  examples: str
  protocol: str
  setting: Setting


def plain_setting(config: Config) -> Setting:
  """The setting without a protocol: the rollouts' sampler with options of `config.eval`.

  These are temperature, steps (0: those of the rollouts), cache, whether several positions may be
  committed at a step, and number of samples.
  """
  sampler = dataclasses.replace(
    config.sampler,
    temperature=config.eval.temperature,
    steps=config.eval.steps or config.sampler.steps,
  )
  if not config.eval.parallel:
    sampler = dataclasses.replace(sampler, threshold=None, factor=None, adaptive=False)
  return Setting(_with_cache(sampler, config.eval.cache), config.eval.samples)


def _with_cache(sampler: SamplerConfig, cache: str) -> SamplerConfig:
  every = sampler.refresh_every if cache != "none" else 0
  return dataclasses.replace(sampler, cache=cache, refresh_every=every)


def plan(config: Config) -> list[Task]:
  """The evaluations that a config asks for. No file is opened.

  Raises:
    UserError: an unknown protocol, a benchmark or length that the protocol does not define, a
      benchmark that is named twice, or solved examples that no benchmark uses.
  """
  chosen = config.eval.protocol
  examples = dict(item.split("=", 1) for item in config.eval.examples)
  tasks = []
  for item in config.data.eval:
    name, _, uri = item.partition("=")
    if not re.fullmatch(r"[\w.-]+", name):
      raise UserError(f"config: data.eval: the name {name!r} should be letters, digits, _ . or -")
    if not chosen:
      tasks.append(Task(name, uri, "", PLAIN, plain_setting(config)))
      continue
    if re.search(r"[?&](system|template)=", uri):
      raise UserError(
        f"config: data.eval: {uri}: the prompt is the protocol's (eval.protocol={chosen!r}), so"
        " the source should have no system or template of its own"
      )
    settings = _settings(chosen, name)
    several = len(settings) > 1
    for setting in _of_lengths(settings, config.eval.lengths, f"protocol {chosen!r} runs {name}"):
      label = f"{name}@{setting.sampler.gen_length}" if several else name
      shown = examples.get(name, "") if setting.shots else ""
      sampler = _with_cache(setting.sampler, config.eval.cache)
      setting = dataclasses.replace(setting, sampler=sampler)
      tasks.append(Task(label, uri, shown, chosen, setting))
  for name in examples:
    if not any(task.examples == examples[name] for task in tasks):
      raise UserError(
        f"config: eval.examples: {name!r} is no benchmark of data.eval whose protocol shows"
        " solved examples: leave it out"
      )
  names = [task.name for task in tasks]
  if twice := sorted({name for name in names if names.count(name) > 1}):
    raise UserError(f"config: data.eval names a benchmark twice: {', '.join(twice)}")
  return tasks


def _of_lengths(
  settings: tuple[Setting, ...], lengths: tuple[int, ...], what: str
) -> list[Setting]:
  chosen = [s for s in settings if not lengths or s.sampler.gen_length in lengths]
  if not chosen:
    known = ", ".join(str(s.sampler.gen_length) for s in settings)
    raise UserError(
      f"config: eval.lengths={lengths} has none of the lengths at which {what}: {known}"
    )
  return chosen


def _settings(protocol: str, benchmark: str) -> tuple[Setting, ...]:
  if protocol not in PROTOCOLS:
    raise UserError(
      f"config: eval.protocol={protocol!r} is not one of {', '.join(PROTOCOLS)}, or '' for the"
      " config's own settings"
    )
  benchmark = one_name(benchmark)
  if benchmark not in PROTOCOLS[protocol]:
    raise UserError(
      f"config: data.eval: protocol {protocol!r} defines {', '.join(PROTOCOLS[protocol])}, not"
      f" {benchmark!r}: give the items of data.eval these names"
    )
  return PROTOCOLS[protocol][benchmark]
