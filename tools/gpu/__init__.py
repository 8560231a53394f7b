"""The stages of ``tools/gpu_check.py``, and what runs and reports them."""
