"""How one batch is multiplied: graphs of gradients and outputs, and their cache."""
