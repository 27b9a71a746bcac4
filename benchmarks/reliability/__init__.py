"""Campaigns of faults: kills, broken disks, malformed input, numbers that are none, long runs."""
