"""The stages of ``tools/gpu_check.py``, and the code that runs and reports them."""
