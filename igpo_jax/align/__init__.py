"""Length alignment: long reasoning traces into concise ones with the same answer (METHOD 6)."""
