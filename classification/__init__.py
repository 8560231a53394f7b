"""Image classification: models, data, configuration, and training by distillation."""
