"""Length alignment: long traces into concise ones with the same answer (docs/method.md#sft)."""
