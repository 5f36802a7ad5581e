"""The pipeline's stages, one per file, and the generic runner."""
