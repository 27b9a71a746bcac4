"""Weights in and out: Hugging Face safetensors, Orbax checkpoints, PEFT adapters."""
