"""Pure functions of tensors and an `Axis`. Batched over leading dimensions; nothing here keeps state."""
