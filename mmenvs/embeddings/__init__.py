"""Embeddings: encoders of each modality, fusion strategies, and the extractor that joins them."""

from mmenvs.embeddings.extractor import ENCODERS, Extractor
from mmenvs.embeddings.fusion import FUSIONS, Fusion

__all__ = ["ENCODERS", "FUSIONS", "Extractor", "Fusion"]
