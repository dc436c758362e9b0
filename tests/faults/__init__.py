"""Faults of the infrastructure: the same requests fail with the watch as without, and what it counts stays exact."""
