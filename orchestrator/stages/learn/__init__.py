"""Scores of directions, learned on the loss of the gated model, before there is a plan."""
