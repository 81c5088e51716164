"""Fine-tuning a pretrained encoder for a task of one's own. Reads tables of texts, pretrains nothing."""
