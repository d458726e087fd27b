"""Mixture-of-experts blocks: routing and the sum of routed and shared experts."""
