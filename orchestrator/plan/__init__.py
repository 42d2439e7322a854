"""Plain values that cross process boundaries: linears, forms, curves, plans, cuts."""
