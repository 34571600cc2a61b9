"""Text: sources, tokenizers, packing with document boundaries, and the Grain pipeline over them."""

from .completions import PromptCompletion
from .concatenated import Concatenated, concatenated
from .hugging_face import HuggingFace
from .mixture import Mixture
from .packing import Corpus, PackedWindows, Windows, encode_corpus, target_mask
from .pipeline import HeldOut, held_out, leading_documents, training_batches
from .source import Completion, Document, Source, Split, document_text
from .standard_library import StandardLibrary
from .tensorflow_datasets import TensorFlowDatasets
from .text_files import TextFiles
from .tokenizers import Bytes, HuggingFaceTokenizer, SentencePiece, Tokenizer, check_vocabulary

__all__ = [
    "Bytes",
    "Completion",
    "Concatenated",
    "Corpus",
    "Document",
    "HeldOut",
    "HuggingFace",
    "HuggingFaceTokenizer",
    "Mixture",
    "PackedWindows",
    "PromptCompletion",
    "SentencePiece",
    "Source",
    "Split",
    "StandardLibrary",
    "TensorFlowDatasets",
    "TextFiles",
    "Tokenizer",
    "Windows",
    "check_vocabulary",
    "concatenated",
    "document_text",
    "encode_corpus",
    "held_out",
    "leading_documents",
    "target_mask",
    "training_batches",
]
