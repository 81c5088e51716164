"""Fine-tuning of a pretrained encoder on labelled texts. Pretrains nothing."""
