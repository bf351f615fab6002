"""DeepSpeed's engine for optimizers of matrices, in a plain loop; Lightning's is in `strategies.zero`."""
