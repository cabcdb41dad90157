"""The way back: what a serving layout or Megatron cut, made the model it was cut from."""
