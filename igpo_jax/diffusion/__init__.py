"""Forward masking and the denoising loop."""
