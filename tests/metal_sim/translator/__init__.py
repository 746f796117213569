"""Turns Metal shading language into C++ that the simulator compiles."""
