"""Plain values that cross process boundaries: linears, curves, plans, cuts."""
