"""RLA-WM in JAX: a world model that predicts DINO tokens through residual latent actions (arXiv 2605.07079)."""
