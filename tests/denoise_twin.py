"""The denoising loop once more, in plain Python: a row, a step, a position at a time."""

from __future__ import annotations

import jax
import numpy as np


def twin_row(lm, logits_of, tokens, fixed, valid, key, cfg):
  """One row's denoising in plain Python: (tokens, commit steps, forwards per block)."""
  tokens, length = tokens.copy(), len(tokens)
  first = length - cfg.gen_length
  commit_step = np.full(length, -1)
  forwards = np.zeros(cfg.num_blocks, int)

  def is_mask(k):
    return tokens[k] == lm.mask_id and not fixed[k]

  for block in range(cfg.num_blocks):
    begin = first + block * cfg.block_length
    inside = range(begin, begin + cfg.block_length)
    had = sum(is_mask(k) for k in inside)
    for i in range(min(cfg.steps_per_block, had)):
      if not any(is_mask(k) for k in inside):
        break
      now = block * cfg.steps_per_block + i
      count = had // cfg.steps_per_block + (i < had % cfg.steps_per_block)
      start = first if cfg.allow_mask else begin
      window = range(start, begin + cfg.block_length)
      step_key = jax.random.fold_in(key, now)

      logits = logits_of(tokens, valid)
      if cfg.cfg_scale:
        blind = logits_of(np.where(fixed, lm.mask_id, tokens), valid)
        logits = blind + (cfg.cfg_scale + 1) * (logits - blind)
      scores = logits.copy()
      streams = [jax.random.fold_in(step_key, stream) for stream in (0, 1)]
      if cfg.temperature:
        for k in window:
          noise_key = jax.random.fold_in(streams[0], k - first)
          gumbel = jax.random.gumbel(noise_key, (lm.vocab_size,), mode="high")
          scores[k] += cfg.temperature * np.asarray(gumbel)
      if not cfg.allow_mask:
        scores[:, lm.mask_id] = -np.inf

      candidates = []
      for k in window:
        if not is_mask(k):
          continue
        token = int(np.argmax(scores[k]))
        shifted = logits[k].astype(np.float64) - logits[k].max()
        confidence = np.exp(shifted[token]) / np.exp(shifted).sum()
        value = confidence
        if cfg.remasking == "random":
          value = float(jax.random.uniform(jax.random.fold_in(streams[1], k - first)))
        last = cfg.suppress_eos and token in lm.stop_ids
        candidates.append((last, -value, k, token, confidence))
      candidates.sort()
      chosen = candidates[:count]
      if cfg.threshold is not None:
        chosen += [c for c in candidates[count:] if c[-1] > cfg.threshold]
      for _, _, k, token, _ in chosen:
        tokens[k] = token
        if token != lm.mask_id:
          commit_step[k] = now
      forwards[block] += 1
      if cfg.early_stop == "row" and all(tokens[k] == lm.eos_id for k in inside):
        for k in range(first, length):
          if is_mask(k):
            tokens[k], commit_step[k] = lm.eos_id, now
        return tokens, commit_step, forwards
  return tokens, commit_step, forwards
