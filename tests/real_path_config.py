"""The setting of a real run at a small size: tests/real_path_test.py writes what it reads.

    python -m igpo_jax.main --config=tests/real_path_config.py:DIR

What is asked of a paper's run, in one: a LLaDA checkpoint from Hugging Face with its own
tokenizer, bfloat16, LoRA, MetaMathQA as source, the IGPO protocol's prompts and grading.
Completions of an untrained model are never right, so the policy is rewarded by
tests/tiny_config.py's verifier, which also holds the wire that kills a run.
"""

import urllib.parse

from igpo_jax.config import default_config
from igpo_jax.eval.protocols import IGPO_TEMPLATE
from tests import tiny_config  # registers the verifier and the reward


def get_config(directory):
  config = default_config()
  config.init_from = f"{directory}/LLaDA-tiny"
  template = urllib.parse.quote(IGPO_TEMPLATE)
  source = f"jsonl:{directory}/MetaMathQA.json?format=metamath&template={template}"
  config.data.sft = config.data.rl = source
  config.data.eval = (f"gsm8k=jsonl:{directory}/gsm8k.jsonl?format=gsm8k",)
  config.data.prompt_buckets = (96, 128)
  config.reward.verifier = "lenient"
  config.reward.weights = (("correct", 1.0), ("tripwire", 1.0))
  config.eval.protocol = "igpo"
  config.eval.batch_size = 4

  config.model.dtype = config.model.param_dtype = "bfloat16"
  config.model.attention = "auto"
  config.model.remat = "full"
  config.model.lora.rank = 4
  config.model.lora.alpha = 8.0

  config.sampler.gen_length = 48
  config.sampler.block_length = 16
  config.sampler.steps = 12
  config.sampler.temperature = 1.0
  config.sft.steps = 2
  config.sft.batch_size = 4
  config.rl.steps = 3
  config.rl.prompts_per_step = 4
  config.rl.group_size = 2
  config.rl.inner_updates = 2
  config.rl.sample_slices = 2
  config.sft_optimizer.learning_rate = config.rl_optimizer.learning_rate = 1e-2

  config.checkpoint.every = 1
  config.log.samples_every = 1
  config.log.samples_per_step = 0
  config.log.tensorboard = False
  return config


TRIPWIRE = tiny_config.TRIPWIRE
