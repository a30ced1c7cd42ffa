"""Peers measured beside Burnish, in the same run on the same device: what they are given, and how they are timed."""
