"""A low-rank method is five small choices: feedback, subspace, transport, inner, lift."""
