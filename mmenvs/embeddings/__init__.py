"""Embeddings: encoders of each modality, fusion strategies, and the extractor that joins them."""

from mmenvs.benchmark.recommend import recommend
from mmenvs.embeddings.cache import EmbeddingCache
from mmenvs.embeddings.embedding import Embedding, load_embedding
from mmenvs.embeddings.extractor import ENCODERS, Extractor
from mmenvs.embeddings.fusion import FUSIONS, Fusion
from mmenvs.embeddings.pretrained import Pretrained

__all__ = [
    "ENCODERS",
    "FUSIONS",
    "Embedding",
    "EmbeddingCache",
    "Extractor",
    "Fusion",
    "Pretrained",
    "load_embedding",
    "recommend",
]
