"""Small array operations that several rooms share."""
