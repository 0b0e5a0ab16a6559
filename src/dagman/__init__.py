"""DAGMaN: self-supervised pretraining for CT, and what the encoder is for."""
