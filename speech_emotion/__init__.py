"""Fine-tuning recipes for speech emotion classifiers: everything that both training scripts share."""
