"""A first check of a run's inputs, before jax is loaded."""

from __future__ import annotations

from etils import epath

from igpo_jax.config import Config, arms_of
from igpo_jax.data.sources import check_files
from igpo_jax.errors import UserError
from igpo_jax.eval.protocols import plan


def check_inputs(config: Config) -> None:
  """Checks that the evaluations are possible and that every input file is there.

  Raises:
    UserError: an evaluation is not possible, or a file is missing; the message says where to get
      it.
  """
  tasks = plan(config)
  uris = [getattr(config.data, stage) for stage in config.stages if stage != "eval"]
  uris += [arm.data.rl for arm in arms_of(config).values()]
  for uri in [*uris, *(u for task in tasks for u in (task.uri, task.examples) if u)]:
    check_files(uri)
  if config.init_from and not epath.Path(config.init_from).exists():
    raise UserError(
      f"config.init_from={config.init_from}: no such directory; get a model, for example all "
      "files of GSAI-ML/LLaDA-8B-Instruct from Hugging Face, and put it there"
    )
