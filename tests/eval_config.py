"""Two steps of fine-tuning and an evaluation of 13 problems in batches of 4, as a config."""

from igpo_jax.config import default_config


def get_config():
  config = default_config()
  task = "synthetic:chains?min_steps=1&max_steps=2"
  config.stages = ("sft",)
  config.data.sft = f"{task}&split=train&n=64&seed=1"
  config.data.eval = (f"test={task}&split=test&seed=3&n=13",)
  config.data.prompt_buckets = (12,)
  config.reward.verifier = "exact"

  config.model.d_model = 16
  config.model.n_layers = 1
  config.model.n_heads = 2
  config.model.mlp_hidden = 32

  config.sampler.gen_length = 16
  config.sampler.block_length = 8
  config.sampler.steps = 4

  config.sft.steps = 2
  config.sft.batch_size = 8
  config.eval.batch_size = 4
  config.log.tensorboard = False
  return config
