"""Prompts with completions behind them: the rows that are sampled and scored, and their keys."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from igpo_jax.config import SamplerConfig
from igpo_jax.diffusion.sampler import denoise
from igpo_jax.types import LM, Array, Canvas, Params


def join(prompt: Array, prompt_valid: Array, completion: Array) -> tuple[Array, Array]:
  """Rows of a prompt and what follows it: (tokens i32[B,Tp+L], valid bool[B,Tp+L]).

  Args:
    prompt: i32[B,Tp], left-padded.
    prompt_valid: bool[B,Tp], False on the padding.
    completion: i32[B,L], clean or with masks; no position of it is padding.
  """
  tokens = jnp.concatenate([prompt, completion], axis=1)
  valid = jnp.concatenate([prompt_valid, jnp.ones(completion.shape, bool)], axis=1)
  return tokens, valid


@functools.partial(jax.jit, static_argnames=("lm", "cfg"))
def sample_rows(
  lm: LM,
  params: Params,
  prompt: Array,
  prompt_valid: Array,
  canvas: Array,
  hinted: Array,
  keys: Array,
  cfg: SamplerConfig,
) -> tuple[Array, Array, Array]:
  """Denoises completions. Rows stand alone, so a group may lie on several devices.

  Args:
    prompt, prompt_valid: i32/bool[B,Tp].
    canvas: i32[B,L], masks and hints.
    hinted: bool[B,L], fixed positions of the canvas.
    keys: key[B], see `row_keys`.

  Returns:
    (completion i32[B,L], commit_step i32[B,L], commit_logp f32[B,L], finite bool[B]), see
    `Denoised`.
  """
  tokens, valid = join(prompt, prompt_valid, canvas)
  fixed = jnp.concatenate([jnp.ones_like(prompt_valid), hinted], axis=1)
  out = denoise(lm, params, Canvas(tokens, fixed, valid), keys, cfg)
  begin = prompt.shape[1]
  of_canvas = (out.tokens, out.commit_step, out.commit_logp)
  return *(x[:, begin:] for x in of_canvas), out.finite


@jax.jit
def row_keys(key: Array, prompt_ids: Array, numbers: Array) -> Array:
  """One PRNG key per completion, from (step key, prompt id, index of the completion in its group).

  Args:
    key: of the step.
    prompt_ids: u32[B].
    numbers: i32[B].

  Returns:
    key[B].
  """
  return jax.vmap(jax.random.fold_in)(prompt_keys(key, prompt_ids), numbers)


@jax.jit
def prompt_keys(key: Array, prompt_ids: Array) -> Array:
  """key[P] from a step's key and u32[P] identities: noise follows the prompt, not its place."""
  return jax.vmap(jax.random.fold_in, (None, 0))(key, prompt_ids)
