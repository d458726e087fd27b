"""Long prompts: the routed experts stream from host memory through a ring of slots on the
device.
"""
