"""Full models on disk: diffusers folders and single files, the same tensors under different names."""
