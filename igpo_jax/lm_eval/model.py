"""The model class that the LM Evaluation Harness loads; importing it makes `igpo_jax` known there.

Log-likelihoods are estimates (inference/likelihood.py).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import jax
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from igpo_jax import cli
from igpo_jax.config import SamplerConfig, check_dtype
from igpo_jax.errors import UserError
from igpo_jax.inference.arguments import parse_option
from igpo_jax.inference.likelihood import Continuation, are_greedy, log_likelihoods
from igpo_jax.inference.requests import Request
from igpo_jax.inference.session import Session
from igpo_jax.inference.settings import find_model, override, settings_of
from igpo_jax.io.versions import versions
from igpo_jax.token_ids import check_ids

CHAT = "igpo_jax chat: "  # begins a context that is a chat, as JSON: special tokens are not text
HARNESS_DEVICE = "cuda:0"  # what the harness says if nobody says anything
NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@register_model("igpo_jax")
class DiffusionLM(LM):
  """A masked diffusion model as the harness asks it; scores do not depend on the batch size.

  Args:
    pretrained: a model directory, or the workdir of a run, as for igpo_jax.generate.
    batch_size: rows of a forward pass.
    draws: forward passes for each log-likelihood.
    seed: of the masks of log-likelihoods, and of the noise at a temperature above 0.
    check_greedy: False: `is_greedy` is not found out and always False.
    adapter, dtype: as for igpo_jax.generate.
    device, max_batch_size: for the harness' other models; without effect.
    sampler: options of `SamplerConfig`.

  Raises:
    UserError: there is no such model or option.
  """

  def __init__(
    self,
    pretrained: str,
    batch_size: int | str | None = 8,
    draws: int = 128,
    seed: int = 0,
    check_greedy: bool = True,
    adapter: str | None = None,
    dtype: str = "",
    device: str | None = None,
    max_batch_size: int | None = None,
    **sampler: Any,
  ):
    super().__init__()
    del max_batch_size
    if device not in (None, HARNESS_DEVICE):
      cli.say(f"igpo_jax: --device={device} has no effect: jax finds the devices (JAX_PLATFORMS)")
    if not str(batch_size or 8).isdecimal() or int(batch_size or 8) < 1:
      raise UserError(f"--batch_size={batch_size}: igpo_jax needs a number")
    if int(draws) < 1:
      raise UserError(f"--model_args draws={draws} must be at least 1")
    self.batch_size, self.draws, self.seed = int(batch_size or 8), int(draws), int(seed)
    model = find_model(str(pretrained))
    self.given: dict[str, Any] = {}
    for name, value in sampler.items():
      self.given |= parse_option(name, str(value).lower() if value in (True, False) else str(value))
    settings = settings_of(model)
    self.sampler = override(settings.sampler, self.given)
    self.fixed_length = "gen_length" in self.given or settings.origin is not None
    self.session = Session(model, adapter, check_dtype(dtype, "dtype") if dtype else "")
    self.tokenizer, self.path = self.session.tokenizer, model
    self.check_greedy = bool(check_greedy)
    if not self.check_greedy:
      cli.say("igpo_jax: check_greedy=False: is_greedy is False for every continuation")

  # --- what the harness asks ---------------------------------------------------------------

  def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
    """The answers, each cut before the first of the task's `until`."""
    del disable_tqdm
    answers: list[str] = [""] * len(requests)
    asked: dict[SamplerConfig, list[int]] = {}
    for number, request in enumerate(requests):
      asked.setdefault(self._sampler_of(request.args[1]), []).append(number)
    for sampler, numbers in asked.items():
      prompts = [Request(self._context(requests[n].args[0])) for n in numbers]
      for prompt in prompts:
        self.session.check(prompt)
      made = self.session.answers(prompts, sampler, self.seed, self.batch_size)
      for number, answer in zip(numbers, made, strict=True):
        until = requests[number].args[1].get("until") or ()
        text = answer.text
        for stop in [until] if isinstance(until, str) else until:
          text = text.partition(stop)[0] if stop else text
        answers[number] = text
        self.cache_hook.add_partial("generate_until", requests[number].args, text)
    return answers

  def loglikelihood(
    self, requests: Sequence[Any], disable_tqdm: bool = False
  ) -> list[tuple[float, bool]]:
    """(log-likelihood in nats, whether decoding gives it) of each (context, continuation)."""
    del disable_tqdm
    return self._scored([self._continuation(*request.args) for request in requests])

  def loglikelihood_rolling(
    self, requests: Sequence[Any], disable_tqdm: bool = False
  ) -> list[float]:
    """The log-likelihood of whole texts. A text is read at once, however long it is."""
    del disable_tqdm
    texts = [self._continuation("", request.args[0]) for request in requests]
    with self.session.loaded() as pre:
      return log_likelihoods(pre, texts, self.draws, self.seed, self.batch_size)

  def apply_chat_template(
    self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
  ) -> str:
    """The chat as JSON: the tokens of the model's chat format cannot be written as text."""
    if not add_generation_prompt and chat_history[-1]["role"] != "assistant":
      raise UserError("igpo_jax: a chat that nobody answers cannot be a prompt")
    return CHAT + json.dumps(chat_history, ensure_ascii=False)

  def chat_template(self, chat_template: bool | str = False) -> str:
    """What the harness writes into its results."""
    if isinstance(chat_template, str):
      raise UserError("igpo_jax: --apply_chat_template takes no name: it is the model's own format")
    return "of the tokenizer" if chat_template else ""

  @property
  def tokenizer_name(self) -> str:
    """What the harness tells caches of requests apart by."""
    return str(self.path).replace("/", "__")

  def get_model_info(self) -> dict[str, Any]:
    """What a score depends on, for the harness' results."""
    with self.session.loaded() as pre:
      size = sum(x.size for x in jax.tree.leaves(pre.params))
    return {
      "model_num_parameters": size, "model_dtype": pre.config.dtype,
      "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
      "draws": self.draws, "seed": self.seed, "check_greedy": self.check_greedy,
      "sampler": dataclasses.asdict(self.sampler), "versions": versions(),
    }  # fmt: skip

  # --- texts into tokens -------------------------------------------------------------------

  def _context(self, text: str) -> tuple[int, ...]:
    """Token ids of a context, which is a text or what `apply_chat_template` made."""
    if not text.startswith(CHAT):
      return tuple(self.tokenizer.encode(text))
    messages, end = json.JSONDecoder().raw_decode(text, len(CHAT))
    if prefill := text[end:]:  # what a task puts at the beginning of every answer
      messages = [*messages, {"role": "assistant", "content": prefill}]
    return tuple(self.tokenizer.encode_prompt(messages))

  def _continuation(self, context: str, continuation: str) -> Continuation:
    """Both in tokens. A token across the border of two texts belongs to the continuation."""
    if context.startswith(CHAT):
      found = Continuation(self._context(context), tuple(self.tokenizer.encode(continuation)))
    else:
      before = context.rstrip()  # a space belongs to the word after it
      ids, offsets = self.tokenizer.encode_with_offsets(context + continuation)
      start = next((k for k, (_, end) in enumerate(offsets) if end > len(before)), len(ids))
      found = Continuation(tuple(ids[:start]), tuple(ids[start:]))
    if not found.tokens:
      raise UserError(f"igpo_jax: the continuation {continuation!r} has no tokens")
    return found

  def _scored(self, continuations: Sequence[Continuation]) -> list[tuple[float, bool]]:
    with self.session.loaded() as pre:
      for one in continuations:
        check_ids((*one.context, *one.tokens), pre.lm.vocab_size, "a text of the task")
      found = log_likelihoods(pre, continuations, self.draws, self.seed, self.batch_size)
      if not self.check_greedy:
        return [(logp, False) for logp in found]
      if pre.lm.block_length:
        raise UserError(
          "igpo_jax: whether decoding gives a continuation cannot be told of a block-causal model: "
          "add check_greedy=False to --model_args"
        )
      greedy = are_greedy(pre, continuations, self.batch_size)
    return list(zip(found, greedy, strict=True))

  def _sampler_of(self, wanted: dict[str, Any]) -> SamplerConfig:
    """The sampler of a request: options of --model_args come before those of the task."""
    length = next((wanted[name] for name in NAMES if name in wanted), None)
    given = dict(self.given)
    if length is not None and not self.fixed_length:
      given["gen_length"] = int(length)
    if wanted.get("do_sample") and "temperature" not in given:
      given["temperature"] = float(wanted.get("temperature", 1.0))
    return override(self.sampler, given)
