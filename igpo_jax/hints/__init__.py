"""Chunks of ground-truth traces, placed on a canvas. Host side, numpy."""
