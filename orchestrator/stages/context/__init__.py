"""Parts shared by several stages: keys, tokens, passes over blocks, stored tensors."""
