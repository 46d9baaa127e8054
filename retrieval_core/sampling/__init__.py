"""Noise schedule, sampler, and how a bank acts while sampling."""
