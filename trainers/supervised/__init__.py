"""Parts of supervised fine-tuning."""
