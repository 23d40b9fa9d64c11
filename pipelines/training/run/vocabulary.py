"""A vocabulary of one's own: WordPiece learned from a run's captions."""

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from qformer.errors import UserError
from qformer.torch_build.torchvision import import_torchvision

CORPUS_VOCABULARY = 30_000
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def learn_text_tokenizer(captions: Callable[[], Iterable[str]], folder: Path) -> None:
    """Learn a lower-case WordPiece vocabulary from captions and save it as a BERT tokenizer.

    The same captions, in any order, give the same vocabulary with the same numbers.

    Args:
        captions: Called twice; every call gives all of them.
        folder: For the tokenizer's files.

    Raises:
        UserError: If there is no text to learn from.
    """
    import_torchvision()
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast

    # The learner decides between equally frequent pairs by their numbers, and numbers letters in the order that a
    # randomly seeded table holds them in. So it is given the letters, numbered.
    letters = sorted(_learn(captions(), _SPECIAL, size=0).keys() - {*_SPECIAL})
    if not letters:
        raise UserError("model.tokenizer: 'corpus' found no words in the captions; check data.manifest")
    vocabulary = _learn(captions(), (*_SPECIAL, *letters), size=CORPUS_VOCABULARY)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: a resumed run uses the folder that is there.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as unfinished:
        saved = Path(unfinished) / folder.name
        saved.mkdir()
        BertWordPieceTokenizer(vocab=vocabulary, lowercase=True).save(str(saved / "tokenizer.json"))
        BertTokenizerFast(tokenizer_file=str(saved / "tokenizer.json")).save_pretrained(str(saved))
        saved.rename(folder)


def _learn(captions: Iterable[str], first: Iterable[str], size: int) -> dict[str, int]:
    """Tokens by number: `first`, every letter, at the beginning of a word and within, and more up to `size`."""
    from tokenizers import BertWordPieceTokenizer

    learner: Any = BertWordPieceTokenizer(lowercase=True)
    learner.train_from_iterator(
        captions,
        vocab_size=size,
        min_frequency=1,
        limit_alphabet=CORPUS_VOCABULARY,  # by default the rarest are dropped, and of equally rare ones any
        special_tokens=list(first),
        show_progress=False,
    )
    found: dict[str, int] = learner.get_vocab()
    return found
