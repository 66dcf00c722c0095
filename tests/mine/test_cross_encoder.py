"""The hook for a cross-encoder: the same scores as the model under it gives, pair by pair."""

from pathlib import Path

import pytest
import torch

from f2llm.mine.cross_encoder import cross_encoder_scores


@pytest.mark.slow
def test_cross_encoder_scores(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast.from_pretrained(str(tmp_path))
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(words),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            num_labels=1,
            initializer_range=1.0,
        )
    ).eval()
    for part in (tokenizer, model):
        part.save_pretrained(tmp_path)
    pairs = [("a b", "c"), ("a b", "d e f g h"), ("h", "c a"), ("g f e", "b b")]
    with torch.no_grad():
        logits = [model(**tokenizer(*pair, return_tensors="pt")).logits.item() for pair in pairs]
    expected = torch.tensor(logits).sigmoid().tolist()  # what a CrossEncoder of one label gives
    assert cross_encoder_scores(str(tmp_path), pairs).tolist() == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) == len(pairs)
