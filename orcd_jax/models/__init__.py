"""Language models in Flax NNX: modules describe a model's arrays and formulas; plain pytrees of arrays run it."""
