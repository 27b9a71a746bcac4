"""Records, tokenizers and batches. No jax in here."""
