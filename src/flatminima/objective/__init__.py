"""Model + loss + data → L(θ + δ) and ∇L(θ + δ); the only room that calls a model."""
