"""What several stages share: keys, tokens, passes over blocks, stored tensors."""
