"""Allocations by gates of directions, learned once for every size: ACIP, SoCo, and paths."""
