"""Object detection: PCKA distillation of detectron2 detectors."""
