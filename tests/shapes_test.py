"""The shapes and dtypes that public functions declare are the ones they take and return.

The suite runs with these annotations checked (tests/conftest.py), in every test that calls the
functions. Here each of them is seen to refuse an argument of a wrong shape or dtype.
"""

from __future__ import annotations

import inspect
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

import igpo_jax
from igpo_jax import Canvas, denoise, group_advantages, make_lm, policy_loss
from igpo_jax.config import HintConfig, ModelConfig, ObjectiveConfig, SamplerConfig
from igpo_jax.hints.inject import hint_canvas, hinted_group
from igpo_jax.ops.masked import masked_mean, masked_sum, topk_mask
from igpo_jax.ops.token_stats import token_stats
from tests.paths import REPO

F, I, B = jnp.float32, jnp.int32, jnp.bool_  # noqa: E741
ones = lambda dtype, *shape: jnp.ones(shape, dtype)
HEAD = lambda h: h @ jnp.ones((3, 7))
RNG = np.random.default_rng(0)
LM_ = make_lm(
  ModelConfig(d_model=8, n_layers=1, n_heads=2, mlp_hidden=8, vocab_size=12, mask_id=11)
)
PARAMS = object()  # stands for the model's: made in the tests, as every process collects them all
CANVAS = Canvas(jnp.full((2, 6), 11), jnp.arange(6) < jnp.full((2, 1), 2), jnp.ones((2, 6), bool))

# (function, good arguments, {name: an argument that is wrong in shape or dtype})
CASES = [
  (masked_sum, {"x": ones(F, 2, 3), "mask": ones(B, 2, 3)},
   {"mask": ones(B, 3, 2)}),
  (masked_mean, {"x": ones(F, 2, 3), "mask": ones(B, 2, 3)},
   {"mask": ones(F, 2, 3), "x": ones(F, 2)}),
  (topk_mask, {"values": ones(F, 2, 3), "allowed": ones(B, 2, 3), "k": ones(I, 2)},
   {"values": ones(F, 3, 2), "allowed": ones(I, 2, 3), "k": ones(I, 3)}),
  (token_stats, {"head": HEAD, "h": ones(F, 2, 4, 3), "targets": ones(I, 2, 5, 4)},
   {"h": ones(F, 2, 3), "targets": ones(I, 2, 4)}),
  (hint_canvas,
   {"trace_ids": [1, 2, 3, 4], "answer_span": (3, 4), "gen_length": 6, "ratio": 0.5,
    "chunk_range": (1, 2), "rng": RNG, "mask_id": 9},
   {"trace_ids": np.ones((2, 2), np.int32), "answer_span": 3}),
  (hinted_group,
   {"trace_ids": np.ones(4, np.int32), "answer_span": None, "group_size": 2, "gen_length": 6,
    "hints": HintConfig(), "rng": RNG, "mask_id": 9},
   {"trace_ids": np.ones(4, np.float32)}),
  (group_advantages, {"rewards": ones(F, 4), "group_size": 2},
   {"rewards": ones(F, 2, 2)}),
  (policy_loss,
   {"logps": ones(F, 2, 3), "entropy": ones(F, 2, 3), "old_logps": ones(F, 2, 3),
    "ref_logps": None, "advantages": ones(F, 2), "loss_mask": ones(B, 2, 3),
    "hinted": ones(B, 2, 3), "cfg": ObjectiveConfig()},
   {"logps": ones(F, 3, 2), "entropy": ones(F, 2), "ref_logps": ones(F, 2, 4),
    "advantages": ones(F, 3), "loss_mask": ones(F, 2, 3), "hinted": ones(I, 2, 3)}),
  (jaxtyped(denoise, typechecker=beartype),
   {"lm": LM_, "params": PARAMS, "canvas": CANVAS, "key": jax.random.key(0),
    "cfg": SamplerConfig(4, 4, 2)},
   {"key": ones(F, 2), "canvas": CANVAS.tokens}),
]  # fmt: skip
WRONG = [(f, good, name, bad) for f, good, wrongs in CASES for name, bad in wrongs.items()]


def filled(arguments):
  params = {n: LM_.init(jax.random.key(0)) for n, value in arguments.items() if value is PARAMS}
  return arguments | params


@pytest.mark.parametrize(("function", "arguments"), [case[:2] for case in CASES])
def test_what_is_declared_is_taken(function, arguments):
  function(**filled(arguments))


@pytest.mark.parametrize(("function", "arguments", "name", "wrong"), WRONG)
def test_another_shape_or_dtype_is_refused(function, arguments, name, wrong):
  with pytest.raises(TypeCheckError):
    function(**filled(arguments) | {name: wrong})


def test_shapes_are_checked_while_a_program_is_traced():
  with pytest.raises(TypeCheckError):
    jax.jit(masked_mean)(ones(F, 2, 3), ones(B, 3))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("pyright"), reason="pyright is not installed")
def test_pyright_finds_no_fault_in_the_parts_that_pyproject_lists():
  done = subprocess.run(
    ["pyright", "--project", REPO, "--pythonpath", sys.executable], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout


def test_every_public_function_with_arrays_declares_their_shapes():
  """Of `import igpo_jax`: each parameter that is an array says its shape."""
  for name in igpo_jax.__all__:
    function = getattr(igpo_jax, name)
    if inspect.isfunction(function):
      for parameter in inspect.signature(function).parameters.values():
        assert str(parameter.annotation) not in ("Array", "np.ndarray", "jax.Array"), (
          f"{name}({parameter.name}): write its shape, such as Float[Array, 'B L']"
        )
