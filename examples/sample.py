"""Answers a prompt with a model: from a directory of weights to text.

    python examples/sample.py MODEL "What is 12 times 12?"

MODEL is a Hugging Face directory of LLaDA, Dream, ... (docs/models.md), one that igpo_jax.convert
wrote, or WORKDIR/checkpoints/rl/STEP of a run.
"""

import sys

import jax
import numpy as np

import igpo_jax


def sample(model, question, gen_length=128, block_length=32, steps=64):
  pre = igpo_jax.load_pretrained(model, dtype="float32")  # "bfloat16" on a GPU or a TPU
  tokenizer = pre.tokenizer
  sampler = igpo_jax.SamplerConfig(gen_length, block_length, steps, temperature=0.0)

  # The canvas: the prompt, and behind it as many masks as the answer may have tokens.
  prompt = tokenizer.encode_prompt([{"role": "user", "content": question}])
  tokens = np.array([[*prompt, *[tokenizer.mask_id] * gen_length]], np.int32)  # i32[B,T]
  fixed = tokens != tokenizer.mask_id  # what is there stays
  canvas = igpo_jax.Canvas(tokens, fixed, valid=np.ones_like(fixed))

  result = igpo_jax.denoise(pre.lm, pre.params, canvas, jax.random.key(0), sampler)
  answer = np.asarray(result.tokens)[0, -gen_length:]
  order = np.asarray(result.commit_step)[0, -gen_length:]
  return tokenizer.decode(answer), order


if __name__ == "__main__":
  text, order = sample(*sys.argv[1:3])
  print(text)
  print("step at which each token was committed:", *order)
