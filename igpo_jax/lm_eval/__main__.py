"""The command of the LM Evaluation Harness, in which the model `igpo_jax` is known.

    pip install 'igpo_jax[lm-eval]'
    python -m igpo_jax.lm_eval run --model igpo_jax --model_args pretrained=DIR --tasks gsm8k

--help is the harness' own. `--model_args` may have `adapter`, `dtype`, `seed`, `draws` (forward
passes for a log-likelihood), `check_greedy`, and every option of the sampler, such as
`steps=256,block_length=32`. Without `gen_length` an answer of a model that is no run's has as many
tokens as the task says. --apply_chat_template is what instruction-tuned models need.
"""

from __future__ import annotations

import importlib
import sys

from igpo_jax import cli
from igpo_jax.errors import UserError


def main(argv: list[str] | None = None) -> None:
  """Runs the harness' command line; `argv` is what follows the program's name.

  Raises:
    UserError: the harness is not installed.
  """
  try:
    harness = importlib.import_module("lm_eval.__main__")
  except ModuleNotFoundError as error:
    raise UserError(
      f"the LM Evaluation Harness is not here ({error}): pip install 'igpo_jax[lm-eval]'"
    ) from error
  importlib.import_module("igpo_jax.lm_eval.model")
  sys.argv = ["lm_eval", *(sys.argv[1:] if argv is None else argv)]
  harness.cli_evaluate()


if __name__ == "__main__":
  cli.run(main)
