"""Second derivatives where PyTorch's are missing, wrong or slow."""
