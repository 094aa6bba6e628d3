"""Other people's weights, read into this project's parameter trees: one module per family."""
