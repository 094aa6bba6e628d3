"""What a compiled step costs: floating-point operations, HBM traffic, collectives, and the chips that pay."""
