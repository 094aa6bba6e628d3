"""What a compiled step costs: FLOPs, HBM traffic, collectives, and the limits of chips."""
