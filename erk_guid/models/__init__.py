"""Networks, checkpoint files and encoders."""
