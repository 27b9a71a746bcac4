"""Small array operations: masked arithmetic, and statistics of tokens without all their logits."""
