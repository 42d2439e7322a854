"""Numerics: functions from tensors to tensors. Know no names, linears, models or clusters."""
