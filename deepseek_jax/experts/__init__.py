"""How tokens meet experts, on one device's part of the arrays."""
