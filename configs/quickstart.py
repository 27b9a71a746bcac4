"""SFT, then IGPO, then evaluation, on a generated task: minutes on two CPU cores."""

from igpo_jax.config import default_config


def get_config():
  config = default_config()
  config.data.sft = "synthetic:chains?split=train&n=20000&seed=1&min_steps=6&max_steps=6&hard_share=0.15"
  config.data.rl = "synthetic:chains?split=train&n=4000&seed=2&min_steps=6&max_steps=6"
  config.data.eval = ("test=synthetic:chains?split=test&n=512&seed=3&min_steps=6&max_steps=6",)
  config.data.prompt_buckets = (28,)
  config.reward.verifier = "exact"

  config.model.d_model = 96
  config.model.n_layers = 3
  config.model.mlp_hidden = 256

  config.sampler.gen_length = 32
  config.sampler.block_length = 8
  config.sampler.steps = 16
  config.sampler.temperature = 0.8

  config.sft.steps = 300
  config.sft.batch_size = 64
  config.sft_optimizer.learning_rate = 2e-3
  config.sft_optimizer.warmup_steps = 30
  config.sft_optimizer.schedule = "cosine"
  config.sft_optimizer.weight_decay = 0.01

  config.eval.batch_size = 128
  config.hints.hide_answer_value = True
  config.rl.steps = 60
  config.rl.estimator = "random_ratio"
  config.rl.inner_updates = 2
  config.rl_optimizer.learning_rate = 5e-4
  config.rl_optimizer.warmup_steps = 10
  config.rl_optimizer.weight_decay = 0.0
  config.rl_optimizer.clip_norm = 1.0
  config.objective.beta = 0.01
  return config
