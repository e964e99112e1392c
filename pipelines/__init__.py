"""Beam programs: what a person submits to a runner."""
