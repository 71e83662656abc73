"""Embeddings: encoders of each modality, fusion strategies, and the extractor that joins them."""

from mmenvs.benchmark.recommend import recommend
from mmenvs.embeddings.cache import EmbeddingCache
from mmenvs.embeddings.cost import cost
from mmenvs.embeddings.embedding import Embedding, load_embedding
from mmenvs.embeddings.encoders import ENCODERS
from mmenvs.embeddings.extractor import Extractor
from mmenvs.embeddings.fusion import FUSIONS, Fusion
from mmenvs.embeddings.pretrained import Pretrained
from mmenvs.embeddings.probes import probe_report

__all__ = [
    "ENCODERS",
    "FUSIONS",
    "Embedding",
    "EmbeddingCache",
    "Extractor",
    "Fusion",
    "Pretrained",
    "cost",
    "load_embedding",
    "probe_report",
    "recommend",
]
