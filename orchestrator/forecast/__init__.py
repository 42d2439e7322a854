"""What a run will take, from shapes and rates alone, before any machine is asked for."""
