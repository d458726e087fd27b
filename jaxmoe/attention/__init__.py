"""Attention modules: projections, rotation and norms around the ops object's paged attention."""
