"""Command-line options that generate and chat share."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from typing import Any

from igpo_jax import cli
from igpo_jax.config import Dtype, SamplerConfig, check_dtype
from igpo_jax.config.fields import Seed, declarations, descriptions, meant, number
from igpo_jax.data.sources import Prompting
from igpo_jax.errors import UserError
from igpo_jax.inference.settings import Settings, find_model, override, settings_of


def add_arguments(parser: cli.ArgumentParser, seed: int | None = 0) -> None:
  """Adds the options for the model, the text around a prompt, and the sampler.

  Args:
    parser: the command's parser.
    seed: the default of --seed; None: the command draws one for each request.
  """
  add = parser.add_argument
  add("--model", required=True, help="Hugging Face directory, one written by igpo_jax.convert, "
      "WORKDIR/checkpoints/STAGE/STEP of a run, or WORKDIR for its newest")  # fmt: skip
  add("--adapter", help="PEFT directory to put on top")
  add("--raw", action="store_true", help="no chat format around the prompt")
  add("--system", help="a system message before the prompt; default: the run's")
  add("--prompt_template", help='what stands around a prompt, with "{question}" in it; '
      "default: the run's")  # fmt: skip
  add("--dtype", help=f"{', '.join(typing.get_args(Dtype))}; default: bfloat16, on a CPU float32")
  default = "drawn for each request" if seed is None else seed
  add("--seed", type=number(Seed), default=seed, help=f"of the noise ({default})")
  group = parser.add_argument_group(
    "sampler", "As the run of a checkpoint evaluates, or else: 256 tokens in blocks of 32, half as "
    "many steps, temperature 0. Lengths that are not given fit those that are.",
  )  # fmt: skip
  for name, hint in declarations(SamplerConfig).items():
    group.add_argument(f"--{name}", help=descriptions(SamplerConfig)[name].replace("%", "%%"),
                       **_kind(hint))  # fmt: skip


def _kind(hint: Any) -> dict[str, Any]:
  """The arguments of `add_argument` for an option of this type."""
  parts = typing.get_args(hint)
  if hint is bool:
    return {"action": argparse.BooleanOptionalAction, "default": None}
  if typing.get_origin(hint) is typing.Literal:
    return {"choices": parts}
  if type(None) in parts:
    hint = next(p for p in parts if p is not type(None))
  return {"type": number(hint)}


def parse_option(name: str, text: str) -> dict[str, Any]:
  """{name: value} of an option of the sampler that is given as text, booleans as true or false.

  Raises:
    UserError: there is no such option, or it cannot have this value.
  """
  hints = declarations(SamplerConfig)
  if name not in hints:
    raise UserError(
      f"there is no option {name!r}{meant(name, hints) or ', but ' + ', '.join(hints)}"
    )
  kind = _kind(hints[name])
  if hints[name] is bool:
    kind = {"choices": ("true", "false")}
  if "choices" in kind and text not in kind["choices"]:
    raise UserError(f"{name}={text} is not one of {', '.join(kind['choices'])}")
  try:
    value = kind["type"](text) if "type" in kind else text
  except UserError as error:
    raise UserError(f"{name}={error}") from None
  return {name: value == "true" if hints[name] is bool else value}


def given_options(args: argparse.Namespace) -> dict[str, Any]:
  """Option -> value of the sampler's options that the command line sets."""
  names = [field.name for field in dataclasses.fields(SamplerConfig)]
  return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def settings_from(args: argparse.Namespace) -> tuple[Any, Settings]:
  """(directory of the model, its settings) from a command line. Loads no weights.

  Raises:
    UserError: there is no such model, or options contradict each other.
  """
  model = find_model(args.model)
  if args.dtype is not None:
    args.dtype = check_dtype(args.dtype, "--dtype")
  settings = settings_of(model)
  own = settings.prompting
  prompting = Prompting(
    own.system if args.system is None else args.system,
    own.template if args.prompt_template is None else args.prompt_template,
  )
  sampler = override(settings.sampler, given_options(args))
  return model, Settings(sampler, prompting, settings.origin)
