"""Noise schedule, samplers, and retrieval from a bank while sampling."""
