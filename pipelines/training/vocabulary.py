"""A vocabulary of one's own: WordPiece learned from a run's captions."""

from collections.abc import Iterable
from pathlib import Path

from qformer.errors import UserError
from qformer.torch_build.torchvision import import_torchvision

CORPUS_VOCABULARY = 30_000


def learn_text_tokenizer(captions: Iterable[str], folder: Path) -> None:
    """Learn a lower-case WordPiece vocabulary from captions and save it as a BERT tokenizer.

    Raises:
        UserError: If there is no text to learn from.
    """
    import_torchvision()
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast

    learner = BertWordPieceTokenizer(lowercase=True)
    learner.train_from_iterator(captions, vocab_size=CORPUS_VOCABULARY, min_frequency=1, show_progress=False)
    if learner.get_vocab_size() <= 5:
        raise UserError("model.tokenizer: 'corpus' found no words in the captions; check data.manifest")
    folder.mkdir(parents=True, exist_ok=True)
    learner.save(str(folder / "tokenizer.json"))
    BertTokenizerFast(tokenizer_file=str(folder / "tokenizer.json")).save_pretrained(str(folder))
