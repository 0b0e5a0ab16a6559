"""The paper's pretext task: hiding, losses, co-distillation. Never sees a file."""
