"""What weights, activations and updates look like: measures, which never change what they look at."""
