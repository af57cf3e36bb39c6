"""Faults on purpose: real processes killed, real disks filled, real files damaged, and a count of what came of it."""
