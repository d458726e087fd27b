"""Building blocks of a model: modules that hold weights and take the operations to use per call."""
