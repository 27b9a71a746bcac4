"""Set-up, updates and the two training loops."""
