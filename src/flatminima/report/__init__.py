"""The one-call face: `sharpness()` measures a model."""
