"""The operators: centered kernel alignment on samples and on patches of feature maps."""

from pcka.ops._loader import build_info
from pcka.ops.functional import cka, patch_cka, patch_gram

__all__ = ["build_info", "cka", "patch_cka", "patch_gram"]
