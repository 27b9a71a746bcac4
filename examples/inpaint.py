"""Fills in an answer around tokens that are given: what IGPO does with pieces of a solution.

    python examples/inpaint.py MODEL "What is 12 times 12?" "12 times 10 is 120" 4

puts the piece at token 4 of the answer. MODEL: see sample.py.
"""

import sys

import jax
import numpy as np

import igpo_jax


def inpaint(model, question, piece, position, gen_length=128, block_length=32, steps=64):
  pre = igpo_jax.load_pretrained(model, dtype="float32")  # "bfloat16" on a GPU or a TPU
  tokenizer = pre.tokenizer
  sampler = igpo_jax.SamplerConfig(gen_length, block_length, steps)

  answer = np.full(gen_length, tokenizer.mask_id, np.int32)
  hint = tokenizer.encode(piece)
  answer[position : position + len(hint)] = hint

  # Two rows: the answer without the piece, and with it.
  prompt = tokenizer.encode_prompt([{"role": "user", "content": question}])
  blank = np.full(gen_length, tokenizer.mask_id)
  tokens = np.array([[*prompt, *blank], [*prompt, *answer]], np.int32)
  fixed = tokens != tokenizer.mask_id  # prompt and piece never change
  canvas = igpo_jax.Canvas(tokens, fixed, valid=np.ones_like(fixed))

  result = igpo_jax.denoise(pre.lm, pre.params, canvas, jax.random.key(0), sampler)
  plain, inpainted = np.asarray(result.tokens)[:, -gen_length:]
  assert (inpainted[position : position + len(hint)] == hint).all()
  return tokenizer.decode(plain), tokenizer.decode(inpainted)


if __name__ == "__main__":
  model, question, piece, position = sys.argv[1:5]
  plain, inpainted = inpaint(model, question, piece, int(position))
  print(f"alone:\n{plain}\n\nwith {piece!r} at token {position}:\n{inpainted}")
