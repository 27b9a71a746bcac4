"""The denoising loop once more, in plain Python: a row, a step, a position at a time."""

from __future__ import annotations

import jax
import numpy as np


def counts_of(cfg, had):
  """How many of `had` masks each step of a block commits, steps without any left out."""
  steps, counts, left = cfg.steps_per_block, [], had
  for i in range(steps):
    if cfg.schedule == "even":
      count = had // steps + (i < had % steps)
    elif cfg.schedule == "full_block":
      count = cfg.block_length // steps + (i < cfg.block_length % steps)
    elif cfg.schedule == "linear":
      t, s = np.linspace(1, 1e-3, steps + 1, dtype=np.float32)[i : i + 2]
      count = left if i == steps - 1 else int(np.float32(left) * (1 - s / t))
    else:
      # left / (steps - i), but halves are decided by how dllm rounds on the way there.
      time = lambda k: np.float32(1) - (np.float32(1) - np.float32(k / steps))
      count = round(float(np.float32(left) * (1 - time(steps - i - 1) / time(steps - i))))
    counts.append(min(count, left))
    left -= counts[-1]
  return [count for count in counts if count]


def likeliest(p, share):
  """Which of the probabilities p[V] are the likeliest that have this share, as bools."""
  kept, total = np.zeros(len(p), bool), 0.0
  for token in np.argsort(-p, kind="stable"):
    if total >= share:
      break
    kept[token], total = True, total + p[token]
  return kept


def softmax(x):
  x = np.exp(x.astype(np.float64) - x.max())
  return x / x.sum()


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
    counts = counts_of(cfg, had)
    origin = cfg.remasking == "origin"
    for i in range(cfg.steps_per_block if origin else len(counts)):
      if not any(is_mask(k) for k in inside):
        break
      now = block * cfg.steps_per_block + i
      count = 0 if origin else counts[i]
      if cfg.adaptive:
        left = sum(is_mask(k) for k in inside)
        count = max(sum(counts[: i + 1]) - (had - left), 1)
      start = first if cfg.allow_mask else begin
      window = range(start, begin + cfg.block_length)
      step_key = jax.random.fold_in(key, now)

      logits = logits_of(tokens, valid)
      if cfg.cfg_scale:
        blind = logits_of(np.where(fixed, lm.mask_id, tokens), valid)
        logits = blind + (cfg.cfg_scale + 1) * (logits - blind)
      scores = logits.copy()
      streams = [jax.random.fold_in(step_key, stream) for stream in (0, 1, 2)]
      if cfg.top_p < 1:
        if not cfg.allow_mask:
          scores[:, lm.mask_id] = -np.inf
        for k in window:
          scores[k, ~likeliest(softmax(scores[k] / (cfg.temperature or 1)), cfg.top_p)] = -np.inf
      kept = scores.copy()
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
        p = softmax(kept[k] / (cfg.temperature or 1))
        if cfg.remasking in ("random", "origin"):
          value = float(jax.random.uniform(jax.random.fold_in(streams[1], k - first)))
        elif cfg.remasking == "sequential":
          value = -k
        elif cfg.remasking == "maskgit_plus":
          value = p[token]
        elif cfg.remasking == "topk_margin":
          value = np.sort(p)[-1] - np.sort(p)[-2]
        elif cfg.remasking == "entropy":
          value = (p * np.log(p + 1e-10)).sum()
        if cfg.alg_temp:
          noise_key = jax.random.fold_in(streams[2], k - first)
          value = value / cfg.alg_temp + float(jax.random.gumbel(noise_key, (), mode="high"))
        last = cfg.suppress_eos and token in lm.stop_ids
        candidates.append((last, -value, k, token, confidence))
      candidates.sort()
      chosen = candidates[:count]
      if origin:
        t, s = np.linspace(1, 1e-3, cfg.steps_per_block + 1)[i : i + 2]
        chance = 1 if i == cfg.steps_per_block - 1 else 1 - s / t
        chosen = [c for c in candidates if -c[1] < chance]
      if cfg.threshold is not None:
        chosen += [c for c in candidates[count:] if c[-1] > cfg.threshold]
      for _, _, k, token, _ in chosen:
        tokens[k] = token
        if token != lm.mask_id:
          commit_step[k] = now
      forwards[block] += 1
      ends = cfg.early_stop == "row" and all(tokens[k] == lm.eos_id for k in inside)
      if cfg.early_stop == "stop_token" and not any(is_mask(k) for k in inside):
        ends = any(tokens[k] in lm.stop_ids for k in inside)
      if ends:
        for k in range(first, length):
          if is_mask(k):
            tokens[k], commit_step[k] = lm.eos_id, now
        return tokens, commit_step, forwards
  return tokens, commit_step, forwards
