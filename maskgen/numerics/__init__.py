"""The mathematics of tokens, noise and prompts: pure functions, no modules."""
