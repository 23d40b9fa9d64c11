"""A WordPiece vocabulary that is learned from a run's captions."""

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
        captions: Function that returns all captions; called twice.
        folder: Folder for the tokenizer's files.

    Raises:
        UserError: If there is no text to learn from.
    """
    import_torchvision()
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast

    # The learner breaks ties between pairs by token number, and numbers the letters in the order of a randomly seeded
    # hash table. So a first pass finds the letters, and the second gets them as numbered special tokens.
    letters = sorted(_learn(captions(), _SPECIAL, size=0).keys() - {*_SPECIAL})
    if not letters:
        raise UserError("model.tokenizer: 'corpus' found no words in the captions; check data.manifest")
    vocabulary = _learn(captions(), (*_SPECIAL, *letters), size=CORPUS_VOCABULARY)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Complete or absent: a resumed run uses the folder that exists.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as unfinished:
        saved = Path(unfinished) / folder.name
        saved.mkdir()
        BertWordPieceTokenizer(vocab=vocabulary, lowercase=True).save(str(saved / "tokenizer.json"))
        BertTokenizerFast(tokenizer_file=str(saved / "tokenizer.json")).save_pretrained(str(saved))
        saved.rename(folder)


def _learn(captions: Iterable[str], first: Iterable[str], size: int) -> dict[str, int]:
    """Learn the number of each token: `first`, then each letter (alone and as "##" suffix), then pairs up to `size`."""
    from tokenizers import BertWordPieceTokenizer

    learner: Any = BertWordPieceTokenizer(lowercase=True)
    learner.train_from_iterator(
        captions,
        vocab_size=size,
        min_frequency=1,
        limit_alphabet=CORPUS_VOCABULARY,  # the default drops rare letters, with ties broken at random
        special_tokens=list(first),
        show_progress=False,
    )
    vocabulary: dict[str, int] = learner.get_vocab()
    return vocabulary
