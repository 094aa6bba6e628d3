"""What trains a model: one loop, one update, one state, and the services around them."""
