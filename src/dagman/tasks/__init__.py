"""What pretrained features are for."""
