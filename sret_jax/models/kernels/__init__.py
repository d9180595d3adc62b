"""The parts that run as one fused kernel."""
