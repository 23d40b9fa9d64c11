"""Frozen language model and image processor of a Hugging Face BLIP-2 folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qformer.adapters.lora import Lora
from qformer.config import LoraConfig
from qformer.conversion.bundle import first_line, read_tensors
from qformer.errors import UserError
from qformer.preprocessing import PIL_INTERPOLATIONS, Preprocessing, transformers_preprocessing
from qformer.torch_build.torchvision import import_torchvision


def preprocessing_of(image_processor: Any) -> Preprocessing:
    """Preprocessing of a BlipImageProcessor (resize to the square) or a CLIPImageProcessor (resize, centre crop)."""
    return transformers_preprocessing(image_processor.to_dict())


def image_processor_for(preprocessing: Preprocessing) -> Any:
    """Image processor with a given preprocessing; inverse of `preprocessing_of`."""
    from transformers import BlipImageProcessor, CLIPImageProcessor

    size = {"height": preprocessing.height, "width": preprocessing.width}
    resample = next(number for number, name in PIL_INTERPOLATIONS.items() if name == preprocessing.interpolation)
    common = {"resample": resample, "image_mean": list(preprocessing.mean), "image_std": list(preprocessing.std)}
    if preprocessing.crop == "squash":
        return BlipImageProcessor(size=size, **common)
    return CLIPImageProcessor(size={"shortest_edge": preprocessing.resize_short_side}, crop_size=size, **common)


def read_language(
    name: str, image_id: int, tokenizer: Any, lora: LoraConfig | None, updates: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and config of the language model, with a row for the placeholder token.

    Args:
        name: Hub name or folder.
        image_id: Id of the placeholder token.
        tokenizer: Tokenizer of the language model, with the placeholder.
        lora: LoRA whose updates are merged into the weights, since the layout has no place for them; or None.
        updates: Tensors of the LoRA by `Lora`'s names.

    Raises:
        UserError: If the language model cannot be loaded.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name)
        model = _language_class(config).from_pretrained(name, dtype="auto")
    except Exception as error:
        raise UserError(f"checkpoint: its language model {name!r} cannot be loaded ({first_line(error)})") from error
    if image_id >= config.vocab_size:
        model.resize_token_embeddings(image_id + 1, mean_resizing=False)
        _copy_row(model, image_id, config.vocab_size, _non_answer_id(tokenizer))
    weights = model.state_dict()
    if lora is not None:
        adapters = Lora(model, lora)
        adapters.load_state_dict(dict(updates))
        weights = adapters.merge()
    if Path(name).is_dir():
        # transformers keeps single layers of fp16 models in fp32; the export keeps the files' dtypes.
        dtypes = {k: v.dtype for k, v in read_tensors(Path(name)).items()}
        weights = {k: v.to(dtypes.get(k, v.dtype)) for k, v in weights.items()}
    return weights, model.config.to_dict()


def language_width(name: str) -> int | None:
    """Width of a language model's embeddings by its config; None if the config is not on this machine."""
    import_torchvision()
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, local_files_only=True).get_text_config()
        # An OPT's embeddings may have another width than its layers.
        return int(getattr(config, "word_embed_proj_dim", config.hidden_size))
    except Exception:
        return None


def read_language_tokenizer(name: str) -> Any:
    """Load the language model's tokenizer.

    Raises:
        UserError: If it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise UserError(f"checkpoint: no tokenizer of its language model {name!r} ({first_line(error)})") from error


def _non_answer_id(tokenizer: Any) -> int:
    """Id of a token that is never generated. The placeholder copies its embedding, so it is never generated either."""
    candidates = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, 0)
    return next(i for i in candidates if i is not None and (i != tokenizer.eos_token_id or i == 0))


@torch.no_grad()
def _copy_row(model: Any, last: int, first_new: int, source: int) -> None:
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            module.weight[first_new : last + 1] = module.weight[source]
            if getattr(module, "bias", None) is not None:
                module.bias[first_new : last + 1] = module.bias[source]


def _language_class(config: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def write_language(config: Any, weights: Mapping[str, Tensor], tokenizer: Any, folder: Path) -> None:
    """Write the frozen language model as a transformers folder."""
    write_model(_language_class(config.text_config).from_config, config.text_config, weights, folder)
    tokenizer.save_pretrained(folder)


def write_model(build: Any, config: Any, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Save a transformers model with given weights, without initialising or copying any.

    Args:
        build: Function from the config to the model.
        config: Config of the model.
        weights: Tensors by the model's names.
        folder: Output folder.

    Raises:
        UserError: If a name or shape differs from the model's; the message names the first.
    """
    with torch.device("meta"):
        model = build(config)
    own = model.state_dict()
    for name in sorted(weights):
        if name not in own or own[name].shape != weights[name].shape:
            wanted = f"{tuple(own[name].shape)} is wanted" if name in own else "the model has no such tensor"
            raise UserError(f"conversion: {name} is {tuple(weights[name].shape)} but {wanted}")
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty:
        raise UserError(f"conversion: nothing to fill {empty[0]!r} of {type(model).__name__} with; a part is damaged")
    model.save_pretrained(folder)
