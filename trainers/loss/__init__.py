"""Cross entropy of a language model from its last hidden states, without the logits of all tokens at once."""
