"""What is measured of weights, gradients and activations; nothing here changes any."""
